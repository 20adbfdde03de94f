"""Fixtures of several test files: the embedded model, a small random one, text, a cache, planted activations."""

import os
import signal
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from checked import checked
from hypothesis import settings

# saelens_lite is imported inside the fixtures: jaxtyping must have put its import hook in place first.

jaxtyping.jaxtyped = checked
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=15, database=None)
settings.load_profile("fixed")

# Tests interrupt themselves, also where the shell has told its background jobs to ignore that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes that test side by side share the cores; those that tests start take over the variable.
if n_workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    n_threads = max(1, (os.cpu_count() or 1) // int(n_workers))
    os.environ["OMP_NUM_THREADS"] = str(n_threads)
    torch.set_num_threads(n_threads)

# Without a GPU, Triton's interpreter runs the kernels. That is settled when triton is imported, which torch and transformers
# do unasked while tests are collected: so it is imported before them. The variable goes again, or training would use it too.
if find_spec("triton") and not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import_module("triton")

HOOKS = ("blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out")


def pytest_collection_modifyitems(config, items):
    """Leave out tests that need a CUDA device where torch finds none, and tests that pretend to have one where it does."""
    other = "pretended_gpu" if torch.cuda.is_available() else "gpu"
    left_out = [item for item in items if item.get_closest_marker(other)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker(other)]


@pytest.fixture(autouse=True)
def unnamed_device_is_the_cpu(monkeypatch, request):
    """Tests compare with tensors on the CPU, so work runs there, also where there is a GPU, unless a device is named."""
    if request.node.path.name != "test_devices.py":
        from saelens_lite import devices

        monkeypatch.setattr(devices, "natural_device", lambda: torch.device("cpu"))


@pytest.fixture(scope="session")
def lm():
    """The embedded model."""
    import saelens_lite as sl

    return sl.load_model("tiny", device="cpu")


@pytest.fixture(scope="session")
def random_lm(lm):
    """A GPT-2 of three blocks and random weights, biases and norms, with the embedded tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    import saelens_lite as sl

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=lm.d_vocab,
        n_positions=40,
        n_embd=48,
        n_layer=3,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    module = GPT2LMHeadModel(config)
    for parameter in module.parameters():
        if parameter.ndim == 1:  # biases and norms, which start at 0 and 1
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return sl.LanguageModel(module, lm.tokenizer, name="random")


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """A few of Python's help topics, of uneven length."""
    return [text[: 150 + 170 * i] for i, (_, text) in enumerate(sorted(topics.items())[:6])]


@pytest.fixture(scope="session")
def cache_folder(lm, documents, tmp_path_factory) -> Path:
    """Two hooks of the embedded model in float32, in shards of 101 activations; copy it before changing anything."""
    import saelens_lite as sl

    out = tmp_path_factory.mktemp("captured") / "cache"
    sl.capture(lm, documents, HOOKS, out, n_ctx=32, dtype="float32", shard_tokens=101, batch_tokens=128, text_name="some docs")
    return out


@pytest.fixture
def cache(cache_folder):
    """The cache of `cache_folder`, freshly opened."""
    import saelens_lite as sl

    return sl.ActivationCache.open(cache_folder)


@pytest.fixture
def planted():
    """planted(n, …) → (x [n d_in], directions [n_directions d_in]): sums of `active` unit directions of strength 0.5 … 1.5."""

    def make(n: int, d_in: int = 64, n_directions: int = 128, active: int = 4, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        directions = torch.nn.functional.normalize(torch.randn(n_directions, d_in, generator=generator), dim=1)
        chosen = torch.rand(n, n_directions, generator=generator).topk(active, dim=1).indices
        strength = torch.rand(n, active, generator=generator) + 0.5
        return torch.zeros(n, n_directions).scatter_(1, chosen, strength) @ directions, directions

    return make


class Said(NamedTuple):
    """The result of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch, capsys):
    """A command of the command line, run in this process."""

    def run(*args: object) -> Said:
        from saelens_lite import cli

        monkeypatch.setattr(sys, "argv", ["saelens-lite", *map(str, args)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return Said(code, *capsys.readouterr())

    return run
