"""Training steps of SAELens and sparsify, as programs that step.py times beside this library's in their own environment."""

from shared import forget_peak, high_water, source

START = """
import sys, time, json, torch
from safetensors.torch import load_file
folder, rule, k, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
data = load_file(folder + "/data.safetensors")
d_in, d_sae = data["W_enc"].shape
"""

SAELENS = """
from sae_lens.saes.sae import TrainStepInput
from sae_lens import (StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig,
                      GatedTrainingSAE, GatedTrainingSAEConfig, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig,
                      JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig)
common = dict(d_in=d_in, d_sae=d_sae, device="cpu", normalize_activations="none")
sae = {
    "l1": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=5.0, **common)),
    "topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(k=k, **common)),
    "batch_topk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=k, **common)),
    "jumprelu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common)),
    "gated": lambda: GatedTrainingSAE(GatedTrainingSAEConfig(l1_coefficient=5.0, **common)),
}[rule]()
with torch.no_grad():
    sae.W_enc.copy_(data["W_enc"]); sae.W_dec.copy_(data["W_dec"]); sae.b_dec.copy_(data["b_dec"])
    (sae.b_gate if rule == "gated" else sae.b_enc).copy_(data["b_enc"])
optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5)
since = torch.zeros(d_sae); frequency = torch.zeros(d_sae)
dead = torch.zeros(d_sae, dtype=torch.bool)
sae.train()

def step(x):
    out = sae.training_forward_pass(TrainStepInput(sae_in=x, coefficients={"l1": 5.0, "l0": 5.0}, dead_neuron_mask=dead,
                                                   n_training_steps=1, is_logging_step=False))
    with torch.no_grad():
        fired = out.feature_acts.bool().float()
        did = fired.sum(-2).bool()
        since.add_(1)
        since[did] = 0
        frequency.add_(fired.sum(0))
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return fired.sum(1).mean().item()
"""

SPARSIFY = """
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder
sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k))
with torch.no_grad():
    sae.encoder.weight.copy_(data["W_enc"].T); sae.W_dec.copy_(data["W_dec"]); sae.b_dec.copy_(data["b_dec"])
optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5)
since = torch.zeros(d_sae, dtype=torch.long)

def step(x):
    did = torch.zeros(d_sae, dtype=torch.bool)
    out = sae(x, dead_mask=None)
    with torch.no_grad():
        did[out.latent_indices.flatten()] = True
    out.fvu.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    sae.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    sae.set_decoder_norm_to_unit_norm()
    since.add_(len(x))
    since[did] = 0
    return float((out.latent_acts > 0).sum(1).float().mean())
"""

SERVE = """
print("ready", flush=True)
for line in sys.stdin:
    x = data["x"][int(line)]
    forget_peak()
    before = high_water()[1]
    start = time.perf_counter()
    l0 = step(x)
    seconds = time.perf_counter() - start
    gradients = sum(p.numel() * p.element_size() for p in sae.parameters())
    print(json.dumps({"seconds": seconds, "l0": l0, "extra_bytes": high_water()[0] - before - gradients}), flush=True)
"""

MEMORY = source(high_water, forget_peak)
PEERS = {"SAELens": MEMORY + START + SAELENS + SERVE, "sparsify": MEMORY + START + SPARSIFY + SERVE}
