"""The state of one dictionary in training: a step, what is counted, and how to put all of it away and take it up again."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.cache import Batch, Source, Statistics
from saelens_lite.cache.source import UNNAMED
from saelens_lite.codes import gpu
from saelens_lite.config import TrainConfig
from saelens_lite.devices import where_float64_is, wide
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError, SourceChangedError
from saelens_lite.files import check_fits_memory, shortened
from saelens_lite.ports import Hooks, Port, together
from saelens_lite.training.step import DenseStep, SparseStep

MAX_SCALINGS, SAME = 12, 1e-3  # of the untrained encoder
_NUMBERS = ("scales", "target_scales", "variance", "n_seen", "n_steps", "fire_tokens")


class Trainer:
    """The state of one dictionary in training.

    The dictionary sees the activations of each port multiplied by a number: `scales` of the ports it reads, `target_scales` of
    those it writes. Where these are other ports it has no bias that would centre its input, so `shift` is subtracted from that.
    `result` folds all of this in.
    """

    step_class: type[DenseStep] = SparseStep

    def __init__(self, config: TrainConfig, source: Source, device: str | torch.device = "cpu"):
        self.config = config
        self.hooks = _choose_hooks(config, source)
        moments = {hook: _moments(source, hook) for hook in self.hooks.all}
        is_same = self.hooks.reads == self.hooks.writes
        scale_of = {hook: self._scale_of(*found, around_mean=not is_same) for hook, found in moments.items()}
        self.scales = [scale_of[hook] for hook in self.hooks.reads]
        self.target_scales = [scale_of[hook] for hook in self.hooks.writes]
        self.variance = sum(scale_of[hook] ** 2 * moments[hook][1] for hook in self.hooks.writes)
        means = {hook: found.mean * scale_of[hook] for hook, (found, _) in moments.items()}
        self.shift = None if is_same else together(means, self.hooks.reads).to(device)
        self._cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
        self._random = [torch.Generator(d).manual_seed(config.seed).get_state() for d in ("cpu", *self._cuda)]
        with self._own_randomness():
            self.dictionary = Dictionary.create(
                config.sparsity,
                reads=_ports(source, self.hooks.reads),
                writes=None if is_same else _ports(source, self.hooks.writes),
                d_sae=config.d_sae,
                skip=config.skip,
                options=config.options,
                seed=config.seed,
                origin=source.origin(self.hooks.reads[0]),
            ).to(device)
        self.dictionary.train()
        self.dictionary.b_dec.data.copy_(together(means, self.hooks.writes))
        with torch.no_grad():
            self.dictionary.rule.after_step(self.dictionary)
        # Adam is several times faster on contiguous memory, so it is given W_encᵀ
        self._updated = {
            name: p if p.is_contiguous() else p.detach().T.requires_grad_() for name, p in self.dictionary.named_parameters()
        }
        self.optimizer = torch.optim.Adam(self._updated.values(), lr=config.peak_lr, betas=config.betas, eps=1e-8, fused=True)
        by_itself = gpu.has_bfloat16(self.dictionary.W_enc.device)
        self.halves = {"auto": by_itself, "float32": False, "bfloat16": True}[config.encoder_precision]
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

    def _scale_of(self, statistics: Statistics, variance: float, around_mean: bool) -> float:
        """Return the number that gives activations, or their difference from the mean, an RMS norm of sqrt(d)."""
        if self.config.normalize == "none":
            return 1.0
        return len(statistics.mean) ** 0.5 / (variance**0.5 if around_mean else statistics.rms_norm)

    def _prepare(self, batch: Batch) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """Return raw activations as the dictionary expects them: its input and its target."""
        weight = self.dictionary.W_dec

        def scaled(hooks: Sequence[str], scales: Sequence[float]) -> Float[Tensor, "batch d"]:
            parts = zip(hooks, scales, strict=True)
            return together([batch[hook].to(weight.device, weight.dtype) * scale for hook, scale in parts])

        x = scaled(self.hooks.reads, self.scales)
        return (x, x) if self.shift is None else (x - self.shift, scaled(self.hooks.writes, self.target_scales))

    def step(self, batch: Batch | Float[Tensor, "batch d_in"]) -> None:
        """Take one optimiser step on raw activations.

        Args:
            batch: the activations of every hook that the dictionary reads or writes, by name; a tensor where it is only one.

        Raises:
            ShapeError: activations of one of the hooks are missing.
            PluginError: the sparsity rule gives negative codes; the parameters are those before the step.
            NonFiniteError: the activations or the loss are NaN or infinite; the parameters are those before the step.
        """
        if isinstance(batch, Tensor):
            batch = {self.hooks.reads[0]: batch}
        if missing := [hook for hook in self.hooks.all if hook not in batch]:
            raise ShapeError(f"a step of this dictionary needs the activations of {', '.join(missing)} too")
        c = self.config
        progress = self.n_seen / c.n_tokens
        with self._own_randomness():
            x, target = self._prepare(batch)
            if self.n_steps == 0 and not self.dictionary.rule.tied and self.shift is None:
                self._scale_encoder(x)
            self._step(x, target, progress)

    @torch.no_grad()
    def _scale_encoder(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Multiply W_enc by the number at which the untrained dictionary reconstructs x best.

        Random directions overlap, so that their codes add up to too much of x or, where rows are short, too little; else
        hundreds of steps go by until learning has put that right. (Gao et al. 2024, section A.1, match norms instead.)
        """
        d = self.dictionary
        centred, before = x - d.b_dec, d.W_enc.clone()

        def fit() -> tuple[float, float, float]:
            """(squared error, the best factor of the codes as they are, the error it gives)."""
            part = wide(d.encode(x).decode(d.W_dec))
            exact = wide(centred)
            overlap, norm, total = (exact * part).sum(), part.square().sum(), exact.square().sum()
            return tuple((torch.stack([total - 2 * overlap + norm, overlap / norm, total - overlap**2 / norm])).tolist())

        least, factor, expected = fit()
        if not 0 < factor < math.inf:
            return
        d.W_enc.mul_(factor)
        if abs(fit()[0] - expected) <= SAME * expected:
            return
        d.W_enc.copy_(before)  # not only strengths changed but also what fires: go half the way, again and again
        for _ in range(MAX_SCALINGS):
            d.W_enc.mul_(factor**0.5)
            error, factor, _ = fit()
            if not error < least:
                d.W_enc.copy_(before)
                return
            if abs(factor - 1) < SAME or not 0 < factor < math.inf:
                return
            least, before = error, d.W_enc.clone()

    def _step(self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], progress: float) -> None:
        c = self.config
        step = self.step_class(
            self.dictionary,
            x,
            target,
            dead=self.since_fired >= c.dead_after,
            progress=progress,
            warmup=min(1.0, progress / c.sparsity_warmup) if c.sparsity_warmup else 1.0,
            halves=self.halves,
        )
        losses = step.losses()
        total = torch.stack(list(losses.values())).sum()
        self.dictionary.zero_grad(set_to_none=True)
        total.backward()
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.dictionary.parameters() if p.grad is not None])
            fired = step.codes.latent[step.codes.fires]
            smallest = step.codes.value.amin() if len(step.codes.value) else torch.zeros_like(norm)
            # The one time the host waits for the step
            *values, norm_found, smallest = torch.stack([*losses.values(), total, norm, smallest.to(norm.dtype)]).tolist()
            if not math.isfinite(values[-1] + norm_found):
                raise NonFiniteError(self._explain((x, target), losses))
            self.dictionary.rule.check_codes(smallest)
            if c.clip_grad_norm:  # the optimiser divides while it reads
                self.optimizer.grad_scale = (norm / c.clip_grad_norm).clamp(min=1.0)
            for name, parameter in self.dictionary.named_parameters():
                if (updated := self._updated[name]) is not parameter:
                    updated.grad = None if parameter.grad is None else parameter.grad.T
            self.optimizer.param_groups[0]["lr"] = self.lr_at((self.n_steps + 0.5) / math.ceil(c.n_tokens / c.batch_size))
            self.optimizer.step()
            self.dictionary.rule.observe(step)
            self.dictionary.rule.after_step(self.dictionary)
            self._count(len(x), fired, dict(zip([*losses, "loss"], values, strict=False)))

    @property
    def described(self) -> str:
        """The rule, the hook, and how far training is, for messages."""
        return f"{self.config.sparsity} on {self.hooks} (after {self.n_seen:,} tokens)"

    def _explain(self, activations: Sequence[Tensor], losses: dict[str, Tensor]) -> str:
        """Say what became NaN or infinite first: the data, a parameter, a part of the loss, or a gradient."""
        parameters = dict(self.dictionary.named_parameters())
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        step = self.n_steps + 1
        if _not_finite(dict(enumerate(activations))):
            cause = "the activations"
        elif names := _not_finite(parameters):
            cause, step = ", ".join(names), self.n_steps
        elif names := _not_finite(losses):
            cause = f"the loss ({', '.join(names)})"
        elif names := _not_finite(gradients):
            cause = f"the gradient of {', '.join(names)}"
        else:
            cause = "the sum of the losses, or the norm of the gradient,"
        return f"{cause} became NaN or infinite in step {step}, {self.described}"

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

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """A rule that draws random numbers gets the same ones whatever else the process does."""
        with torch.random.fork_rng(self._cuda):
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._cuda, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            try:
                yield
            finally:
                self._random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._cuda)]

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        """Loss figures on raw activations that were not trained on: val_fvu = Σ‖y − ŷ‖² / Σ‖y − mean‖², and val_l0.

        y: the activations at the ports that are written, each port scaled as in training.
        """
        self.dictionary.eval()
        targets, n = {hook: batch[hook] for hook in self.hooks.writes}, len(batch[self.hooks.reads[0]])
        means = {hook: where_float64_is(x).mean(0, dtype=torch.float64) for hook, x in targets.items()}
        error = spread = 0.0
        l0 = 0
        with self._own_randomness():
            for start in range(0, n, self.config.batch_size):
                piece = {hook: batch[hook][start : start + self.config.batch_size] for hook in self.hooks.all}
                x, target = self._prepare(piece)
                codes = self.dictionary.encode(x)
                squares = (target - self.dictionary.decode(codes, x)).square()
                error += float(where_float64_is(squares).sum(dtype=torch.float64))
                for hook, scale in zip(self.hooks.writes, self.target_scales, strict=True):
                    spread += float((where_float64_is(piece[hook]) - means[hook]).square().sum()) * scale**2
                l0 += int(codes.fires.sum())
        self.dictionary.train()
        return {"val_fvu": round(error / spread, 6) if spread else math.nan, "val_l0": round(l0 / n, 6)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on, as tensors and as plain data."""
        tensors = {f"dictionary.{name}": x for name, x in self.dictionary.state_dict().items()}
        for name, parameter in self._updated.items():
            tensors |= {f"adam.{name}.{key}": x for key, x in self.optimizer.state[parameter].items()}
        tensors |= {"since_fired": self.since_fired, "fire_count": self.fire_count}
        tensors |= {f"random.{i}": state for i, state in enumerate(self._random)}
        if self.shift is not None:
            tensors["shift"] = self.shift
        numbers = {name: getattr(self, name) for name in _NUMBERS} | {"sums": self._sums, "n_sums": self._n_sums}
        return tensors, numbers

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take up a state.

        Raises:
            SourceChangedError: it is of training on other activations.
            KeyError, RuntimeError: it is not one of this trainer.
        """
        for name in ("scales", "target_scales", "variance"):
            found, wanted = np.atleast_1d(getattr(self, name)), np.atleast_1d(numbers[name])
            if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-4, atol=0):
                raise SourceChangedError(
                    f"the activations of {self.hooks} are not those the run was trained on: their {name} are "
                    f"{getattr(self, name)}, they were {numbers[name]}"
                )
        if self.shift is not None:
            if not torch.allclose(self.shift.cpu(), tensors["shift"].cpu(), rtol=1e-3, atol=1e-3):
                raise SourceChangedError(
                    f"the activations of {self.hooks} are not those the run was trained on: their mean is another"
                )
            self.shift.copy_(tensors["shift"])
        self._check_tensors(tensors, numbers)
        state = self.dictionary.state_dict()
        for name, x in state.items():
            x.copy_(tensors[f"dictionary.{name}"])
        for name, parameter in self._updated.items():
            found = {key.rsplit(".", 1)[1]: x for key, x in tensors.items() if key.startswith(f"adam.{name}.")}
            self.optimizer.state[parameter] = {key: x.to(parameter.device) for key, x in found.items()}
        self.since_fired.copy_(tensors["since_fired"])
        self.fire_count.copy_(tensors["fire_count"])
        self._random = [tensors[f"random.{i}"] for i in range(len(self._random))]
        for name in _NUMBERS:
            setattr(self, name, numbers[name])
        self._sums, self._n_sums = numbers["sums"], numbers["n_sums"]

    def _check_tensors(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Raise ConfigError unless tensors are those of this trainer, to the shape: a copy would repeat rows of others."""
        like = {f"dictionary.{name}": x for name, x in self.dictionary.state_dict().items()}
        for name, parameter in self._updated.items():
            if any(key.startswith(f"adam.{name}.") for key in tensors):  # it had a gradient
                moments = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
                like |= {f"adam.{name}.{key}": x for key, x in moments.items()}
        like |= {"since_fired": self.since_fired, "fire_count": self.fire_count}
        like |= {f"random.{i}": x for i, x in enumerate(self._random)}
        like |= {} if self.shift is None else {"shift": self.shift}
        other_devices = {name for name in tensors if name.startswith("random.")}
        names = shortened(like.keys() ^ (tensors.keys() - (other_devices - like.keys())))
        if names != "none":
            raise ConfigError(f"the checkpoint does not fit this run: missing or not expected: {names}")
        for name, x in like.items():
            if (found := tensors[name]).shape != x.shape or found.dtype != x.dtype:
                wanted = f"{tuple(x.shape)} {x.dtype}"
                raise ConfigError(
                    f"the checkpoint does not fit this run: {name} is {tuple(found.shape)} {found.dtype}, expected {wanted}"
                )
        for name, most in (("since_fired", numbers["n_seen"]), ("fire_count", numbers["fire_tokens"])):
            if not ((tensors[name] >= 0) & (tensors[name] <= most)).all():
                raise ConfigError(f"the checkpoint does not fit this run: {name} is below 0 or above {most}")
        for i, device in enumerate(("cpu", *self._cuda)):
            torch.Generator(device).set_state(tensors[f"random.{i}"])  # RuntimeError for bytes that are no state

    @torch.no_grad()
    def result(self) -> Dictionary:
        """The dictionary as it is now, for raw activations: scale and decoder norms folded in."""
        d = self.dictionary
        rule = type(d.rule)(d.rule.config, d_in=d.d_in, d_sae=d.d_sae)
        density = self.fire_count.float() / self.fire_tokens if self.fire_tokens else None
        record = {"config": self.config.model_dump(mode="json"), "tokens": self.n_seen, "steps": self.n_steps}
        kept = {"d_sae": d.d_sae, "skip": d.W_skip is not None, "origin": d.origin}
        copy = Dictionary(rule, **d.ports, **kept, density=density, training=record)
        copy.to(d.W_enc.device).load_state_dict(d.state_dict())
        copy.fold_decoder_norms_()
        if self.shift is not None:
            copy.fold_shift_(self.shift)
        return copy.fold_scales_(self.scales, self.target_scales).eval()


def _not_finite(tensors: dict[Any, Tensor]) -> list[Any]:
    """The names of the tensors that hold NaN or infinity."""
    return [name for name, x in tensors.items() if not bool(torch.isfinite(x).all())]


def check_sizes(config: TrainConfig, source: Source, tensors: dict[str, Tensor]) -> None:
    """Raise ConfigError or CorruptFileError unless a state is of activations as wide as those of a source and a batch of them
    fits into memory; all that a trainer allocates follows from these sizes."""
    hooks = _choose_hooks(config, source)
    d_in, d_out = (sum(map(source.d_in, side)) for side in hooks)
    for name, wanted in {"W_dec": (config.d_sae, d_out), "W_enc": (d_in, config.d_sae)}.items():
        if (found := tensors.get(f"dictionary.{name}")) is not None and tuple(found.shape) != wanted:
            raise ConfigError(
                f"the checkpoint does not fit the activations: {name} has shape {tuple(found.shape)}, expected {wanted}"
            )
    check_fits_memory(f"a batch of {config.batch_size:,}", 4 * config.batch_size * (d_in + d_out))


def _choose_hooks(config: TrainConfig, source: Source) -> Hooks:
    """Return the hooks that a dictionary reads and writes.

    Raises:
        ConfigError: there are several hooks and none is named, or a skip connection from hooks to themselves.
        HookError: there are no activations of a hook.
    """
    reads = config.reads or ((config.hook,) if config.hook else ())
    if not reads:
        reads = tuple(name for name in source.hooks if name not in config.writes)
        if len(reads) != 1:
            raise ConfigError(f"the activations come from several hooks; say which: hook = one of {', '.join(source.hooks)}")
    hooks = Hooks(reads, config.writes or reads)
    if config.skip and hooks.reads == hooks.writes:
        raise ConfigError("skip = True needs other hooks to write than those that are read: writes = …")
    for hook in hooks.all:
        source.d_in(hook)
    return hooks


def _ports(source: Source, hooks: Sequence[str]) -> tuple[Port, ...]:
    return tuple(Port(hook=None if hook == UNNAMED else hook, width=source.d_in(hook)) for hook in hooks)


def _moments(source: Source, hook: str) -> tuple[Statistics, float]:
    """Statistics and variance of the activations of a hook; NonFiniteError when there is nothing in them to train on."""
    statistics = source.statistics(hook)
    if not math.isfinite(statistics.rms_norm):
        raise NonFiniteError(f"the activations of {hook!r} hold NaN or infinity; nothing was trained")
    if not statistics.rms_norm > 0:
        raise NonFiniteError(f"the activations of {hook!r} have a root mean square norm of 0.0; nothing to train on")
    variance = statistics.rms_norm**2 - float(wide(statistics.mean).square().sum())
    if not variance > 1e-9 * statistics.rms_norm**2:
        raise NonFiniteError(f"the activations of {hook!r} are all the same; there is nothing to train on")
    return statistics, variance
