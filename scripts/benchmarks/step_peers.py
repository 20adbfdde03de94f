"""Training steps of SAELens and sparsify, as programs that step.py times beside this library's in their own environment.

On a GPU, "compiled" means torch.compile and bfloat16 autocast; sparsify uses autocast there in any case.
"""

from shared import forget_peak, high_water, now, source

RULES = {"SAELens": ("l1", "topk", "gated", "batch_topk", "jumprelu", "matryoshka"), "sparsify": ("topk",)}

START = """
import sys, json, torch
from safetensors.torch import load_file
folder, rule, k, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
device, compiled, n_steps = sys.argv[5], sys.argv[6] == "compiled", int(sys.argv[7])
torch.set_num_threads(threads)
data = load_file(folder + "/data.safetensors", device=device)
dead = data["dead"]
d_in, d_sae = data["W_enc"].shape
"""

SAELENS = """
from sae_lens.saes.sae import TrainStepInput
from sae_lens import (StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig,
                      GatedTrainingSAE, GatedTrainingSAEConfig, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig,
                      JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAE,
                      MatryoshkaBatchTopKTrainingSAEConfig)
common = dict(d_in=d_in, d_sae=d_sae, device=device, normalize_activations="none")
widths = [d_sae // 32, 3 * d_sae // 32, 7 * d_sae // 32, 15 * d_sae // 32, d_sae]
sae = {
    "l1": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=5.0, **common)),
    "topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(k=k, **common)),
    "batch_topk": lambda: BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=k, **common)),
    "jumprelu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common)),
    "gated": lambda: GatedTrainingSAE(GatedTrainingSAEConfig(l1_coefficient=5.0, **common)),
    "matryoshka": lambda: MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(k=k, matryoshka_widths=widths, **common)),
}[rule]()
with torch.no_grad():
    sae.W_enc.copy_(data["W_enc"]); sae.W_dec.copy_(data["W_dec"]); sae.b_dec.copy_(data["b_dec"])
    (sae.b_gate if rule == "gated" else sae.b_enc).copy_(data["b_enc"])
optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5)
since = torch.zeros(d_sae, device=device); frequency = torch.zeros(d_sae, device=device)
sae.train()
forward = torch.compile(sae.training_forward_pass) if compiled else sae.training_forward_pass

def step(x):
    with torch.autocast(device, torch.bfloat16, enabled=compiled):
        out = forward(TrainStepInput(sae_in=x, coefficients={"l1": 5.0, "l0": 5.0}, dead_neuron_mask=dead,
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
    return fired.sum(1).mean()
"""

SPARSIFY = """
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder
sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=device)
with torch.no_grad():
    sae.encoder.weight.copy_(data["W_enc"].T); sae.W_dec.copy_(data["W_dec"]); sae.b_dec.copy_(data["b_dec"])
    sae.encoder.bias.copy_(data["b_enc"])
optimizer = torch.optim.Adam(sae.parameters(), lr=1e-5)
since = torch.zeros(d_sae, dtype=torch.long, device=device)
forward = torch.compile(sae) if compiled else sae
dead = dead if dead.any() else None

def step(x):
    did = torch.zeros(d_sae, dtype=torch.bool, device=device)
    out = forward(x, dead_mask=dead)
    with torch.no_grad():
        did[out.latent_indices.flatten()] = True
    (out.fvu + out.auxk_loss / 32).backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    sae.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()
    sae.set_decoder_norm_to_unit_norm()
    since.add_(len(x))
    since[did] = 0
    return (out.latent_acts > 0).sum(1).float().mean()
"""

SERVE = """
print("ready", flush=True)
for line in sys.stdin:
    forget_peak(device)
    before = high_water(device)[1]
    start = now(device)
    for i in range(n_steps):
        l0 = step(data["x"][(int(line) + i) % len(data["x"])])
    seconds = (now(device) - start) / n_steps
    gradients = sum(p.numel() * p.element_size() for p in sae.parameters())
    extra = high_water(device)[0] - before - gradients
    print(json.dumps({"seconds": seconds, "l0": float(l0), "extra_bytes": extra}), flush=True)
"""

COMMON = source(now, high_water, forget_peak)
PEERS = {"SAELens": COMMON + START + SAELENS + SERVE, "sparsify": COMMON + START + SPARSIFY + SERVE}
