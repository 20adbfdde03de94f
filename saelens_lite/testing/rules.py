"""The checks of a sparsity rule. Each returns the number that it measured, or raises the fault and its remedy."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelens_lite.cache import TensorSource
from saelens_lite.codes import Support, encoder
from saelens_lite.config import TrainConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import PluginError
from saelens_lite.sparsity import Sparsity
from saelens_lite.testing.report import CheckFailed, NotChecked, Warned
from saelens_lite.testing.unordered import UnorderedSums
from saelens_lite.training import Trainer
from saelens_lite.training.step import DenseStep, SparseStep

BATCH = 48
TILE_ROWS = 5
CLOSE = 1e-6  # relative, in float64
RESERVED = {"mse", "loss", "l0", "step", "tokens", "fvu", "dead", "lr", "val_fvu", "val_l0"}  # names in use in a log line
PARALLEL = {"batch": 1024, "d_in": 64, "d_sae": 1024}  # large enough for torch to use several threads
N_PLANTED, ACTIVE = 96, 3
ROUNDING = 0.1  # of pre-activations in RoundedEncoder, in standard deviations; bfloat16's is 0.004


@dataclass
class Lab:
    """A rule, data with planted directions, and a dictionary after a few steps of training. The checks share it."""

    rule: type[Sparsity]
    name: str
    options: dict[str, Any]
    d_in: int
    d_sae: int
    planted: float | None

    @cached_property
    def directions(self) -> Float[Tensor, "n_directions d_in"]:
        """Unit vectors that the data is made of."""
        random = torch.randn(N_PLANTED, self.d_in, generator=torch.Generator().manual_seed(1))
        return torch.nn.functional.normalize(random, dim=1)

    def data(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        """Return sums of a few directions, scaled to an RMS norm of sqrt(d_in)."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(n, N_PLANTED, generator=generator).topk(ACTIVE, dim=1).indices
        strength = torch.rand(n, ACTIVE, generator=generator) + 0.5
        x = torch.zeros(n, N_PLANTED).scatter_(1, chosen, strength) @ self.directions
        return x * (self.d_in / x.square().sum(1).mean()).sqrt()

    @cached_property
    def x(self) -> Float[Tensor, "batch d_in"]:
        """Held-out activations, float64."""
        return self.data(BATCH, seed=3).double()

    def trainer(self, x: Float[Tensor, "n d_in"], d_sae: int | None = None, device: str = "cpu", **settings: Any) -> Trainer:
        """Return a new trainer on x, without scaling."""
        common = {"batch_size": len(x), "n_tokens": 10 * len(x), "warmup": 0.0, "decay": 0.0, "normalize": "none"}
        config = TrainConfig(
            sparsity=self.name, options=self.options, d_sae=d_sae or self.d_sae, **{**common, "lr": 3e-3, **settings}
        )
        return Trainer(config, TensorSource(x), device)

    @cached_property
    def trained(self) -> Dictionary:
        """A dictionary after a few steps, so that every parameter has changed."""
        x = self.data(12 * 256, seed=2)
        trainer = self.trainer(x, batch_size=256, n_tokens=len(x), dead_after=1024)
        for batch in x.split(256):
            trainer.step(batch)
        return trainer.dictionary

    def dictionary(self, training: bool = False, dtype: torch.dtype = torch.float64) -> Dictionary:
        """Return a copy of the trained dictionary that a check may change."""
        return copy.deepcopy(self.trained).to(dtype).train(training)

    def defines(self, *methods: str) -> bool:
        """Return whether the rule overrides all of these methods."""
        return all(getattr(self.rule, name) is not getattr(Sparsity, name) for name in methods)


class Reference(DenseStep):
    """A dense step whose gradients go through `activation` if the rule does not define `values`."""

    def __init__(self, dictionary: Dictionary, x: Tensor, target: Tensor | None = None, **state: Any):
        super().__init__(dictionary, x, target, **state)
        if type(dictionary.rule).values is Sparsity.values and type(dictionary.rule).activation is not Sparsity.activation:
            self.x_hat = dictionary.rule.activation(self._encoder.dense()) @ dictionary.W_dec + dictionary.base(x)


class RoundedEncoder(encoder.Encoder):
    """An encoder that chooses the support from coarse pre-activations and keeps exact values, as encoder_precision does."""

    def choose(self, rule_support: Callable[[Tensor], Support], whole: bool = False) -> Support:
        """Return the support that a rule chooses from rounded pre-activations."""
        (pre,) = self.tiles(whole=True)
        with torch.no_grad():
            return rule_support((pre + ROUNDING * pre.std() * torch.randn_like(pre)).bfloat16())


class RoundedStep(SparseStep):
    """A step that chooses the support from coarse pre-activations."""

    encoder_class = RoundedEncoder


def take_step(
    step_class: type[DenseStep],
    d: Dictionary,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"] | None = None,
    dead: Bool[Tensor, " d_sae"] | None = None,
) -> tuple[DenseStep, dict[str, Tensor]]:
    """Run a training step up to the gradients. Return it and its losses. By default every other latent counts as dead."""
    if dead is None:
        dead = torch.arange(d.d_sae) % 2 == 0
    d.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a rule may draw random numbers
        step = step_class(d, x, target, dead=dead, progress=0.5, warmup=0.75)
        losses = step.losses()
        torch.stack(list(losses.values())).sum().backward()
    return step, losses


def apart(measured: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected number."""
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return float((measured - expected).abs().max()) / max(scale, 1e-3) if expected.numel() else 0.0


def dense_codes(d: Dictionary, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """Return dense codes without gradient."""
    with torch.no_grad():
        return d.encode(x).to_dense()


@contextmanager
def small_tiles(d: Dictionary) -> Iterator[None]:
    """Make the encoder work on a few rows at a time in the block."""
    usual = encoder.TILE_BYTES, encoder.LEAST_ROWS
    encoder.TILE_BYTES, encoder.LEAST_ROWS = TILE_ROWS * d.d_sae * d.W_enc.element_size(), 1
    try:
        yield
    finally:
        encoder.TILE_BYTES, encoder.LEAST_ROWS = usual


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let torch use at least n threads in the block."""
    usual = torch.get_num_threads()
    torch.set_num_threads(max(n, usual))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


# The checks


def says_what_it_is(lab: Lab) -> str:
    """Check that the rule has a `paper` and a docstring."""
    own_doc = (lab.rule.__doc__ or "").strip()
    missing = [name for name, there in (("paper", lab.rule.paper), ("a docstring", own_doc)) if not there]
    if missing:
        raise Warned(f"{' and '.join(missing)} missing: name the source and say in a line what the rule does")
    return lab.rule.paper.partition(",")[0]


def config(lab: Lab) -> str:
    """Check that `Config()` works without arguments."""
    try:
        lab.rule.Config()
    except Exception as error:
        raise CheckFailed(f"Config() should work without arguments, but raises: {error}; give every option a default") from None
    return f"{len(lab.rule.Config.model_fields)} options"


def losses(lab: Lab) -> str:
    """Check that `losses` returns finite scalars with free names."""
    d = lab.trainer(lab.x.float()).dictionary
    step = SparseStep(d, lab.x.float(), dead=torch.arange(d.d_sae) % 2 == 0, progress=0.5, warmup=0.75)
    losses = d.rule.losses(step)
    taken = sorted(losses.keys() & RESERVED)
    if taken:
        raise CheckFailed(f"a loss is called {taken[0]!r}, a name that log lines already use; rename the loss")
    for name, value in losses.items():
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            shape = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise CheckFailed(
                f"loss {name!r} should be a floating-point tensor without axes, but is {shape}; take the mean over rows"
            )
        if not torch.isfinite(value):
            raise CheckFailed(f"loss {name!r} is {value.item()} on ordinary data; look for 0 · ∞, log or a power at 0")
    return ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items()) or "none beside mse"


def trains(lab: Lab) -> str:
    """Check that a few training steps work and that no code is negative, even if the support comes from rounded numbers."""
    try:
        d = lab.dictionary(training=True, dtype=torch.float32)
    except PluginError as error:
        raise CheckFailed(str(error)) from None
    step, _ = take_step(RoundedStep, d, lab.x.float())
    if len(step.codes.value) and (smallest := float(step.codes.value.detach().amin())) < 0:
        raise CheckFailed(
            f"a code is negative ({smallest:.2g}) if the support comes from rounded pre-activations, as with "
            "encoder_precision = bfloat16; end `values` with .relu()"
        )
    l0 = dense_codes(lab.dictionary(dtype=torch.float32), lab.x.float()).count_nonzero() / BATCH
    return f"L0 {l0:.1f} of {lab.d_sae} after 12 steps"


def dtypes(lab: Lab) -> str:
    """Check that a float64 step stays in float64, and that encoding works in bfloat16 and on an accelerator."""
    advice = "make tensors like those given, e.g. pre.new_zeros(…), and leave out .float()"
    try:
        step, losses = take_step(SparseStep, lab.dictionary(training=True), lab.x)
    except Exception as error:
        raise CheckFailed(f"a step in float64 raises {type(error).__name__}: {error}; {advice}") from None
    kinds = {"codes": step.codes.value.dtype, **{f"loss {name}": value.dtype for name, value in losses.items()}}
    for name, dtype in kinds.items():
        if dtype != torch.float64:
            raise CheckFailed(f"{name} of a float64 step should be float64, but is {dtype}; {advice}")
    lab.dictionary(dtype=torch.bfloat16).encode(lab.x.bfloat16())
    if not torch.cuda.is_available():
        return "float64, bfloat16; no accelerator here"
    lab.dictionary(dtype=torch.float32).cuda().encode(lab.x.float().cuda())
    return "float64, bfloat16, cuda"


def gradients(lab: Lab) -> str:
    """Check the losses and gradients of a sparse step against dense autograd in float64."""
    return _compare_steps(lab.dictionary(training=True), lab.x, "let nothing depend on pre-activations outside the support")


def gradients_in_tiles(lab: Lab) -> str:
    """Check the gradients if the encoder works on a few rows at a time."""
    d = lab.dictionary(training=True)
    with small_tiles(d):
        return _compare_steps(d, lab.x, "read all of `step.pre_tiles`, whose tiles hold a few rows each")


def transcoder(lab: Lab) -> str:
    """Check the gradients of a transcoder with a skip connection."""
    if lab.rule.tied:
        raise NotChecked("tied = True: the rule makes no transcoders")
    d_out = lab.d_in + 3
    d = Dictionary.create(lab.name, reads=lab.d_in, writes=d_out, d_sae=lab.d_sae, skip=True, options=lab.options).double()
    d.rule.load_state_dict(lab.dictionary().rule.state_dict())
    generator = torch.Generator().manual_seed(8)
    target = torch.randn(BATCH, d_out, generator=generator).double()
    d.W_skip.data.copy_(torch.randn(d.W_skip.shape, generator=generator) / lab.d_in**0.5)
    advice = "x_hat is to be step.target, not step.x, and what codes are added to is step.base()"
    try:
        return _compare_steps(d.train(), lab.x, advice, target)
    except RuntimeError as error:
        raise CheckFailed(f"a step of a transcoder raises {type(error).__name__}: {error}; {advice}") from None


def _compare_steps(
    d: Dictionary, x: Float[Tensor, "batch d_in"], advice: str, target: Float[Tensor, "batch d_out"] | None = None
) -> str:
    _, expected = take_step(Reference, d, x, target)
    wanted = {name: p.grad for name, p in d.named_parameters()}
    _, losses = take_step(SparseStep, d, x, target)
    got = {name: p.grad for name, p in d.named_parameters()}
    errors = {f"loss {name}": apart(losses[name].detach(), value.detach()) for name, value in expected.items()}
    for name, parameter in d.named_parameters():
        zeros = torch.zeros_like(parameter)
        pair = (zeros if grads[name] is None else grads[name] for grads in (got, wanted))
        errors[f"gradient of {name}"] = apart(*pair)
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= CLOSE:
        raise CheckFailed(
            f"{worst} is {errors[worst]:.1e} off dense float64 autograd (relative; expected < {CLOSE:.0e}); {advice}"
        )
    return f"largest relative error {errors[worst]:.0e}"


def row_wise(lab: Lab) -> str:
    """Check `row_wise`: in training, the support of half a batch must be that half of the batch's support."""
    d = lab.dictionary(training=True)
    wholes, halves = [], []
    for seed in (4, 5):
        x = lab.data(BATCH, seed).double()
        x[: BATCH // 2] *= 2  # the halves of a batch should differ
        wholes.append(_fires(d, x))
        halves.append(torch.cat([_fires(d, half) for half in x.split(BATCH // 2)]))
    differ = sum(int((whole != half).sum()) for whole, half in zip(wholes, halves, strict=True))
    if lab.rule.row_wise and differ:
        raise CheckFailed(
            f"row_wise = True, but {differ} pairs change if a batch is split in halves; remove row_wise, or choose row by row"
        )
    if not lab.rule.row_wise and not differ and lab.defines("values"):
        return "hint: declare row_wise = True, which saves memory; halves of a batch have the same support"
    return f"{differ} pairs change in halves of a batch, row_wise = {lab.rule.row_wise}"


def _fires(d: Dictionary, x: Float[Tensor, "batch d_in"]) -> Bool[Tensor, "batch d_sae"]:
    """Return a mask of the support in training."""
    with torch.no_grad():
        support = SparseStep(d, x, dead=torch.zeros(d.d_sae, dtype=torch.bool), progress=0.5, warmup=0.75).codes.support
    return torch.zeros(len(x), d.d_sae, dtype=torch.bool).index_put((support.row, support.latent), torch.tensor(True))


def eval_codes(lab: Lab) -> str:
    """Check that, after training, codes do not depend on the rest of the batch or on the order of its rows."""
    d = lab.dictionary()
    x = torch.cat([lab.x, 3 * lab.x[:8]])
    whole, order = dense_codes(d, x), torch.randperm(len(x))
    error = apart(dense_codes(d, x[order]), whole[order])
    alone = torch.cat([dense_codes(d, row) for row in x.split(1)])
    error = max(error, apart(alone, whole))
    if not error <= CLOSE:
        raise CheckFailed(
            f"codes in eval mode change by {error:.1e} (relative) with the rest of the batch; use each row alone unless "
            "self.training, e.g. by a threshold in a buffer"
        )
    return f"single rows and other orders: within {error:.0e}"


def definitions(lab: Lab) -> str:
    """Check that `activation` gives the same codes as `support` with `values`.

    For a support from rounded numbers, compare with `activation` after all pre-activations off the support are made very low.
    """
    if not lab.defines("activation"):
        raise NotChecked("activation is not defined")
    errors = {}
    for training in (True, False):
        d = lab.dictionary(training=training)
        with torch.no_grad():
            expected = d.rule.activation(d.pre(lab.x))
        errors["training" if training else "eval"] = apart(dense_codes(d, lab.x), expected)
    worst = max(errors, key=lambda mode: errors[mode])
    if not errors[worst] <= CLOSE:
        raise CheckFailed(
            f"in {worst} mode, codes by support and values are {errors[worst]:.1e} (relative) off activation; make them agree, "
            "or leave out the one not needed"
        )
    if lab.defines("values"):
        d = lab.dictionary(training=True)
        with torch.no_grad():
            codes = d.rule.encode(RoundedEncoder(d.W_enc, d.b_enc, d.input_bias, lab.x))
            pre = d.pre(lab.x)
            at = codes.row, codes.latent
            alone = torch.full_like(pre, -1e3 * float(pre.abs().max())).index_put(at, pre[at])
            error = apart(codes.value, d.rule.activation(alone)[at])
        if not error <= CLOSE:
            raise CheckFailed(
                f"codes by values are {error:.1e} (relative) off activation if the support comes from rounded "
                "pre-activations, as with encoder_precision = bfloat16; `values` should return the same as `activation` for "
                "its pre-activations, 0 below the threshold"
            )
    return f"the same codes within {errors[worst]:.0e}"


def published_form(lab: Lab) -> str:
    """Check that the published architecture, as other tools compute it, has the same codes."""
    d = lab.dictionary()
    form = d.rule.inference_form()
    if form is None:
        raise NotChecked("inference_form is not defined, so other tools cannot read its dictionaries")
    if form.architecture not in PUBLISHED:
        raise NotChecked(f"the kit has references only for {', '.join(PUBLISHED)}, not for {form.architecture!r}")
    missing = NEEDED[form.architecture] - {*form.tensors, *form.settings}
    if missing:
        raise CheckFailed(f"{form.architecture} needs {', '.join(sorted(missing))}; give it in the PublishedForm")
    with torch.no_grad():
        expected = PUBLISHED[form.architecture](d.pre(lab.x), {**form.tensors, **form.settings})
    error = apart(dense_codes(d, lab.x), expected)
    if not error <= CLOSE:
        raise CheckFailed(
            f"codes in eval mode are {error:.1e} (relative) off those of the published {form.architecture}; return None, or "
            "the architecture with the same codes"
        )
    return f"{form.architecture}, within {error:.0e}"


def _standard(h: Tensor, _form: dict[str, Any]) -> Tensor:
    return h.relu()


def _topk(h: Tensor, form: dict[str, Any]) -> Tensor:
    kth = h.topk(form["k"], dim=1).values[:, -1:]
    return h.relu() * (h >= kth)


def _jumprelu(h: Tensor, form: dict[str, Any]) -> Tensor:
    return h.relu() * (h > form["threshold"])


def _gated(h: Tensor, form: dict[str, Any]) -> Tensor:
    return (h + form["b_gate"] > 0) * (h * form["r_mag"].exp() + form["b_mag"]).relu()


PUBLISHED: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "standard": _standard, "topk": _topk, "jumprelu": _jumprelu, "gated": _gated,
}  # fmt: skip
NEEDED = {"standard": set(), "topk": {"k"}, "jumprelu": {"threshold"}, "gated": {"b_gate", "r_mag", "b_mag"}}


def folding(lab: Lab) -> str:
    """Check that decoder norms can be folded into the codes."""
    if not lab.rule.homogeneous:
        return "homogeneous = False: nothing is folded"
    d = lab.dictionary()
    d.W_dec.data.mul_(torch.linspace(0.5, 2.0, d.d_sae, dtype=d.W_dec.dtype)[:, None])
    with torch.no_grad():
        norms, codes, x_hat = d.W_dec.norm(dim=1), dense_codes(d, lab.x), d(lab.x)
        d.fold_decoder_norms_()
        error = max(apart(d(lab.x), x_hat), apart(dense_codes(d, lab.x), codes * norms))
    if not error <= CLOSE:
        raise CheckFailed(
            f"codes or x_hat are {error:.1e} (relative) off after fold_decoder_norms_; define rescale_ for tensors that are "
            "added to or compared with pre-activations, or set homogeneous = False"
        )
    return f"x_hat within {error:.0e}"


def round_trip(lab: Lab) -> str:
    """Check that saving and loading a dictionary keeps its bytes."""
    d, x = lab.dictionary(dtype=torch.float32), lab.x.float()
    with tempfile.TemporaryDirectory() as folder:
        loaded = Dictionary.load(d.save(Path(folder) / "dictionary"))
    lost = [name for name, value in d.state_dict().items() if not torch.equal(loaded.state_dict()[name], value)]
    if lost:
        raise CheckFailed(
            f"{', '.join(lost)} change when saved and loaded; inference_form must return them under their own name"
        )
    if not torch.equal(dense_codes(loaded, x), dense_codes(d, x)):
        raise CheckFailed(
            "codes change when a dictionary is saved and loaded, though its tensors do not; keep all state of the codes in "
            "parameters, buffers (register_buffer) or the Config"
        )
    return f"{len(d.state_dict())} tensors, the same codes to the bit"


def empty_and_full(lab: Lab) -> str:
    """Check that losses and gradients are finite if no latent fires and if all fire."""
    fired = {}
    x = 1 + 0.1 * torch.rand(BATCH, lab.d_in)
    for case, level in (("empty", -1.0), ("full", 1.0)):
        d = lab.dictionary(training=True, dtype=torch.float32)
        aligned = level + 0.1 * torch.rand(lab.d_sae, lab.d_in)
        d.W_dec.data.copy_(aligned)
        d.W_enc.data.copy_(aligned.T)
        d.b_dec.data.zero_()
        with torch.no_grad():
            d.rule.after_step(d)
        step, losses = take_step(SparseStep, d, x, dead=torch.full((lab.d_sae,), case == "empty"))
        fired[case] = int(step.codes.fires.sum()) / len(x)
        values = {f"loss {name}": value for name, value in losses.items()}
        values |= {f"the gradient of {name}": p.grad for name, p in d.named_parameters() if p.grad is not None}
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise CheckFailed(
                    f"{name} is NaN or infinite when {'nothing' if case == 'empty' else 'everything'} fires (L0 "
                    f"{fired[case]:.0f}); divide sums by len(step.x) instead of taking means over codes"
                )
    return f"finite at L0 {fired['empty']:.0f} and {fired['full']:.0f}"


def same_bytes(lab: Lab) -> str:
    """Check that two trainings, large enough to run in parallel, give the same bytes, and that no sum has an open order on a
    GPU.
    """
    d = lab.dictionary(training=True, dtype=torch.float32)
    with UnorderedSums() as sums:
        step, _ = take_step(SparseStep, d, lab.x.float())
        with torch.no_grad():
            d.rule.observe(step)
            d.rule.after_step(d)
    if sums.noted:
        raise CheckFailed(
            f"a step sums floats without a fixed order on a GPU, by {', '.join(dict.fromkeys(sums.noted))}; read per-latent "
            "tensors by self.at(tensor, latent), not tensor[latent] or tensor.index_select(0, latent)"
        )
    x = torch.randn(PARALLEL["batch"], PARALLEL["d_in"], generator=torch.Generator().manual_seed(0))

    def train(device: str) -> dict[str, Tensor]:
        trainer = lab.trainer(x, d_sae=PARALLEL["d_sae"], device=device, lr=1e-3)
        for _ in range(3):
            trainer.step(x)
        return trainer.dictionary.state_dict()

    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    for device in devices:
        with threads(4):
            first = train(device)
            for _ in range(3):
                differ = [name for name, value in train(device).items() if not torch.equal(value, first[name])]
                if differ:
                    raise CheckFailed(
                        f"{', '.join(differ)} differ between two trainings with one seed on {device}; read per-latent tensors "
                        "by self.at(tensor, latent), and draw random numbers from torch alone"
                    )
    return f"4 trainings on {' and on '.join(devices)}, the same to the bit"


def resume(lab: Lab) -> str:
    """Check that training that is stopped and resumed ends at the same bytes."""
    batches = lab.data(6 * 128, seed=6).split(128)

    def fresh() -> Trainer:
        return lab.trainer(batches[0], n_tokens=6 * 128, dead_after=256)

    straight, resumed = fresh(), fresh()
    for i, batch in enumerate(batches):
        straight.step(batch)
        if i == 2:
            resumed.restore(*copy.deepcopy(straight.state()))
        elif i > 2:
            resumed.step(batch)
    ends = straight.dictionary.state_dict()
    differ = [name for name, value in resumed.dictionary.state_dict().items() if not torch.equal(value, ends[name])]
    if differ:
        raise CheckFailed(
            f"{', '.join(differ)} differ after training was stopped and resumed; keep all state of training in "
            "parameters and buffers, or compute it from step.progress"
        )
    return "the same to the bit from batch 3 on"


def planted_truth(lab: Lab) -> str:
    """Check that a short training finds the planted directions."""
    if lab.planted is None:
        raise NotChecked("planted = None")
    x = lab.data(16_384, seed=7)
    trainer = lab.trainer(x, d_sae=2 * N_PLANTED, batch_size=512, n_tokens=4 * len(x), lr=8e-3, decay=0.3, dead_after=4096)
    chance = _nearest(lab.directions, trainer.dictionary.W_dec.detach())
    for batch in TensorSource(x).batches(["x"], 512, seed=0):
        trainer.step(batch["x"])
        if trainer.done:
            break
    d = trainer.result()
    l0 = float(dense_codes(d, x[:1024]).count_nonzero()) / 1024
    cosine = _nearest(lab.directions, d.W_dec.detach())
    needed = chance + lab.planted * (1 - chance) * min(1.0, 2 * ACTIVE / max(l0, 1.0))
    if not cosine >= needed:
        raise CheckFailed(
            f"rows of W_dec reach a mean cosine of {cosine:.2f} with {N_PLANTED} planted directions at L0 {l0:.1f} (untrained "
            f"{chance:.2f}), expected {needed:.2f}; give options that suit {ACTIVE} active directions, or planted=None"
        )
    return f"mean cosine {cosine:.2f} at L0 {l0:.1f}; untrained {chance:.2f}, needed {needed:.2f}"


def _nearest(directions: Float[Tensor, "n_directions d_in"], rows: Float[Tensor, "d_sae d_in"]) -> float:
    """Return the mean over directions of the cosine to the nearest row."""
    return float((directions @ torch.nn.functional.normalize(rows, dim=1).T).amax(1).mean())


CHECKS: tuple[tuple[str, Callable[[Lab], str], tuple[str, ...]], ...] = (
    ("described", says_what_it_is, ()),
    ("config", config, ()),
    ("losses", losses, ()),
    ("trains", trains, ("losses",)),
    ("dtypes", dtypes, ("trains",)),
    ("row_wise", row_wise, ("dtypes",)),
    ("gradients", gradients, ("dtypes",)),
    ("gradients in tiles", gradients_in_tiles, ("gradients", "row_wise")),
    ("transcoder", transcoder, ("gradients",)),
    ("definitions", definitions, ("dtypes",)),
    ("eval codes", eval_codes, ("dtypes",)),
    ("published form", published_form, ("dtypes",)),
    ("folding", folding, ("dtypes",)),
    ("round trip", round_trip, ("trains",)),
    ("empty and full", empty_and_full, ("trains",)),
    ("same bytes", same_bytes, ("trains",)),
    ("resume", resume, ("trains",)),
    ("planted truth", planted_truth, ("trains",)),
)
