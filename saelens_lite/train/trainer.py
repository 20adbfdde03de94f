"""The state of one dictionary in training: a step, what is counted, and how to put all of it away and take it up again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.cache import Source
from saelens_lite.codes import gpu
from saelens_lite.config import TrainConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, NonFiniteError
from saelens_lite.train.step import DenseStep, SparseStep

_NUMBERS = ("scale", "variance", "n_seen", "n_steps", "fire_tokens")


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
        variance = statistics.rms_norm**2 - float(statistics.mean.double().square().sum())
        if not variance > 1e-9 * statistics.rms_norm**2:
            raise NonFiniteError(f"the activations of {self.hook!r} are all the same; there is nothing to train on")
        self.scale = d_in**0.5 / statistics.rms_norm if config.normalize == "sqrt_d" else 1.0
        self._cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
        self._random = [torch.Generator(d).manual_seed(config.seed).get_state() for d in ("cpu", *self._cuda)]
        with self._own_randomness():
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
        self.variance = self.scale**2 * variance
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

    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        """One optimiser step on raw activations.

        Raises:
            NonFiniteError: the activations or the loss are NaN or infinite; the parameters are those before the step.
        """
        c = self.config
        progress = self.n_seen / c.n_tokens
        x = x.to(self.dictionary.W_enc.device, self.dictionary.W_enc.dtype) * self.scale
        with self._own_randomness():
            self._step(x, progress)

    def _step(self, x: Float[Tensor, "batch d_in"], progress: float) -> None:
        c = self.config
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
        self.dictionary.zero_grad(set_to_none=True)
        total.backward()
        with torch.no_grad():
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.dictionary.parameters() if p.grad is not None])
            fired = step.codes.latent[step.codes.value != 0]
            values = torch.stack([*losses.values(), total, norm]).tolist()  # the one time the host waits for the step
            if not math.isfinite(values[-2] + values[-1]):
                raise NonFiniteError(self._explain(x, values[-2], values[-1]))
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
    def validate(self, x: Float[Tensor, "n d_in"]) -> dict[str, float]:
        """Loss figures on raw activations that were not trained on: val_fvu = Σ‖x − x̂‖² / Σ‖x − mean‖², and val_l0."""
        self.dictionary.eval()
        mean = x.mean(0, dtype=torch.float64)
        error = spread = 0.0
        l0 = 0
        with self._own_randomness():
            for piece in x.split(self.config.batch_size):
                scaled = piece.to(self.dictionary.W_enc.device, self.dictionary.W_enc.dtype) * self.scale
                codes = self.dictionary.encode(scaled)
                error += float((scaled - self.dictionary.decode(codes)).square().sum(dtype=torch.float64))
                spread += float((piece - mean).square().sum()) * self.scale**2
                l0 += len(codes.value)
        self.dictionary.train()
        return {"val_fvu": round(error / spread, 6), "val_l0": round(l0 / len(x), 6)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next step depends on, as tensors and as plain data."""
        tensors = {f"dictionary.{name}": x for name, x in self.dictionary.state_dict().items()}
        for name, parameter in self._updated.items():
            tensors |= {f"adam.{name}.{key}": x for key, x in self.optimizer.state[parameter].items()}
        tensors |= {"since_fired": self.since_fired, "fire_count": self.fire_count}
        tensors |= {f"random.{i}": state for i, state in enumerate(self._random)}
        numbers = {name: getattr(self, name) for name in _NUMBERS} | {"sums": self._sums, "n_sums": self._n_sums}
        return tensors, numbers

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Take up a state.

        Raises:
            ConfigError: it is of training on other activations.
            KeyError, RuntimeError: it is not one of this trainer.
        """
        for name in ("scale", "variance"):
            if not math.isclose(numbers[name], getattr(self, name), rel_tol=1e-4):
                raise ConfigError(
                    f"the activations of {self.hook!r} are not those the run was trained on: their {name} is "
                    f"{getattr(self, name):.6g}, it was {numbers[name]:.6g}"
                )
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


def _choose_hook(config: TrainConfig, source: Source) -> str:
    """The hook to train on; ConfigError when there are several and none is named."""
    if config.hook is not None:
        source.d_in(config.hook)
        return config.hook
    if len(source.hooks) > 1:
        raise ConfigError(f"the activations come from several hooks; say which: hook = one of {', '.join(source.hooks)}")
    return source.hooks[0]
