"""Train the same dictionary with this library and with SAELens: same start, batches and optimiser, each in its own process.

All options that both have are set alike: penalties and their warm-up, learning rate with warm-up and decay, clipping (1.0 in
both), the definition of a dead latent, the weight of the auxiliary error, the running estimate of BatchTopK's threshold, θ
and ε of JumpReLU. Two differences remain: the definition of the loss and its gradient, and that this library multiplies the
codes by one number at the first step, the one that fits best.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from shared import run_peer
from streams import Stored
from torch import Tensor

import saelens_lite as sl
from saelens_lite.cache.source import Statistics
from saelens_lite.codes import Support
from saelens_lite.config import Origin
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.training import Trainer

HOOK = "x"
PROGRAM = Path(__file__).with_name("saelens_train.py")


class Outcome(NamedTuple):
    """A trained dictionary of either tool, and what it makes of held-out activations."""

    seconds: float
    codes: sl.SparseCodes
    x_hat: Tensor
    W_dec: Tensor

    @property
    def l0(self) -> float:
        """Latents that fire for an activation, on average."""
        return float(self.codes.l0.double().mean())

    def fvu(self, x: Tensor) -> float:
        """Σ‖x − x̂‖² / Σ‖x − mean‖², in float64."""
        x = x.double()
        return float((x - self.x_hat.double()).square().sum() / (x - x.mean(0)).square().sum())


class InOrder:
    """A stream as a source of ours: whatever the seed, its batches come as they are."""

    def __init__(self, stream: Stored):
        self.stream = stream
        self.hooks: Sequence[str] = (HOOK,)
        self.n_tokens: int | None = None

    def d_in(self, hook: str) -> int:
        """Return the width of the activations."""
        return len(self.stream.mean)

    def statistics(self, hook: str) -> Statistics:
        """Return the mean and root mean square norm."""
        return Statistics(self.stream.mean, self.stream.rms_norm)

    def origin(self, hook: str) -> Origin:
        """Return an empty origin."""
        return Origin(excluded_positions=())

    def batches(
        self, hooks: Sequence[str], batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of the stream from the first on."""
        if start or world > 1:
            raise ConfigError("a stream in order is read from its first batch on, by one process")
        for x in self.stream.batches(batch_size):
            yield {HOOK: x}

    def hold_out(self, n_tokens: int) -> tuple[Any, Any]:
        """Streams have held-out activations of their own."""
        raise ConfigError("nothing can be held out of a stream in order")

    def describe(self) -> None:
        """It cannot be opened again."""


def train_ours(config: sl.TrainConfig, stream: Stored, x: Tensor) -> Outcome:
    """Train our dictionary."""
    start = time.perf_counter()
    dictionary = sl.train(InOrder(stream), config)[0].dictionary
    seconds = time.perf_counter() - start
    with torch.no_grad():
        codes = dictionary.encode(x)
        return Outcome(seconds, codes, dictionary.decode(codes), dictionary.W_dec.detach())


def train_saelens(python: str, configs: Sequence[sl.TrainConfig], stream: Stored, x: Tensor, threads: int) -> list[Outcome]:
    """SAELens's dictionaries of the same settings, trained in turn in one process."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        save_file({"x": x.contiguous()}, folder / "held_out.safetensors")
        jobs = [_job(config, stream, folder, folder / str(i), threads) for i, config in enumerate(configs)]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        run_peer(python, PROGRAM, folder / "jobs.json", doing="training SAELens's dictionaries")
        return [_outcome(folder / str(i) / "result.safetensors", config.d_sae) for i, config in enumerate(configs)]


def _job(config: sl.TrainConfig, stream: Stored, folder: Path, out: Path, threads: int) -> dict[str, Any]:
    """Return the settings for saelens_train.py and write the initial parameters beside them."""
    trainer = Trainer(config, InOrder(stream))
    start = trainer.dictionary
    initial = out.with_suffix(".initial.safetensors")
    save_file({name.removeprefix("rule."): p.contiguous() for name, p in start.state_dict().items()}, initial)
    n_steps = math.ceil(config.n_tokens / config.batch_size)
    architecture, options = SAELENS[config.sparsity](start, round(config.sparsity_warmup * n_steps))
    return {
        "architecture": architecture,
        "sae": {"d_in": start.d_in, "d_sae": start.d_sae, **options},
        "trainer": {
            "total_training_samples": config.n_tokens,
            "train_batch_size_samples": config.batch_size,
            "lr": trainer.peak_lr,
            "lr_end": trainer.peak_lr,  # of its constant plateau; the decay after it ends at 0
            "lr_warm_up_steps": round(config.warmup * n_steps),
            "lr_decay_steps": round(config.decay * n_steps),
            "adam_beta1": config.betas[0],
            "adam_beta2": config.betas[1],
            "dead_feature_window": math.ceil(config.dead_after / config.batch_size) - 1,  # dead beyond so many steps
        },
        "initial": str(initial),
        "stream": stream.file,
        "held_out": str(folder / "held_out.safetensors"),
        "out": str(out),
        "threads": threads,
    }


def _outcome(file: Path, d_sae: int) -> Outcome:
    with safe_open(file, "pt") as found:
        counts, latent, value, x_hat, W_dec = (found.get_tensor(k) for k in ("counts", "latent", "value", "x_hat", "W_dec"))
        seconds = float(found.metadata()["seconds"])
    crow = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Outcome(seconds, sl.SparseCodes.of(Support(crow, latent), value, d_sae), x_hat, W_dec)


# SAELens's architecture and options for a rule of ours


def _l1(d: Dictionary, warm_up: int) -> tuple[str, dict[str, Any]]:
    c = d.rule.config
    return "standard", {"l1_coefficient": c.coefficient, "lp_norm": c.p, "l1_warm_up_steps": warm_up}


def _gated(d: Dictionary, warm_up: int) -> tuple[str, dict[str, Any]]:
    return "gated", {"l1_coefficient": d.rule.config.coefficient, "l1_warm_up_steps": warm_up}


def _jumprelu(d: Dictionary, warm_up: int) -> tuple[str, dict[str, Any]]:
    c = d.rule.config
    return "jumprelu", {
        "l0_coefficient": c.coefficient,
        "l0_warm_up_steps": warm_up,
        "jumprelu_init_threshold": c.threshold * d.d_in**0.5,
        "jumprelu_bandwidth": c.bandwidth * d.d_in**0.5,
    }


def _topk(d: Dictionary, warm_up: int) -> tuple[str, dict[str, Any]]:
    return "topk", {"k": d.rule.config.k, "aux_loss_coefficient": d.rule.config.aux_coefficient}


def _batch_topk(d: Dictionary, warm_up: int) -> tuple[str, dict[str, Any]]:
    c = d.rule.config
    return "batchtopk", {
        "k": c.k,
        "aux_loss_coefficient": c.aux_coefficient,
        "topk_threshold_lr": 1 - c.threshold_decay,
    }


def _matryoshka(d: Dictionary, warm_up: int) -> tuple[str, dict[str, Any]]:
    return "matryoshka_batchtopk", {**_batch_topk(d, warm_up)[1], "matryoshka_widths": [*d.rule.lengths(), d.d_sae]}


def _matching_pursuit(d: Dictionary, warm_up: int) -> tuple[str, dict[str, Any]]:
    return "matching_pursuit", {
        "max_iterations": d.rule.config.k,
        "residual_threshold": 0.0,
        "stop_on_duplicate_support": False,
        "decoder_init_norm": 1.0,
    }


SAELENS: dict[str, Callable[[Dictionary, int], tuple[str, dict[str, Any]]]] = {
    "l1": _l1,
    "topk": _topk,
    "gated": _gated,
    "batch_topk": _batch_topk,
    "jumprelu": _jumprelu,
    "matryoshka": _matryoshka,
    "matching_pursuit": _matching_pursuit,
}
