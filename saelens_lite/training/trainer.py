"""The state of one dictionary in training: parameters, optimiser and counters, the step that updates them, save and restore."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelens_lite.arrays import not_finite
from saelens_lite.cache import Batch, Source, Statistics
from saelens_lite.cache.source import UNNAMED
from saelens_lite.codes import gpu, parallel
from saelens_lite.codes.encoder import Spare
from saelens_lite.codes.parallel import ALL_HERE, Layout
from saelens_lite.config import TrainConfig
from saelens_lite.devices import asynchronous, outside_models, where_float64_is, wide
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, NonFiniteError, PluginError, ShapeError, SourceChangedError
from saelens_lite.files import check_fits_memory, shortened
from saelens_lite.keys import usual_reads
from saelens_lite.ports import Hooks, Port, apart, together
from saelens_lite.processes import ALONE
from saelens_lite.sparsity import PenaltyConfig, Sparsity
from saelens_lite.training.calibration import fire_rarely_, scale_encoder_
from saelens_lite.training.control import L0Control
from saelens_lite.training.kl import Divergence, check_kl, with_kl
from saelens_lite.training.optimizer import Adam
from saelens_lite.training.sharding import OwnLatents
from saelens_lite.training.step import DenseStep, SparseStep
from saelens_lite.training.unfolding import unfold_into
from saelens_lite.training.watch import MOST_UNREAD, Watch

log = logging.getLogger(__name__)

DEAD_EVERY = 16  # steps between two lists of the dead latents on a GPU, for which the host has to wait
NORM, SMALLEST, FIRED, ACTIVATIONS = OWN = (":norm", ":smallest", ":fired", ":activations")  # beside the names of losses
_NUMBERS = ("scales", "target_scales", "variance", "n_seen", "n_steps", "fire_tokens", "first_seen", "first_step")


class Contribution(NamedTuple):
    """The losses and counts of one batch, which `Trainer.update` needs besides the gradients.

    If several processes share the training, these are of all their rows, and `fires` is of the latents of this one. The losses
    are means over the rows; the last, "loss", is their sum. The gradients are in `grad` of the parameters.
    """

    step: DenseStep
    losses: dict[str, Float[Tensor, ""]]
    smallest: Float[Tensor, ""]  # of the codes
    fires: Int[Tensor, " n_latents"]  # number of rows in which each latent fires
    n_fired: Int[Tensor, ""]  # pairs that fire
    n: int  # rows
    excess: Float[Tensor, ""] | None  # mean by which pre-activations exceed thresholds, if a target L0 is aimed at


class Trainer:
    """The state of one dictionary in training.

    The activations of each port are multiplied by a number before the dictionary sees them: `scales` for its read ports,
    `target_scales` for its write ports. If these are other ports, no bias of the dictionary centres its input, so `shift` is
    subtracted from it. `result` folds scales and shift into the weights.

    Args:
        layout: the processes that share the training. Each then calls the same methods in the same order, with its rows of
            each batch. By default this process has all rows and latents.
    """

    step_class: type[DenseStep] = SparseStep

    def __init__(self, config: TrainConfig, source: Source, device: str | torch.device = "cpu", layout: Layout = ALL_HERE):
        self.config, self.layout = config, layout
        self.hooks = choose_hooks(config, source)
        check_kl(config, source, self.hooks)
        moments = {hook: _moments(source, hook) for hook in self.hooks.all}
        is_same = self.hooks.reads == self.hooks.writes
        scale_of = {hook: self._scale_of(*both, around_mean=not is_same) for hook, both in moments.items()}
        self.scales = [scale_of[hook] for hook in self.hooks.reads]
        self.target_scales = [scale_of[hook] for hook in self.hooks.writes]
        self.variance = sum(scale_of[hook] ** 2 * moments[hook][1] for hook in self.hooks.writes)
        means = {hook: statistics.mean * scale_of[hook] for hook, (statistics, _) in moments.items()}
        self.shift = None if is_same else together(means, self.hooks.reads).to(device)
        self._cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
        self._random = [torch.Generator(d).manual_seed(config.seed).get_state() for d in ("cpu", *self._cuda)]
        self._make = partial(
            Dictionary.create,
            config.sparsity,
            reads=_ports(source, self.hooks.reads),
            writes=None if is_same else _ports(source, self.hooks.writes),
            d_sae=config.d_sae,
            skip=config.skip,
            options=config.options,
            seed=config.seed,
            origin=source.origin(self.hooks.reads[0]),
        )
        with self._own_randomness():
            self.dictionary = self._make()
        self.latents = OwnLatents(self.dictionary, layout.latents)
        self.latents.cut_(self.dictionary)
        self.dictionary.to(device).train()
        self.dictionary.b_dec.data.copy_(together(means, self.hooks.writes))
        with torch.no_grad():
            self.dictionary.rule.after_step(self.dictionary)
        by_itself = gpu.has_bfloat16(self.dictionary.W_enc.device)
        self.halves = {"auto": by_itself, "float32": False, "bfloat16": True}[config.encoder_precision]
        self.reads_later = asynchronous(self.dictionary.W_enc)
        rule = self.dictionary.rule
        in_kernel = gpu.available(self.dictionary.W_enc) and type(rule).after_step is Sparsity.after_step
        is_unit = rule.unit_decoder and in_kernel and len(self.dictionary.writes) == 1  # the kernel knows no ports
        self._after_step = not in_kernel or (
            rule.unit_decoder and not is_unit
        )  # else the optimiser does all that the rule would
        self.optimizer = Adam(
            self.dictionary,
            self.peak_lr,
            config.betas,
            halves=self.halves and in_kernel,
            unit_decoder=is_unit,
        )
        self.control: L0Control | None = None
        if isinstance(rule.config, PenaltyConfig) and rule.target_l0 is not None:
            self.control = L0Control(rule.config.first_coefficient, rule.target_l0, self.dictionary.W_enc.device)
        self.n_seen = self.first_seen = 0
        self.n_steps = self.first_step = 0  # the schedule begins at first_step, which is not 0 if a finished run is extended
        self.kl_from: int | None = None  # number of the first batch whose loss has KL
        self.kl_after: int | None = None  # tokens before it
        self._is_untrained = True
        self.since_fired = torch.zeros(self.latents.n, dtype=torch.long, device=device)
        self.fire_count = torch.zeros(self.latents.n, dtype=torch.long, device=device)
        self.fire_tokens = 0
        self._sums: dict[str, float] = {}
        self._n_sums = 0
        self._watch, self._unread = Watch(self.dictionary.W_enc.device), []  # of each unread step, the rows and those counted
        self._dead: Bool[Tensor, " d_sae"] | None = None
        self._dead_latents: Int[Tensor, " n_dead"] | None = None
        self._n_dead: int | None = None  # on all devices, if they hold different latents

    @property
    def done(self) -> bool:
        """True once the dictionary has seen n_tokens tokens."""
        return self.n_seen >= self.config.n_tokens

    @property
    def progress(self) -> float:
        """The share of the schedule that is done."""
        return (self.n_seen - self.first_seen) / (self.config.n_tokens - self.first_seen)

    @property
    def kl_is_due(self) -> bool:
        """True before the first step whose loss has KL."""
        return self.kl_from is None and self._is_last_share

    @property
    def _is_last_share(self) -> bool:
        """True if the next batch, of full size, is nearer to the last kl_share of the tokens than not, or is the last."""
        c = self.config
        begin = c.n_tokens - c.kl_share * (c.n_tokens - self.first_seen)
        return bool(c.kl_share) and (self.n_seen + c.batch_size / 2 > begin or self.n_seen + c.batch_size >= c.n_tokens)

    def note_phase(self, number: int) -> None:
        """Begin the last share of the tokens with batch `number` if it is due."""
        if self.kl_is_due:
            self.kl_from, self.kl_after = number, self.n_seen
            log.info("KL is part of the loss of %s from batch %d on", self.described, number)

    @property
    def scheduled_steps(self) -> int:
        """The number of steps of the schedule."""
        return math.ceil((self.config.n_tokens - self.first_seen) / self.config.batch_size)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        c = self.config
        return c.peak_lr(self.dictionary.d_in, self.dictionary.rule.lr_factor(c.batch_size))

    def lr_at(self, progress: float) -> float:
        """Return the learning rate at a share of the training: linear warm-up, plateau, linear decay to zero."""
        c = self.config
        rise = progress / c.warmup if c.warmup else 1.0
        fall = (1 - progress) / c.decay if c.decay else 1.0
        return self.peak_lr * max(0.0, min(1.0, rise, fall))

    def _scale_of(self, statistics: Statistics, variance: float, around_mean: bool) -> float:
        """Return the number that gives activations, or their difference from the mean, an RMS norm of sqrt(d)."""
        if self.config.normalize == "none":
            return 1.0
        return len(statistics.mean) ** 0.5 / (variance**0.5 if around_mean else statistics.rms_norm)

    def _prepare(self, batch: Batch) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """Return the input and the target of the dictionary: scaled activations, with the shift subtracted from the input."""
        weight = self.dictionary.W_dec

        def scaled(hooks: Sequence[str], scales: Sequence[float]) -> Float[Tensor, "batch d"]:
            parts = zip(hooks, scales, strict=True)
            return together([batch[hook].to(weight.device, weight.dtype) * scale for hook, scale in parts])

        x = scaled(self.hooks.reads, self.scales)
        return (x, x) if self.shift is None else (x - self.shift, scaled(self.hooks.writes, self.target_scales))

    def _raw(self, x_hat: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """Return a scaled reconstruction as raw activations."""
        parts = apart(x_hat, self.dictionary.writes)
        return together([part / scale for part, scale in zip(parts, self.target_scales, strict=True)])

    @outside_models()
    def step(
        self, batch: Batch | Float[Tensor, "batch d_in"], spare: Spare | None = None, divergence: Divergence | None = None
    ) -> None:
        """Take one optimiser step on raw activations: `calibrate` before the first step, then `backward`, then `update`.

        After an error the parameters are those before the step. On a GPU the host does not wait for a step, so the error may
        come some steps later, at the latest from `check`. The parameters are still those before the bad step.

        Args:
            batch: the activations of every hook that the dictionary reads or writes, by name; a tensor if there is only one.
            spare: memory that the steps of a loop share.
            divergence: KL as a function of the raw x̂, for a loss that has it; see `saelens_lite.training.kl`.

        Raises:
            ShapeError: the activations of a hook are missing.
            PluginError: the sparsity rule gives negative codes.
            NonFiniteError: the activations, the loss or a gradient are NaN or infinite.
        """
        if self.n_steps == 0 and self._is_untrained:
            self.calibrate(batch)
        self.update(self.backward(batch, spare, divergence))

    def calibrate(self, batch: Batch | Float[Tensor, "batch d_in"]) -> None:
        """Scale the untrained encoder so that it reconstructs the first batch best."""
        x = self.layout.rows.cat(self._prepare(self._named(batch))[0])
        with self._own_randomness(), parallel.using(self.layout._replace(rows=ALONE, everyone=self.layout.latents)):
            if self.control:
                fire_rarely_(self.dictionary, x, self.control.target)
            if not self.dictionary.rule.tied and self.shift is None:
                scale_encoder_(self.dictionary, x, and_thresholds=self.control is not None)

    @outside_models()
    def backward(
        self, batch: Batch | Float[Tensor, "batch d_in"], spare: Spare | None = None, divergence: Divergence | None = None
    ) -> Contribution:
        """Compute the losses of a batch, put their gradients into `grad` of the dictionary's parameters, and return the losses.

        Raises:
            PluginError: the rule calls a loss "loss", or "kl" beside a divergence, which are names of other numbers.
            ShapeError: the activations of a hook are missing.
        """
        c = self.config
        progress = self.progress
        self.find_dead()
        with self._own_randomness(), parallel.using(self.layout):
            step = self.step_class(
                self.dictionary,
                *self._prepare(self._named(batch)),
                dead=self._dead,
                dead_latents=self._dead_latents,
                n_dead=self._n_dead,
                progress=progress,
                warmup=min(1.0, progress / c.sparsity_warmup) if c.sparsity_warmup and not self.first_seen else 1.0,
                coefficient=self.control and self.control.coefficient,
                halves=self.halves,
                spare=spare,
                rounded=self.optimizer.rounded,
                input_bias=self._input_bias(),
            )
            losses = step.losses()
            for name in ("loss", "kl") if divergence else ("loss",):
                if name in losses:
                    raise PluginError(
                        f"the rule {c.sparsity} calls a loss {name!r}, which is the name of another number; choose another"
                    )
            total = torch.stack(list(losses.values())).sum()
            if divergence is not None:
                losses, total = with_kl(losses, divergence(self._raw(step.x_hat)), c.kl_coefficient)
            losses["loss"] = total
            self.dictionary.zero_grad(set_to_none=True)
            losses["loss"].backward()
            self._share_gradients(step)
            codes, rows = step.codes.detach(), self.layout.rows
            smallest = parallel.least(codes.value)
            fires = rows.sum(codes.fire_counts)
            means = rows.sum(torch.stack([loss.detach() for loss in losses.values()])) / rows.world
            return Contribution(
                step=step,
                losses=dict(zip(losses, means.unbind(), strict=True)),
                smallest=torch.where(smallest.isinf(), 0.0, smallest),
                fires=fires,
                n_fired=self.layout.latents.sum(fires.sum()),
                n=len(step.x) * rows.world,
                excess=self.dictionary.rule.excess(codes) if self.control else None,
            )

    def _input_bias(self) -> Float[Tensor, " d_in"] | None:
        """Return a copy of the input bias, whose gradient is of the latents of this process; None if it has all latents."""
        bias = self.dictionary.input_bias
        return bias.detach().requires_grad_() if self.latents.is_part and bias is not None else None

    def _share_gradients(self, step: DenseStep) -> None:
        """Add up the gradients of the input bias over the latents, and average all gradients over the rows."""
        d, rows = self.dictionary, self.layout.rows
        if self.latents.is_part and d.input_bias is not None:
            d.b_dec.grad += self.layout.latents.sum(step.input_bias.grad)
        for name, parameter in d.named_parameters():
            if rows.world > 1 and parameter.grad is not None:
                g = parameter.grad.T if name == "W_enc" else parameter.grad
                g = rows.sum(g) / rows.world
                parameter.grad = g.T if name == "W_enc" else g

    def _norm_of_gradient(self) -> Float[Tensor, ""]:
        """Return the norm of the gradient over all latents."""
        gradients = {name: p.grad for name, p in self.dictionary.named_parameters() if p.grad is not None}
        if not self.latents.is_part:
            return torch.nn.utils.get_total_norm(gradients.values())
        parts = [
            [g for name, g in gradients.items() if self.latents.divides(f"dictionary.{name}") is kind] for kind in (True, False)
        ]
        own, common = (torch.nn.utils.get_total_norm(part) for part in parts)
        return (self.layout.latents.sum(own.square()) + common.square()).sqrt()

    def find_dead(self, now: bool = False) -> None:
        """Find the latents that have not fired for `dead_after` tokens: before each step, or on a GPU before some.

        now: do so in any case.
        """
        if not self.reads_later:
            self._dead = self.since_fired >= self.config.dead_after
            if self.latents.is_part:
                self._n_dead = int(self.latents.team.sum(self._dead.sum()))
        elif now or self._dead is None or self.n_steps % DEAD_EVERY == 0:
            self._list_dead(self.since_fired >= self.config.dead_after)

    def _list_dead(self, dead: Bool[Tensor, " n_latents"]) -> None:
        self._dead, self._dead_latents = dead, dead.nonzero().squeeze(1)
        self._n_dead = int(self.latents.team.sum(dead.sum()))

    def _named(self, batch: Batch | Float[Tensor, "batch d_in"]) -> Batch:
        if isinstance(batch, Tensor):
            batch = {self.hooks.reads[0]: batch}
        if missing := [hook for hook in self.hooks.all if hook not in batch]:
            raise ShapeError(f"the batch lacks the activations of {', '.join(missing)}; this dictionary needs {self.hooks}")
        return batch

    @torch.no_grad()
    def update(self, computed: Contribution) -> None:
        """Update the parameters with the gradients in `grad`, let the rule adjust its state, and count the latents that fired.

        Raises:
            PluginError, NonFiniteError: as in `step`.
        """
        c, done = self.config, self.n_steps - self.first_step
        norm = self._norm_of_gradient()
        self._note(computed, norm)
        if not self.reads_later:
            self.check(computed)
        lr = self.lr_at((done + 0.5) / self.scheduled_steps) if self.kl_from is None else self._kl_lr(computed.n)
        self.optimizer.step(
            lr,
            done + 1,
            (norm / c.clip_grad_norm).clamp(min=1.0) if c.clip_grad_norm else None,  # the optimiser divides while it reads
            self._watch.stopped if self.reads_later else None,
        )
        with self._own_randomness(), parallel.using(self.layout):
            self._observe(computed.step)
            if self._after_step:
                self.dictionary.rule.after_step(self.dictionary)
        self.optimizer.free_gradients()
        if self.control:
            self._aim(computed, lr)
        computed.step.release()
        self._count(computed.n, computed.fires)
        if len(self._unread) >= MOST_UNREAD:
            self.check()

    def _kl_lr(self, n: int) -> float:
        """Return the learning rate of a step on n tokens of whole rows, by tokens because such batches differ in size."""
        middle = self.progress + n / 2 / (self.config.n_tokens - self.first_seen)
        return self.config.kl_lr * self.lr_at(min(1.0, middle))

    def _aim(self, computed: Contribution, lr: float) -> None:
        """Adjust the coefficient of the penalty, and late in training the thresholds, to reach the target L0."""
        is_late, stopped = self.progress > 0.5, self._watch.stopped if self.reads_later else None
        l0, lr_share = computed.n_fired / computed.n, lr / self.peak_lr
        u = self.control.update(l0, lr_share, self.scheduled_steps, is_late, stopped)
        if is_late:
            by = u * computed.excess
            by = by if stopped is None else torch.where(stopped, 0.0, by)  # the excess may be NaN
            self.dictionary.rule.raise_thresholds_(self.dictionary, by.expand(self.latents.n))

    def _note(self, computed: Contribution, norm: Float[Tensor, ""]) -> None:
        """Note the numbers of a step that the host reads now or later."""
        own = {NORM: norm, SMALLEST: computed.smallest, FIRED: computed.n_fired}
        if self.reads_later or self.layout.everyone.world > 1:  # the batch is gone by then, or other processes have more rows
            own[ACTIVATIONS] = self.layout.rows.sum(computed.step.x.sum() + computed.step.target.sum())
        dtype = norm.dtype if self.reads_later else torch.float64  # of a count, float32 keeps 24 bits
        self._watch.note({name: x.to(dtype) for name, x in (computed.losses | own).items()}, computed.smallest)
        self._unread.append((computed.n, computed.n if self._is_late(computed.n) else 0))

    def check(self, computed: Contribution | None = None) -> None:
        """Read the numbers of the steps since the last reading, and add them to the sums that the log averages.

        computed: the contribution of the last step, if it is at hand, to name the cause.

        Raises:
            PluginError, NonFiniteError: as in `step`.
        """
        steps, unread, self._unread = self._watch.read(), self._unread, []
        for i, figures in enumerate(steps):
            is_finite = all(map(math.isfinite, figures.values()))
            if not is_finite or figures[SMALLEST] < 0:
                self._take_back(unread[i:])
            if not is_finite:
                raise self._diverged(figures, computed)
            self.dictionary.rule.check_codes(figures.pop(SMALLEST))
            figures["l0"] = figures.pop(FIRED) / unread[i][0]
            for name, value in figures.items():
                if name not in (NORM, ACTIVATIONS):
                    self._sums[name] = self._sums.get(name, 0.0) + value
            self._n_sums += 1

    def _take_back(self, unread: list[tuple[int, int]]) -> None:
        """Begin to watch anew, and do not count a bad step and the later ones, which have changed nothing."""
        self._watch = Watch(self.dictionary.W_enc.device)
        if self.reads_later:  # else the bad step is not counted yet
            self.n_steps -= len(unread)
            self.n_seen -= sum(n for n, _ in unread)
            self.fire_tokens -= sum(n for _, n in unread)

    def _observe(self, step: DenseStep) -> None:
        """Let the rule update its running estimates, unless a bad step has stopped the training."""
        rule = self.dictionary.rule
        before = [buffer.clone() for buffer in rule.buffers()] if self.reads_later else []
        rule.observe(step)
        for buffer, old in zip(rule.buffers() if before else (), before, strict=True):
            buffer.copy_(torch.where(self._watch.stopped, old, buffer))

    @property
    def described(self) -> str:
        """The rule, the hooks and the progress of training, for messages."""
        return f"{self.config.sparsity} on {self.hooks} (after {self.n_seen:,} tokens)"

    def _diverged(self, figures: dict[str, float], computed: Contribution | None) -> NonFiniteError:
        """Return an error that names the first thing that became NaN or infinite.

        That is the data, a parameter, a part of the loss, or a gradient.
        """
        parameters = dict(self.dictionary.named_parameters())
        bad = {name for name, value in figures.items() if not math.isfinite(value)}
        parts = [name for name in figures if name in bad and name not in ("loss", *OWN)]
        gradients = {name: p.grad for name, p in parameters.items() if computed is not None and p.grad is not None}
        step, in_activations = self.n_steps + 1, ACTIVATIONS in bad
        if computed is not None:
            bad_rows = not_finite({"x": computed.step.x, "target": computed.step.target})
            in_activations = self.layout.rows.any(bool(bad_rows))
        if in_activations:
            cause = "the activations"
        elif names := not_finite(parameters):
            cause, step = ", ".join(names), self.n_steps
        elif parts:
            cause = f"the loss ({', '.join(parts)})"
        elif names := not_finite(gradients):
            cause = f"the gradient of {', '.join(names)}"
        else:
            cause = "the sum of the losses, or the norm of the gradient,"
        error = NonFiniteError(f"{cause} became NaN or infinite in step {step}, {self.described}")
        error.in_activations = in_activations
        return error

    def _is_late(self, n: int) -> bool:
        """Return whether the next n tokens count for the firing frequencies."""
        early = (1 - max(self.config.decay, 0.1)) * (self.config.n_tokens - self.first_seen)
        return self.n_seen + n > self.first_seen + early

    def _count(self, n: int, counts: Int[Tensor, " d_sae"]) -> None:
        """Update the counters: tokens since each latent fired, and firing frequencies."""
        since = torch.where(counts > 0, 0, self.since_fired + n)
        if self.reads_later:
            since, counts = torch.where(self._watch.stopped, self.since_fired, since), counts * ~self._watch.stopped
        self.since_fired = since
        if self._is_late(n):
            self.fire_count += counts
            self.fire_tokens += n
        self.n_seen += n
        self.n_steps += 1

    def log_line(self) -> dict[str, Any]:
        """Return the progress and the means since the last line, and begin new means. Losses are of scaled activations."""
        self.check()
        means = {name: value / self._n_sums for name, value in self._sums.items()}
        self._sums, self._n_sums = {}, 0
        return {
            "step": self.n_steps,
            "tokens": self.n_seen,
            **{name: round(value, 6) for name, value in means.items()},
            "fvu": round(means["mse"] / self.variance, 6),
            "dead": round(self._count_dead() / self.config.d_sae, 6),
            "lr": self.optimizer.lr,
            **({"coefficient": round(float(self.control.coefficient), 6)} if self.control else {}),
        }

    def _count_dead(self) -> int:
        return int(self.latents.team.sum((self.since_fired >= self.config.dead_after).sum()))

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Use the trainer's own random state in a block, so that no other code of the process affects the rule's draws."""
        with torch.random.fork_rng(self._cuda):
            torch.set_rng_state(self._random[0])
            for device, state in zip(self._cuda, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            try:
                yield
            finally:
                self._random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._cuda)]

    @outside_models()
    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, float]:
        """Return val_fvu = Σ‖y − ŷ‖² / Σ‖y − mean‖² and val_l0 on raw activations that were kept out of training.

        y are the activations at the write ports, each port scaled as in training.
        """
        self.dictionary.eval()
        targets, n = {hook: batch[hook] for hook in self.hooks.writes}, len(batch[self.hooks.reads[0]])
        means = {hook: where_float64_is(x).mean(0, dtype=torch.float64) for hook, x in targets.items()}
        error = spread = 0.0
        l0 = 0
        alike = self.layout._replace(rows=ALONE, everyone=self.layout.latents)  # processes with other rows do the same
        with self._own_randomness(), parallel.using(alike):
            for start in range(0, n, self.config.batch_size):
                piece = {hook: batch[hook][start : start + self.config.batch_size] for hook in self.hooks.all}
                x, target = self._prepare(piece)
                codes = self.dictionary.encode(x)
                x_hat = parallel.over_latents(codes.decode(self.dictionary.W_dec)) + self.dictionary.base(x)
                squares = (target - x_hat).square()
                error += float(where_float64_is(squares).sum(dtype=torch.float64))
                for hook, scale in zip(self.hooks.writes, self.target_scales, strict=True):
                    spread += float((where_float64_is(piece[hook]) - means[hook]).square().sum()) * scale**2
                l0 += int(parallel.total(codes.fires.sum()))
        self.dictionary.train()
        return {"val_fvu": round(error / spread, 6) if spread else math.nan, "val_l0": round(l0 / n, 6)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that the next step depends on, as tensors and as plain data.

        Tensors with an entry for each latent have those of this process; see `latents.divides`.
        """
        self.check()
        tensors = {f"dictionary.{name}": x for name, x in self.dictionary.state_dict().items()}
        for name, parameter in self.optimizer.parameters.items():
            tensors |= {f"adam.{name}.{key}": x for key, x in self.optimizer.state[parameter].items()}
        tensors |= {"since_fired": self.since_fired, "fire_count": self.fire_count}
        if self.control:
            tensors["control"] = self.control.state
        if self.reads_later and self._dead is not None:
            tensors["dead"] = self._dead
        tensors |= {f"random.{i}": state for i, state in enumerate(self._random)}
        if self.shift is not None:
            tensors["shift"] = self.shift
        numbers = {name: getattr(self, name) for name in _NUMBERS} | {"sums": self._sums, "n_sums": self._n_sums}
        numbers |= {} if self.kl_from is None else {"kl_from": self.kl_from, "kl_after": self.kl_after}
        return tensors, numbers

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Replace the state of this trainer by one that `state` returned, with the tensors of all latents.

        Raises:
            SourceChangedError: the state is of training on other activations.
            ConfigError, KeyError, RuntimeError: the state does not fit this trainer.
        """
        for name in ("scales", "target_scales", "variance"):
            own, wanted = np.atleast_1d(getattr(self, name)), np.atleast_1d(numbers[name])
            if own.shape != wanted.shape or not np.allclose(own, wanted, rtol=1e-4, atol=0):
                raise SourceChangedError(
                    f"the activations of {self.hooks} are not those the run was trained on: {name} is "
                    f"{getattr(self, name)}, but was {numbers[name]} in the run"
                )
        if self.shift is not None:
            if not torch.allclose(self.shift.cpu(), tensors["shift"].cpu(), rtol=1e-3, atol=1e-3):
                raise SourceChangedError(
                    f"the activations of {self.hooks} are not those the run was trained on: their mean differs"
                )
            self.shift.copy_(tensors["shift"])
        tensors = {name: self.latents.own(name, x) for name, x in tensors.items()}
        self._check_tensors(tensors, numbers)
        state = self.dictionary.state_dict()
        for name, x in state.items():
            x.copy_(tensors[f"dictionary.{name}"])
        for name, parameter in self.optimizer.parameters.items():
            moments = {key.rsplit(".", 1)[1]: x for key, x in tensors.items() if key.startswith(f"adam.{name}.")}
            self.optimizer.state[parameter] = {
                key: x.to(parameter.device, copy=self.latents.is_part) for key, x in moments.items()
            }
        self._watch, self._unread = Watch(self.dictionary.W_enc.device), []
        self._dead = self._dead_latents = self._n_dead = None
        if self.reads_later and "dead" in tensors:
            self._list_dead(tensors["dead"].to(self.since_fired.device))
        self.since_fired.copy_(tensors["since_fired"])
        self.fire_count.copy_(tensors["fire_count"])
        if self.control:
            self.control.state = tensors["control"].to(self.control.state.device)
        self._random = [tensors.get(f"random.{i}", state) for i, state in enumerate(self._random)]  # a GPU's is new after a CPU
        for name in _NUMBERS:
            setattr(self, name, numbers.get(name, 0))  # older checkpoints have no first_seen and first_step
        self._sums, self._n_sums = numbers["sums"], numbers["n_sums"]
        self.kl_from, self.kl_after = numbers.get("kl_from"), numbers.get("kl_after")

    def start_from(self, dictionary: Dictionary, n_seen: int = 0, n_steps: int = 0, coefficient: float | None = None) -> None:
        """Start from the parameters of a dictionary of raw activations, with new moments.

        Args:
            n_seen, n_steps: the length of its training, if this training extends it. A new schedule begins there, in which
                penalties have their full weight at once.
            coefficient: that of the penalty at the end of its training, if it was adjusted.

        Raises:
            ConfigError: the parameters do not fit.
        """
        begun = self.dictionary
        if self.latents.is_part:
            with torch.random.fork_rng(self._cuda):
                torch.manual_seed(self.config.seed)  # as in the beginning
                begun = self._make().to(self.dictionary.W_dec.device)
        unfold_into(begun, dictionary, self.scales, self.target_scales, self.shift)
        if begun is not self.dictionary:
            self.latents.cut_(begun)
            self.dictionary.load_state_dict(begun.state_dict())
        self.n_seen = self.first_seen = n_seen
        self.n_steps = self.first_step = n_steps
        self._is_untrained = False
        if self.control and coefficient:
            self.control.state[0] = math.log(coefficient)

    def stretch(self, n_tokens: int) -> None:
        """Train on to a new total of tokens. The schedule is stretched, and firing frequencies are counted anew.

        A last share with KL that has begun ends, and begins again in the last share of the new total.
        """
        self.config = self.config.replace(n_tokens=n_tokens)
        if not self._is_last_share:
            self.kl_from = self.kl_after = None
        self.fire_count.zero_()
        self.fire_tokens = 0

    def _check_tensors(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Raise ConfigError unless names, shapes and dtypes are those of this trainer; `copy_` would broadcast other shapes."""
        like = {f"dictionary.{name}": x for name, x in self.dictionary.state_dict().items()}
        for name, parameter in self.optimizer.parameters.items():
            if any(key.startswith(f"adam.{name}.") for key in tensors):  # it had a gradient
                moments = {"exp_avg": parameter, "exp_avg_sq": parameter, "step": torch.zeros(())}
                like |= {f"adam.{name}.{key}": x for key, x in moments.items()}
        like |= {"since_fired": self.since_fired, "fire_count": self.fire_count}
        if self.control:
            like["control"] = self.control.state
        like |= {f"random.{i}": x for i, x in enumerate(self._random) if i == 0 or f"random.{i}" in tensors}
        like |= {} if self.shift is None else {"shift": self.shift}
        like |= {"dead": self.since_fired > 0} if "dead" in tensors else {}  # of a run on a GPU
        other_devices = {name for name in tensors if name.startswith("random.")}
        names = shortened(like.keys() ^ (tensors.keys() - (other_devices - like.keys())))
        if names != "none":
            raise ConfigError(f"the checkpoint does not fit this run: missing or not expected: {names}")
        for name, x in like.items():
            if (saved := tensors[name]).shape != x.shape or saved.dtype != x.dtype:
                wanted = f"{tuple(x.shape)} {x.dtype}"
                raise ConfigError(
                    f"the checkpoint does not fit this run: {name} is {tuple(saved.shape)} {saved.dtype}, expected {wanted}"
                )
        for name, most in (("since_fired", numbers["n_seen"]), ("fire_count", numbers["fire_tokens"])):
            if not ((tensors[name] >= 0) & (tensors[name] <= most)).all():
                raise ConfigError(f"the checkpoint does not fit this run: {name} is below 0 or above {most}")
        for i, device in enumerate(("cpu", *self._cuda)):
            if (state := tensors.get(f"random.{i}")) is not None:
                torch.Generator(device).set_state(state)  # RuntimeError if the bytes are not a state

    @torch.no_grad()
    def result(self) -> Dictionary:
        """Return a copy of the dictionary for raw activations, with scales, shift and decoder norms folded in."""
        d = self.dictionary
        rule = type(d.rule)(d.rule.config, d_in=d.d_in, d_sae=d.d_sae)
        density = self.latents.whole("fire_count", self.fire_count).float() / self.fire_tokens if self.fire_tokens else None
        record = {"config": self.config.model_dump(mode="json"), "tokens": self.n_seen, "steps": self.n_steps}
        record |= {} if self.kl_after is None else {"kl_after": self.kl_after}
        kept = {"d_sae": d.d_sae, "skip": d.W_skip is not None, "origin": d.origin}
        copy = Dictionary(rule, **d.ports, **kept, density=density, training=record)
        state = {name: self.latents.whole(f"dictionary.{name}", x) for name, x in d.state_dict().items()}
        copy.to(d.W_enc.device).load_state_dict(state)
        copy.fold_decoder_norms_()
        if self.shift is not None:
            copy.fold_shift_(self.shift)
        return copy.fold_scales_(self.scales, self.target_scales).eval()


def check_sizes(config: TrainConfig, source: Source, tensors: dict[str, Tensor]) -> None:
    """Check the sizes of a checkpoint, from which all that a trainer allocates follows.

    Raises:
        ConfigError: the weights do not fit the widths of the source.
        CorruptFileError: a batch does not fit into memory.
    """
    hooks = choose_hooks(config, source)
    d_in, d_out = (sum(map(source.d_in, side)) for side in hooks)
    for name, wanted in {"W_dec": (config.d_sae, d_out), "W_enc": (d_in, config.d_sae)}.items():
        if (weight := tensors.get(f"dictionary.{name}")) is not None and tuple(weight.shape) != wanted:
            raise ConfigError(
                f"the checkpoint does not fit the activations: {name} has shape {tuple(weight.shape)}, expected {wanted}"
            )
    check_fits_memory(f"a batch of {config.batch_size:,}", 4 * config.batch_size * (d_in + d_out))


def choose_hooks(config: TrainConfig, source: Source) -> Hooks:
    """Return the hooks that a dictionary reads and writes. By default, it reads the only hook there is, in all models.

    Raises:
        ConfigError: the source has several hooks, not one hook in several models, and the config names none; or a skip
            connection has no other write hooks.
        HookError: the source has no activations of a hook.
    """
    reads = config.reads or ((config.hook,) if config.hook else ())
    if not reads:
        reads = usual_reads([name for name in source.hooks if name not in config.writes])
        if not reads:
            raise ConfigError(f"the activations come from several hooks; choose one with hook=: {', '.join(source.hooks)}")
    hooks = Hooks(reads, config.writes or reads)
    if config.skip and hooks.reads == hooks.writes:
        raise ConfigError("skip = True needs write hooks other than the read hooks; set writes")
    for hook in hooks.all:
        source.d_in(hook)
    return hooks


def _ports(source: Source, hooks: Sequence[str]) -> tuple[Port, ...]:
    widths = {hook: source.d_in(hook) for hook in hooks}
    return tuple(Port(width=d) if hook == UNNAMED else Port.of(hook, d) for hook, d in widths.items())


def _moments(source: Source, hook: str) -> tuple[Statistics, float]:
    """Return the statistics and the variance of the activations of a hook.

    Raises:
        NonFiniteError: the activations hold NaN or infinity, or are all zero or all the same.
    """
    statistics = source.statistics(hook)
    if not math.isfinite(statistics.rms_norm):
        raise NonFiniteError(f"the activations of {hook!r} hold NaN or infinity; nothing was trained")
    if not statistics.rms_norm > 0:
        raise NonFiniteError(f"the activations of {hook!r} are all zero; there is nothing to train on")
    variance = statistics.rms_norm**2 - float(wide(statistics.mean).square().sum())
    if not variance > 1e-9 * statistics.rms_norm**2:
        raise NonFiniteError(f"the activations of {hook!r} are all the same; there is nothing to train on")
    return statistics, variance
