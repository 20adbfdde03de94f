"""Let other tools load files of this library, and load their files; codes and reconstructions have to agree.

    python scripts/comparisons/check_formats.py saelens=/a/bin/python sparsify=/a/bin/python dictionary_learning=/b/bin/python

Further formats: circuit_tracer and llamascopium. Each Python is that of an environment with the tool; other packages the tool
imports and that are not installed are replaced by empty modules. --path FOLDER adds a folder to their import path, such as an
unpacked wheel. Prints, for each file, the largest absolute difference of codes and of outputs, beside the largest value of
each. The exit code is 1 when a difference is above 1e-5 times that value, or when a latent fires in one tool but not in the
other.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from shared import Difference, run_peer

import saelens_lite as sl
from saelens_lite import formats, registry
from saelens_lite.errors import ConfigError

D_IN, D_SAE, K = 16, 48, 5
RULES = {
    "l1": {}, "topk": {"k": K}, "gated": {}, "batch_topk": {"k": K}, "jumprelu": {}, "matryoshka": {"k": K}, "p_anneal": {},
    "group_max": {"k": 4}, "matching_pursuit": {"k": K},
}  # fmt: skip

START = """
import importlib.abc, importlib.machinery, json, os, sys, types, warnings
from pathlib import Path
warnings.filterwarnings("ignore")

class Empty(type):
    def __getattr__(cls, name): return cls
    def __call__(cls, *args, **kwargs): return args[0] if len(args) == 1 and callable(args[0]) else cls
    def __getitem__(cls, item): return cls
    def __iter__(cls): return iter(())

class Nothing(metaclass=Empty): pass

class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Something empty for what a tool imports and is not installed; not for what its libraries would use if it were."
    def find_spec(self, name, path=None, target=None):
        importer = sys._getframe(1)
        while importer.f_globals["__name__"].startswith(("importlib", "_frozen_importlib")): importer = importer.f_back
        if top(importer.f_globals["__name__"]) not in TOOLS or top(name) in TOOLS | REAL: return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = self.anything
        return module
    def anything(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return Nothing
    def exec_module(self, module): pass

TOOLS, REAL = {"dictionary_learning", "circuit_tracer", "llamascopium", "sparsify"}, {"torch", "transformers", "numpy"}
def top(name): return name.partition(".")[0]
def without_its_init(package):
    "Import modules of a package, but not all that it imports itself."
    module = types.ModuleType(package)
    found = next(Path(p) / package for p in sys.path if (Path(p) / package / "__init__.py").is_file())
    module.__path__, module.__version__ = [str(found)], "?"
    sys.modules[package] = module

where, theirs = Path(sys.argv[1]), Path(sys.argv[1]) / "theirs"
import torch
from safetensors.torch import load_file, save_file
x = load_file(where / "x.safetensors")["x"]
torch.manual_seed(0)
D_IN, D_SAE, K = x.shape[1], 48, 5

def randomise(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape) * (0.4 if p.ndim == 1 else 1))
            if "threshold" in name: p.abs_()
    return module

def answer(folder, codes, x_hat):
    save_file({"codes": codes.detach().float().contiguous(), "x_hat": x_hat.detach().float().contiguous()},
              where / f"{folder.parent.name} {folder.name}.safetensors")
"""

SAELENS = """
from sae_lens import SAE
import sae_lens as s
for folder in sorted((where / "ours").iterdir()):
    sae = SAE.load_from_disk(folder)
    answer(folder, sae.encode(x), sae(x))
common, RESCALED = dict(d_in=D_IN, d_sae=D_SAE, device="cpu"), "constant_norm_rescale"
pursuit = dict(max_iterations=K, residual_threshold=0.0, stop_on_duplicate_support=False)
through = dict(common, d_out=9, apply_b_dec_to_input=False)
from sae_lens.saes.transcoder import (Transcoder, TranscoderConfig, SkipTranscoder, SkipTranscoderConfig, JumpReLUTranscoder,
    JumpReLUTranscoderConfig, JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig)
for name, make in {
    "standard": lambda: s.StandardSAE(s.StandardSAEConfig(**common)),
    "standard, b_dec kept": lambda: s.StandardSAE(s.StandardSAEConfig(**common, apply_b_dec_to_input=False)),
    "standard, constant norm": lambda: s.StandardSAE(s.StandardSAEConfig(**common, normalize_activations=RESCALED)),
    "topk": lambda: s.TopKSAE(s.TopKSAEConfig(**common, k=K)),
    "topk by norms": lambda: s.TopKSAE(s.TopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=True)),
    "topk, layer norm": lambda: s.TopKSAE(s.TopKSAEConfig(**common, k=K, normalize_activations="layer_norm")),
    "jumprelu": lambda: s.JumpReLUSAE(s.JumpReLUSAEConfig(**common)),
    "gated": lambda: s.GatedSAE(s.GatedSAEConfig(**common)),
    "matching pursuit": lambda: s.MatchingPursuitSAE(s.MatchingPursuitSAEConfig(**common, **pursuit)),
    "transcoder": lambda: Transcoder(TranscoderConfig(**through)),
    "skip transcoder": lambda: SkipTranscoder(SkipTranscoderConfig(**through)),
    "jumprelu transcoder": lambda: JumpReLUTranscoder(JumpReLUTranscoderConfig(**through)),
    "jumprelu skip transcoder": lambda: JumpReLUSkipTranscoder(JumpReLUSkipTranscoderConfig(**through)),
}.items():
    sae = randomise(make())
    if name == "matching pursuit":
        sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
    sae.save_model(theirs / name)
    answer(theirs / name, sae.encode(x), sae(x))

# Checkpoints of a training: the answer is that of the dictionary that SAELens would export from them
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
AVERAGE, WHITENED = "expected_average_only_in", "covariance_whitening"
M = torch.linalg.qr(torch.randn(D_IN, D_IN).double())[0] * torch.rand(D_IN).add(0.5).double()
white = ActivationWhitening(torch.randn(D_IN).double(), M, torch.linalg.inv(M))
nested, kept = dict(k=K, matryoshka_widths=[8, 24, D_SAE]), dict(apply_b_dec_to_input=False)
for kind, settings in {
    "Standard": {}, "Gated": {}, "JumpReLU": {}, "TopK": dict(k=K), "BatchTopK": dict(k=2.5), "MatryoshkaBatchTopK": nested,
}.items():
    for name, more in {
        "": {}, ", not by norms": dict(rescale_acts_by_decoder_norm=False), ", scaled": dict(normalize_activations=AVERAGE),
        ", whitened": dict(normalize_activations=WHITENED),
        ", whitened, b_dec kept": dict(normalize_activations=WHITENED) | kept,
    }.items():
        if "norms" in name and "TopK" not in kind: continue
        cls, cfg = getattr(s, kind + "TrainingSAE"), getattr(s, kind + "TrainingSAEConfig")
        sae = randomise(cls(cfg(**common, **settings, **more)))
        if hasattr(sae, "topk_threshold"): sae.topk_threshold.fill_(1.2)
        folder, norm = theirs / f"{kind} checkpoint{name}", more.get("normalize_activations")
        scaler = ActivationScaler(0.37 if norm == AVERAGE else None, white if norm == WHITENED else None)
        sae.save_model(folder)
        scaler.save(str(folder / "activation_scaler.json"))
        if norm == AVERAGE: sae.fold_activation_norm_scaling_factor(0.37)
        if norm == WHITENED: sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
        sae.save_inference_model(where / "exported")
        sae = SAE.load_from_disk(where / "exported")
        answer(folder, sae.encode(x), sae(x))
"""

SPARSIFY = """
sys.meta_path.append(Stubs())
without_its_init("sparsify")
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder

def compare(folder, coder):
    acts, latents, _ = coder.encode(x)
    codes = torch.zeros(len(x), coder.num_latents).scatter(1, latents, acts)
    y = codes @ coder.W_dec + coder.b_dec
    answer(folder, codes, y if coder.W_skip is None else y + x @ coder.W_skip.mT)

for folder in sorted((where / "ours").iterdir()):
    compare(folder, SparseCoder.load_from_disk(folder))
for name, settings in {
    "topk": dict(k=K), "groupmax": dict(k=4, activation="groupmax"), "transcoder": dict(k=K, transcode=True),
    "skip transcoder": dict(k=K, transcode=True, skip_connection=True),
}.items():
    coder = randomise(SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, **settings)))
    coder.save_to_disk(theirs / name)
    compare(theirs / name, coder)
coder = randomise(SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, skip_connection=True)))
folder = theirs / "skip transcoder of before"  # the setting transcode
coder.save_to_disk(folder)
settings = json.loads((folder / "cfg.json").read_text())
del settings["transcode"], settings["activation"]
(folder / "cfg.json").write_text(json.dumps(settings))
compare(folder, SparseCoder.load_from_disk(folder))
"""

DICTIONARY_LEARNING = """
sys.meta_path.append(Stubs())
import dictionary_learning.dictionary as d
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
CLASSES = {c.__name__: c for c in (d.AutoEncoder, d.AutoEncoderNew, d.GatedAutoEncoder, d.JumpReluAutoEncoder, AutoEncoderTopK,
                                   BatchTopKSAE, MatryoshkaBatchTopKSAE)}
for folder in sorted((where / "ours").iterdir()):
    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    extra = {"normalize_decoder": False} if name == "AutoEncoder" else {}
    ae = CLASSES[name].from_pretrained(str(folder / "ae.pt"), **extra)
    answer(folder, ae.encode(x), ae(x))
for name, cls in CLASSES.items():
    more = {"k": K} if "TopK" in name else {}
    ae = randomise(cls(D_IN, D_SAE, **more, **({"group_sizes": [8, 16, 24]} if "Matryoshka" in name else {})))
    if "Batch" in name:
        ae.threshold.fill_(0.6)
    (theirs / name).mkdir(parents=True)
    torch.save(ae.state_dict(), theirs / name / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D_IN, "dict_size": D_SAE, "lm_name": "m", "layer": 3, **more}
    (theirs / name / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))
    answer(theirs / name, ae.encode(x), ae(x))
"""

CIRCUIT_TRACER = """
import inspect
sys.meta_path.append(Stubs())
without_its_init("circuit_tracer")
sys.modules["circuit_tracer.utils"] = types.SimpleNamespace(get_default_device=lambda: torch.device("cpu"))
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, load_transcoder_set
takes = inspect.signature(load_transcoder_set).parameters
for folder in sorted((where / "ours").iterdir()):
    config = {k: json.loads(v) for k, v in (line.split(": ", 1) for line in (folder / "config.yaml").read_text().splitlines())}
    settings = {name: config.get(name) for name in ("activation", "k") if name in takes}
    (t,) = load_transcoder_set({0: str(folder / "layer_0.safetensors")}, "scan", config["feature_input_hook"],
                               config["feature_output_hook"], device=torch.device("cpu"), lazy_encoder=False,
                               lazy_decoder=False, **settings)
    if config["activation"] == "topk" and not settings:  # its loader knows TopK from another version on
        t.activation_function = TopK(config["k"])
    answer(folder, t.encode(x), t(x))
for name, (activation, settings, skip) in {
    "relu": (torch.relu, "", False), "skip": (torch.relu, "activation: relu", True),
    "topk": (TopK(K), f"activation: topk\\nk: {K}", False),
    "jumprelu skip": (JumpReLU(torch.rand(D_SAE), 0.1), "", True),
}.items():
    t = SingleLayerTranscoder(D_IN, D_SAE, activation, 0, skip, device=torch.device("cpu"), dtype=torch.float32)
    randomise(t)
    (theirs / name).mkdir(parents=True)
    t.to_safetensors(theirs / name / "layer_0.safetensors")
    (theirs / name / "config.yaml").write_text("model_kind: transcoder_set\\nfeature_input_hook: mlp.hook_in\\n"
                                               f"feature_output_hook: mlp.hook_out\\n{settings}\\n")
    answer(theirs / name, t.encode(x), t(x))
"""

LLAMASCOPIUM = """
sys.meta_path.append(Stubs())
for package in ("llamascopium", "llamascopium/models", "llamascopium/utils"):
    without_its_init(package)
    sys.modules[package.replace("/", ".")] = sys.modules.pop(package)
language_model = Stubs().create_module(types.SimpleNamespace(name="language_model"))
sys.modules["llamascopium.backend.language_model"] = language_model
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
for name, settings in {
    "relu": dict(act_fn="relu"), "topk": dict(act_fn="topk", top_k=K, sparsity_include_decoder_norm=False),
    "jumprelu": dict(act_fn="jumprelu"), "jumprelu, no norms": dict(act_fn="jumprelu", sparsity_include_decoder_norm=False),
    "transcoder": dict(act_fn="jumprelu", hook_point_out="out"),
}.items():
    cfg = SAEConfig(**{"hook_point_in": "in", "hook_point_out": "in", "d_model": D_IN, "expansion_factor": D_SAE / D_IN,
                       "norm_activation": "dataset-wise", "device": "cpu", "dtype": torch.float32, **settings})
    sae = randomise(SparseAutoEncoder(cfg))
    sae.set_dataset_average_activation_norm({"in": 3.0, cfg.hook_point_out: 2.0 if cfg.hook_point_out == "out" else 3.0})
    (theirs / name).mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in sae.full_state_dict().items()}, theirs / name / "sae_weights.safetensors")
    (theirs / name / "config.json").write_text(cfg.model_dump_json())
    scaled, factors = sae.normalize_activations({"in": x}, return_scale_factor=True)
    codes = sae.encode(scaled["in"])
    c_out = D_IN**0.5 / sae.dataset_average_activation_norm[cfg.hook_point_out]
    answer(theirs / name, codes, sae.decode(codes) / c_out)
"""

PEERS = {
    "saelens": SAELENS,
    "sparsify": SPARSIFY,
    "dictionary_learning": DICTIONARY_LEARNING,
    "circuit_tracer": CIRCUIT_TRACER,
    "llamascopium": LLAMASCOPIUM,
}


def random_dictionary(rule: str, transcoder: bool, skip: bool) -> sl.Dictionary:
    """Return a dictionary of a rule with random parameters; thresholds as training leaves them."""
    reads = sl.Port(hook="blocks.0.ln2.hook_normalized", width=D_IN)
    writes = sl.Port(hook="blocks.0.hook_mlp_out", width=D_IN) if transcoder else None
    common = {"d_sae": D_SAE, "skip": skip, "options": RULES[rule], "origin": sl.Origin(model="gpt2")}
    d = sl.Dictionary.create(rule, reads=reads, writes=writes, **common)
    for parameter in d.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * (0.4 if parameter.ndim == 1 else 1))
    for buffer in d.buffers():
        buffer.fill_(0.75)
    if d.rule.tied:
        d.rule.after_step(d)
    return d


@torch.no_grad()
def check(format: str, python: str, path: str | None) -> list[dict[str, object]]:
    """Return a row for each file that was written by us and read by the tool, and the other way round."""
    writer, rows = registry.load(format, "formats")(), []
    x = torch.randn(64, D_IN) * 2 + 0.5
    with tempfile.TemporaryDirectory() as folder:
        where, ours = Path(folder), {}
        (where / "ours").mkdir()
        (where / "theirs").mkdir()
        for rule in RULES:
            for kind in ("", " transcoder", " skip transcoder"):
                try:
                    d = random_dictionary(rule, bool(kind), "skip" in kind)
                    formats.write(d, where / "ours" / f"{rule}{kind}", writer)
                    ours[f"{rule}{kind}"] = d
                except ConfigError:
                    continue
        save_file({"x": x}, where / "x.safetensors")
        environment = {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": path} if path else {})
        run_peer(
            python, "-c", START + PEERS[format], folder, doing=f"reading and writing {format} files", environment=environment
        )
        theirs = {p.name: sl.load(p, format=format) for p in sorted((where / "theirs").iterdir())}
        for by, dictionaries in (("ours", ours), ("theirs", theirs)):
            for name, d in dictionaries.items():
                peer = load_file(where / f"{by} {name}.safetensors")
                codes = d.encode(x).to_dense()
                difference = Difference.of(codes, d(x), peer["codes"], peer["x_hat"])
                l0 = round(float((codes != 0).sum(1).float().mean()), 1)
                rows.append({"format": format, "written by": by, "what": name, "l0": l0, **difference._asdict()})
                rows[-1]["agrees"] = difference.is_small and not difference.fires_elsewhere
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="+", metavar="FORMAT=PYTHON", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--path", help="folder to add to the import path of the tools")
    args = parser.parse_args()
    torch.manual_seed(0)
    failed = False
    for peer in args.peers:
        for row in check(*peer.split("=", 1), args.path):
            print(json.dumps(row, ensure_ascii=False), flush=True)
            failed |= not row["agrees"]
    sys.exit(failed)


if __name__ == "__main__":
    main()
