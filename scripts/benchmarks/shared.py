"""Common parts of the benchmarks: arguments, random models, memory readings, and other tools in their own process.

The functions with imports inside also run in the processes of other tools, which receive them as text (see `source`).
"""

import argparse
import inspect
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer
    from transformers import GPT2LMHeadModel

HOOK, N_CTX = "blocks.8.hook_resid_pre", 128  # of GPT-2 small

# Returns freed memory to the system at once, so that the peak memory of a process counts only what is in use.
FREE_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def parser(
    doc: str, *, rounds: int, peers: str | None = "sae-lens", required: bool = False, device: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark.

    Args:
        doc: The script's docstring, shown by --help.
        rounds: Default of --rounds.
        peers: Packages that the environment of --peer-python needs; None leaves that option out.
        required: Whether --peer-python has to be given.
        device: Whether the benchmark can run on a GPU.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    if peers is not None:
        made.add_argument("--peer-python", required=required, help=f"Python of an environment with {peers}")
    if device:
        made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--json", type=Path, help="file to write the results to")
    return made


def write_report(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write the settings of a run and its results to the file of --json, if one is given."""
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, **report}, indent=1))


def random_gpt2(**shape: int) -> "GPT2LMHeadModel":
    """Return transformers' GPT-2 with random weights, the same each time; without a shape it has that of GPT-2 small."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape)).eval()


# Functions for other tools' processes


def now(device: str = "cpu") -> float:
    """Return a time in seconds, after all work on the device is done."""
    import time

    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def high_water(device: str = "cpu") -> tuple[int, int]:
    """Return (peak since `forget_peak`, now) in bytes: of this process's memory as Linux counts it, or of tensors on a GPU."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    with open("/proc/self/status") as file:
        facts = dict(line.split(":") for line in file if line.startswith("Vm"))
    return int(facts["VmHWM"].split()[0]) * 1024, int(facts["VmRSS"].split()[0]) * 1024


def forget_peak(device: str = "cpu") -> None:
    """Set the peak of this process's memory, or of tensors on a GPU, to what is used now."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def hooked_transformer(folder: str, **settings: str) -> "HookedTransformer":
    """Return the GPT-2 in a folder of transformers' as a HookedTransformer, in float32 on the CPU."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained(folder).float()
    c = theirs.config
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_heads=c.n_head, d_head=c.n_embd // c.n_head, d_mlp=4 * c.n_embd,
        n_ctx=c.n_positions, d_vocab=c.vocab_size, act_fn="gelu_new", normalization_type="LN", eps=c.layer_norm_epsilon,
        device="cpu", **settings,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_gpt2_weights(theirs, cfg), strict=False)
    return model


def source(*functions: Callable[..., Any]) -> str:
    """Return the code of functions, to put at the beginning of another tool's program."""
    return "from __future__ import annotations\n" + "\n\n".join(map(inspect.getsource, functions)) + "\n"


class Peer:
    """Another tool in its own process, which waits while others are timed."""

    def __init__(self, python: str, code: str, *arguments: object):
        command = [python, "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while (line := self.process.stdout.readline()).strip() != "ready":
            if not line:
                raise SystemExit(f"{python} cannot run the tool; see its error above")

    def ask(self, question: object) -> dict[str, Any]:
        """Return the peer's answer to one line."""
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
