"""Training: one loop for all rules, and for many dictionaries over one pass of the data."""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tomli_w
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.cache import Source, TensorSource
from saelens_lite.config import TrainConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, NonFiniteError, SaelensLiteError
from saelens_lite.files import refuse_existing, write_text
from saelens_lite.progress import progress_bar
from saelens_lite.train.step import DenseStep, SparseStep

__all__ = ["Run", "Trainer", "fit", "train"]

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """A trained dictionary, the settings it came from, its log, and its folder if it was written."""

    config: TrainConfig
    dictionary: Dictionary
    history: list[dict[str, Any]]
    folder: Path | None


class Trainer:
    """The state of one dictionary in training. The dictionary sees activations multiplied by `scale`."""

    step_class: type[DenseStep] = SparseStep

    def __init__(self, config: TrainConfig, source: Source, device: str | torch.device = "cpu"):
        self.config = config
        self.hook = _choose_hook(config, source)
        statistics = source.statistics(self.hook)
        d_in = source.d_in(self.hook)
        if not math.isfinite(statistics.rms_norm):
            raise NonFiniteError(f"the activations of {self.hook!r} hold NaN or infinity; nothing was trained")
        if not statistics.rms_norm > 0:
            raise NonFiniteError(f"the activations of {self.hook!r} have a root mean square norm of 0.0; nothing to train on")
        self.scale = d_in**0.5 / statistics.rms_norm if config.normalize == "sqrt_d" else 1.0
        self.dictionary = Dictionary.create(
            config.sparsity,
            d_in=d_in,
            d_sae=config.d_sae,
            options=config.options,
            seed=config.seed,
            origin=source.origin(self.hook),
        ).to(device)
        self.dictionary.train()
        self.dictionary.b_dec.data.copy_(statistics.mean * self.scale)
        with torch.no_grad():
            self.dictionary.rule.after_step(self.dictionary)
        self.variance = self.scale**2 * (statistics.rms_norm**2 - float(statistics.mean.double().square().sum()))
        self.optimizer = torch.optim.Adam(
            self.dictionary.parameters(), lr=config.peak_lr, betas=config.betas, eps=1e-8, fused=True
        )
        device_type = self.dictionary.W_enc.device.type
        self.halves = {"auto": device_type == "cuda", "float32": False, "bfloat16": True}[config.encoder_precision]
        self.n_seen = 0
        self.n_steps = 0
        self.since_fired = torch.zeros(config.d_sae, dtype=torch.long, device=device)
        self.fire_count = torch.zeros(config.d_sae, dtype=torch.long, device=device)
        self.fire_tokens = 0
        self._sums: dict[str, float] = {}
        self._n_sums = 0

    @property
    def done(self) -> bool:
        """Whether all tokens asked for have been seen."""
        return self.n_seen >= self.config.n_tokens

    def lr_at(self, progress: float) -> float:
        """Learning rate: linear warm-up, plateau, linear decay to zero at the end."""
        c = self.config
        rise = progress / c.warmup if c.warmup else 1.0
        fall = (1 - progress) / c.decay if c.decay else 1.0
        return c.peak_lr * max(0.0, min(1.0, rise, fall))

    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        """One optimiser step on raw activations.

        Raises:
            NonFiniteError: the activations or the loss are NaN or infinite; the parameters are those before the step.
        """
        c = self.config
        progress = self.n_seen / c.n_tokens
        x = x.to(self.dictionary.W_enc.device, self.dictionary.W_enc.dtype) * self.scale
        step = self.step_class(
            self.dictionary,
            x,
            dead=self.since_fired >= c.dead_after,
            progress=progress,
            warmup=min(1.0, progress / c.sparsity_warmup) if c.sparsity_warmup else 1.0,
            halves=self.halves,
        )
        losses = step.losses()
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.dictionary.parameters() if p.grad is not None])
            fired = step.codes.latent[step.codes.value != 0]
            values = torch.stack([*losses.values(), total, norm]).tolist()  # the one time the host waits for the step
            if not math.isfinite(values[-2] + values[-1]):
                raise NonFiniteError(self._explain(x, values[-2], values[-1]))
            if c.clip_grad_norm:  # the optimiser divides while it reads
                self.optimizer.grad_scale = (norm / c.clip_grad_norm).clamp(min=1.0)
            self.optimizer.param_groups[0]["lr"] = self.lr_at((self.n_steps + 0.5) / math.ceil(c.n_tokens / c.batch_size))
            self.optimizer.step()
            self.dictionary.rule.observe(step)
            self.dictionary.rule.after_step(self.dictionary)
            self._count(len(x), fired, dict(zip([*losses, "loss"], values, strict=False)))

    def _explain(self, x: Float[Tensor, "batch d_in"], loss: float, norm: float) -> str:
        """What became NaN or infinite."""
        finite = bool(torch.isfinite(x).all())
        cause = "the activations" if not finite else "the loss" if math.isfinite(norm) else "the gradient"
        return f"{cause} became NaN or infinite in step {self.n_steps + 1}, {self.config.sparsity} on {self.hook}"

    def _count(self, n: int, fired: Int[Tensor, " nnz"], values: dict[str, float]) -> None:
        """Dead latents, firing frequencies and the sums that the log averages."""
        counts = torch.bincount(fired, minlength=self.config.d_sae)
        self.since_fired = torch.where(counts > 0, 0, self.since_fired + n)
        if self.n_seen + n > (1 - max(self.config.decay, 0.1)) * self.config.n_tokens:
            self.fire_count += counts
            self.fire_tokens += n
        self.n_seen += n
        self.n_steps += 1
        for name, value in {**values, "l0": len(fired) / n}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._n_sums += 1

    def log_line(self) -> dict[str, Any]:
        """Means since the last line, and where training stands; losses are of scaled activations."""
        means = {name: value / self._n_sums for name, value in self._sums.items()}
        self._sums, self._n_sums = {}, 0
        return {
            "step": self.n_steps,
            "tokens": self.n_seen,
            **{name: round(value, 6) for name, value in means.items()},
            "fvu": round(means["mse"] / self.variance, 6),
            "dead": round(float((self.since_fired >= self.config.dead_after).float().mean()), 6),
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    @torch.no_grad()
    def result(self) -> Dictionary:
        """The dictionary as it is now, for raw activations: scale and decoder norms folded in."""
        d = self.dictionary
        rule = type(d.rule)(d.rule.config, d_in=d.d_in, d_sae=d.d_sae)
        density = self.fire_count.float() / self.fire_tokens if self.fire_tokens else None
        record = {"config": self.config.model_dump(mode="json"), "tokens": self.n_seen, "steps": self.n_steps}
        copy = Dictionary(rule, d_in=d.d_in, d_sae=d.d_sae, origin=d.origin, density=density, training=record).to(
            d.W_enc.device
        )
        copy.load_state_dict(d.state_dict())
        return copy.fold_decoder_norms_().fold_scale_(self.scale).eval()


def train(
    source: Source,
    configs: Sequence[TrainConfig] | TrainConfig,
    out: str | Path | None = None,
    *,
    data_seed: int = 0,
    device: str | torch.device = "cpu",
    exists: Literal["error", "overwrite"] = "error",
) -> list[Run]:
    """Train dictionaries, all on the same batches in one pass over the source.

    With `out`, each gets a folder (`out` itself for one dictionary, `out`/<number>-<rule> for several) with config.toml,
    log.jsonl and dictionary/. The order of the data comes from `data_seed` alone, so each dictionary is what it would be
    if it were trained by itself.

    Raises:
        ConfigError: no dictionary asked for, or batch sizes that differ.
        PluginError, HookError: a rule or hook that does not exist.
        OutputExistsError: an output folder holds something and `exists` is "error".
        NonFiniteError: activations or loss became NaN; the last good dictionary is in the folder's last_good/.
    """
    configs = [configs] if isinstance(configs, TrainConfig) else list(configs)
    if not configs:
        raise ConfigError("nothing to train: give at least one TrainConfig")
    sizes = {c.batch_size for c in configs}
    if len(sizes) > 1:
        raise ConfigError(f"dictionaries trained together need the same batch_size; found {sorted(sizes)}")
    trainers = [Trainer(c, source, device) for c in configs]
    folders = [None] * len(configs) if out is None else run_folders(Path(out), configs)
    for folder in folders:
        if folder:
            refuse_existing(folder, exists)
    for config, folder in zip(configs, folders, strict=True):
        if folder:
            if folder.is_dir():
                shutil.rmtree(folder)
            folder.unlink(missing_ok=True)
            folder.mkdir(parents=True)
            write_text(folder / "config.toml", tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))
    histories: list[list[dict[str, Any]]] = [[] for _ in trainers]
    try:
        _loop(source, trainers, histories, folders, data_seed)
    except (SaelensLiteError, KeyboardInterrupt):
        for trainer, folder in zip(trainers, folders, strict=True):
            if folder and trainer.n_steps:
                log.warning("stopped; the dictionary after step %d is in %s", trainer.n_steps, folder / "last_good")
                trainer.result().save(folder / "last_good", exists="overwrite")
        raise
    runs = [Run(*parts) for parts in zip(configs, (t.result() for t in trainers), histories, folders, strict=True)]
    for run in runs:
        if run.folder:
            run.dictionary.save(run.folder / "dictionary", exists="overwrite")
    return runs


def _loop(
    source: Source, trainers: list[Trainer], histories: list[list[dict[str, Any]]], folders: list[Path | None], data_seed: int
) -> None:
    """Feed every trainer the same batches until each has seen the tokens it asked for."""
    hooks = list(dict.fromkeys(trainer.hook for trainer in trainers))
    longest = max(t.config.n_tokens for t in trainers)
    next_line = [t.config.log_every for t in trainers]
    with progress_bar("train", longest) as advance:
        for batch in source.batches(hooks, trainers[0].config.batch_size, data_seed):
            for i, trainer in enumerate(trainers):
                if trainer.done:
                    continue
                trainer.step(batch[trainer.hook])
                if trainer.n_seen >= next_line[i] or trainer.done:
                    line = trainer.log_line()
                    histories[i].append(line)
                    log.info("%s %s", trainer.config.sparsity, line)
                    if folder := folders[i]:
                        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")
                    next_line[i] += trainer.config.log_every
            latest = [h[-1] for h in histories if h]
            advance(len(batch[hooks[0]]), "  ".join(f"fvu {line['fvu']:.3f} l0 {line['l0']:.0f}" for line in latest))
            if all(trainer.done for trainer in trainers):
                return


def run_folders(out: Path, configs: Sequence[TrainConfig]) -> list[Path]:
    """`out` for a single dictionary, numbered folders in it for several."""
    if len(configs) == 1:
        return [out]
    return [out / f"{i}-{c.sparsity}" for i, c in enumerate(configs)]


def fit(
    x: Float[Tensor, "n d_in"], sparsity: str = "topk", *, options: dict[str, Any] | None = None, **settings: Any
) -> Dictionary:
    """A dictionary trained on activations in memory: encode, decode, update, repeat.

    `settings` are the fields of TrainConfig: d_sae, n_tokens, batch_size, lr, seed, …; n_tokens defaults to ten passes
    over x, and a batch is never larger than x unless told.

    Raises:
        ShapeError: x is not [n d_in] floating-point numbers.
        ConfigError, PluginError: a setting or rule that does not exist, or a bad value.
        NonFiniteError: x holds NaN, or training diverged.
    """
    source = TensorSource(x)
    defaults = {"n_tokens": 10 * len(x), "batch_size": min(2048, len(x))}
    config = TrainConfig(**{**defaults, **settings, "sparsity": sparsity, "options": options or {}})
    return train(source, config, device=x.device, data_seed=config.seed)[0].dictionary


def _choose_hook(config: TrainConfig, source: Source) -> str:
    """The hook to train on; ConfigError when there are several and none is named."""
    if config.hook is not None:
        source.d_in(config.hook)
        return config.hook
    if len(source.hooks) > 1:
        raise ConfigError(f"the activations come from several hooks; say which: hook = one of {', '.join(source.hooks)}")
    return source.hooks[0]
