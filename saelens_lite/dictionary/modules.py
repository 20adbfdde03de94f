"""A dictionary made of somebody's torch module, and checked against the module's own output.

The tensors are recognised by their names. What they do not say is tried: whether the encoder subtracts b_dec, which rule makes
the codes, and if those do not explain the output, a normalisation of each activation, or codes in units of the decoder's norms.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saelens_lite import registry
from saelens_lite.arrays import as_tensor, described
from saelens_lite.dictionary.known_names import Recognised, recognise, rules_that_fit
from saelens_lite.dictionary.tensors import AXES, check_types
from saelens_lite.errors import ConfigError, SaelensLiteError, ShapeError
from saelens_lite.files import shortened

FEW = 0.01  # share of activations that may differ, because two pre-activations, or one and its threshold, are nearly equal
NAMES_OF_K = ("k", "top_k", "topk", "k_value", "l0")
RULES = ("l1", "topk", "jumprelu", "gated")  # one of each function that is in use; others compute the same codes, or are named
log = logging.getLogger(__name__)


class Output(NamedTuple):
    """The output of a module, and its codes if its `encode` returns them."""

    x_hat: Tensor
    codes: Tensor | None


class Trial(NamedTuple):
    """A description of a module, the dictionary that it gives, and how far that is from the module."""

    said: str
    dictionary: Any
    errors: Mapping[str, float]  # the relative error of x_hat and of codes, without the few activations that may differ
    n_other: int  # activations that differ

    @property
    def error(self) -> float:
        """The larger error."""
        return max(self.errors.values())


@torch.no_grad()
def dictionary_of_module(
    cls: type,
    module: Any,
    x: Any,
    *,
    rule: str | None,
    options: Mapping[str, Any] | None,
    names: Mapping[str, str] | None,
    output: Callable[[Any], Any] | None,
    tolerance: float,
    settings: Mapping[str, Any],
) -> Any:
    """Return the dictionary that computes what a module computes; see `Dictionary.from_module`."""
    check_types({"options": options} | ({} if rule is None else {"rule": rule}))
    if options and rule is None:
        raise ConfigError(f"options {dict(options)} need rule=")
    x = as_tensor(x)
    if x.ndim < 1 or x.shape[0] == 0 or not x.is_floating_point():
        raise ShapeError(f"x is {described(x)}; expected activations, [batch d_in]")
    x = x.reshape(-1, x.shape[-1]).detach()
    tensors = tensors_of(module)
    theirs = _recognised(tensors, names)
    given = {ours: tensors[name] for ours, name in theirs.names.items() if ours != "k"}
    wanted = _output_of(module, x, given, output)
    rules = _rules(module, tensors, theirs, rule, options)
    trials, refusals = [], []
    for stage in (_plain, _normalised):
        for said, tried in stage(given, rules, settings):
            try:
                dictionary = cls.from_tensors(**{"d_in": x.shape[1], **tried, **settings})
            except SaelensLiteError as error:
                refusals.append(f"{said}: {error}")
            else:
                trial = _tried(said, dictionary, x, wanted)
                trials.append(trial if trial.error <= tolerance else trial._replace(dictionary=None))
        fitting = [trial for trial in trials if trial.error <= tolerance]
        if fitting:
            return _only(fitting, module, x, theirs)
    raise ConfigError(_refusal(module, trials, refusals, theirs))


def tensors_of(module: Any) -> dict[str, Tensor]:
    """Return the tensors of a module by name: its state dict, and its attributes that are tensors.

    Raises:
        ConfigError: it has none.
    """
    tensors = dict(module.state_dict()) if isinstance(module, nn.Module) else {}
    inner = module.named_modules() if isinstance(module, nn.Module) else [("", module)]
    for head, part in inner:
        for name, value in vars(part).items() if hasattr(part, "__dict__") else ():
            if isinstance(value, Tensor):
                tensors.setdefault(f"{head}.{name}" if head else name, value)
            elif isinstance(value, nn.Module) and not isinstance(module, nn.Module):
                tensors |= {f"{name}.{key}": tensor for key, tensor in value.state_dict().items()}
    tensors = {name: value.detach() for name, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(f"module is {described(module)} without tensors; expected a torch module, or an object with tensors")
    return tensors


def _recognised(tensors: Mapping[str, Tensor], names: Mapping[str, str] | None) -> Recognised:
    """Return the module's tensors by our names. If there is one matrix only, it is both encoder and decoder."""
    try:
        theirs = recognise(tensors, names)
    except ConfigError as error:
        try:
            theirs = recognise(tensors, names, needed="W_enc")
        except ConfigError:
            raise error from None
    for one, other in (("W_enc", "W_dec"), ("W_dec", "W_enc")):
        if one in theirs.names and other not in theirs.names:
            theirs.names[other] = theirs.names[one]
    return theirs


def _output_of(module: Any, x: Tensor, given: Mapping[str, Tensor], output: Callable | None) -> Output:
    """Return the module's output for x, computed in evaluation mode and in float32 at least; the module stays as it is."""
    dtype, device = given["W_dec"].dtype, given["W_dec"].device
    if output is None and dtype in (torch.float16, torch.bfloat16):
        module, dtype = copy.deepcopy(module), torch.float32
        for part in [module] if isinstance(module, nn.Module) else []:
            part.float()
    x = x.to(device, dtype)
    parts = list(module.modules()) if isinstance(module, nn.Module) else []
    training = [part.training for part in parts]
    buffers = [{name: (t, None if t is None else t.clone()) for name, t in part._buffers.items()} for part in parts]
    for part in parts:
        part.training = False
    try:
        y = (output or module)(x.clone())  # it may change x in place
        codes = _codes(module, x.clone(), given)
    except Exception as error:  # a stranger's code
        raise ConfigError(
            f"{described(module)} failed on x [{len(x)} {x.shape[1]}]: {type(error).__name__}: {error}; set output= to a "
            "function of x that returns x_hat"
        ) from None
    finally:
        for part, was, before in zip(parts, training, buffers, strict=True):
            part.training = was
            part._buffers.clear()
            part._buffers.update({name: t if t is None else t.copy_(value) for name, (t, value) in before.items()})
    d_out = {n for n in given["W_dec"].shape}
    if "b_dec" in given and given["b_dec"].ndim == 1:
        d_out = {len(given["b_dec"])}
    x_hat = [t for t in _inside(y) if t.ndim == 2 and len(t) == len(x) and t.shape[1] in d_out]
    x_hat = [t for t in x_hat if t.shape[1] == x.shape[1]] or x_hat
    if len(x_hat) != 1:
        raise ConfigError(
            f"the output of {described(module)} holds {len(x_hat)} tensors that could be x_hat, [{len(x)} d_out]; set output= "
            "to a function of x that returns x_hat"
        )
    return Output(x_hat[0].detach().cpu().double(), codes)


def _codes(module: Any, x: Tensor, given: Mapping[str, Tensor]) -> Tensor | None:
    """Return the codes that a module's `encode` returns, alone or first in a tuple; None if it fails or returns others."""
    encode = getattr(module, "encode", None)
    if not callable(encode):
        return None
    try:
        f = encode(x)
    except Exception as error:  # a stranger's code
        log.info("encode of %s failed, so only x_hat is compared: %s: %s", described(module), type(error).__name__, error)
        return None
    first = next(_inside(f), None) if isinstance(f, Tensor | tuple | list) else None
    d_sae = set(given["W_enc"].shape) & set(given["W_dec"].shape)
    d_sae = d_sae - {x.shape[-1]} or d_sae
    if first is None or first.layout != torch.strided or first.ndim != 2 or len(first) != len(x) or first.shape[1] not in d_sae:
        log.info("encode of %s does not return codes alone or first, so only x_hat is compared", described(module))
        return None
    return first.detach().cpu().double()


def _inside(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an output: a tensor, or those in a tuple, a mapping or the fields of an object."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _inside(inner)
    elif isinstance(value, Mapping) or hasattr(value, "__dict__"):
        fields = value if isinstance(value, Mapping) else vars(value)
        yield from (inner for inner in fields.values() if isinstance(inner, Tensor))


def _rules(
    module: Any, tensors: Mapping[str, Tensor], theirs: Recognised, rule: str | None, options: Mapping[str, Any] | None
) -> list[tuple[str, dict[str, Any], list[str]]]:
    """Return (rule, options, our names of its tensors) for each rule that the tensors could belong to."""
    fixed = {"W_enc", "W_dec", "b_enc", "b_dec", "W_skip"}
    own = [name for name in theirs.names if name not in fixed | {"k"}]
    ks = _numbers(module) | {int(x) for name, x in tensors.items() if name == theirs.names.get("k") and x.numel() == 1}
    rules = []
    for name in RULES if rule is None else (rule,):
        needs_k = "k" in registry.load(name).Config.model_fields
        taken = {*fixed & theirs.names.keys(), *own}
        if registry.load(name).tied:
            taken -= {"W_enc"}
        plain = {one for one in taken if one in fixed}
        tensor_sets = [some for some in (taken, plain) if name in rules_that_fit(some)] or ([taken] if rule else [])
        chosen = [dict(options or {})]
        if needs_k and "k" not in chosen[0]:
            chosen = [chosen[0] | {"k": k} for k in sorted(ks)]
        rules += [(name, one, sorted(some)) for one in chosen for some in tensor_sets[:1]]
    return rules


def _numbers(module: Any) -> set[int]:
    """Return the numbers that the parts of a module, or its settings, call k."""
    parts = list(module.modules()) if isinstance(module, nn.Module) else [module]
    settings = [getattr(part, name, None) for part in parts for name in ("cfg", "config", "hparams")]
    values: set[int] = set()
    for place in (*parts, *settings):
        for name in NAMES_OF_K:
            value = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                values.add(value)
    return values


def _plain(given: dict[str, Tensor], rules: list, settings: Mapping[str, Any]) -> Iterator[tuple[str, dict]]:
    """Yield descriptions of a module, in words and as arguments of `from_tensors`."""
    b_dec = given.get("b_dec")
    either = [True, False] if b_dec is not None and bool((b_dec != 0).any()) and "subtract_b_dec" not in settings else [None]
    square = [name for name in AXES if name in given and given[name].ndim == 2 and len(set(given[name].shape)) == 1]
    orders = [{}] if "axes" in settings else [dict(zip(square, some, strict=True)) for some in product(*map(_both, square))]
    for (rule, options, names), subtract, axes in product(rules, either, orders):
        said = {"rule": rule, "options": options, "subtract_b_dec": subtract, "axes": axes}
        said = {key: value for key, value in said.items() if value not in (None, {})}
        words = ", ".join(f"{key}={value!r}" for key, value in said.items())
        yield words, {**said, **{name: given[name] for name in names}}


def _both(name: str) -> list[str]:
    """Return the two orders of the axes of a matrix."""
    return [AXES[name], " ".join(reversed(AXES[name].split()))]


def _normalised(given: dict[str, Tensor], rules: list, settings: Mapping[str, Any]) -> Iterator[tuple[str, dict]]:
    """Yield descriptions with a normalisation of each activation, and with codes in units of the decoder's norms."""
    plain = list(_plain(given, rules, settings))
    if not {"token_norm", "mean", "scale", "writes"} & settings.keys():
        for norm in ("layer_norm", "constant_norm"):
            yield from ((f"{words}, token_norm={norm!r}", {**said, "token_norm": norm}) for words, said in plain)
    d_sae = len(given["b_enc"]) if "b_enc" in given and given["b_enc"].ndim == 1 else max(given["W_dec"].shape)
    for words, said in plain:
        is_whole = "W_enc" in said and said["W_enc"].ndim == said["W_dec"].ndim == 2 and "axes" not in said
        if is_whole and d_sae in said["W_enc"].shape and d_sae in said["W_dec"].shape:
            norms = said["W_dec"].float().norm(dim=1 - list(said["W_dec"].shape).index(d_sae))
            in_units = {
                "W_enc": said["W_enc"] * (norms if said["W_enc"].shape[1] == d_sae else norms[:, None]),
                "W_dec": said["W_dec"] / (norms if said["W_dec"].shape[1] == d_sae else norms[:, None]),
            }
            if "b_enc" in said:
                in_units["b_enc"] = said["b_enc"] * norms
            yield f"{words}, with W_dec of unit norm and its norms in W_enc and b_enc", {**said, **in_units}


def _tried(said: str, dictionary: Any, x: Tensor, wanted: Output) -> Trial:
    """Return a description with the errors of its dictionary, computed in float64."""
    x, twin = x.detach().cpu().double(), copy.deepcopy(dictionary).double()
    codes = twin.encode(x)
    pairs = {"x_hat": (twin.decode(codes, x), wanted.x_hat)}
    if wanted.codes is not None:
        pairs["codes"] = (codes.to_dense(), wanted.codes)
    if not codes.fires.any() or any(ours.shape != theirs.shape for ours, theirs in pairs.values()):
        return Trial(said, dictionary, {"x_hat": torch.inf}, len(x))
    rows = {}
    for name, (ours, theirs) in pairs.items():
        norms = theirs.norm(dim=1)
        typical = norms[norms > 0].median() if bool((norms > 0).any()) else norms.new_tensor(1e-30)
        rows[name] = (ours - theirs).norm(dim=1) / norms.clamp(min=float(typical))
    worst = torch.stack(list(rows.values())).amax(0).nan_to_num(torch.inf)
    rule = type(dictionary.rule)
    is_smooth = rule.homogeneous and not dict(dictionary.rule.named_parameters()) and not dict(dictionary.rule.named_buffers())
    n_spared = 0 if is_smooth else int(FEW * len(x))
    kept = worst.argsort()[: len(x) - n_spared]
    errors = {name: float(error.nan_to_num(torch.inf)[kept].amax()) for name, error in rows.items()}
    return Trial(said, dictionary, errors, int((worst > max(10 * max(errors.values()), 1e-5)).sum()))


def _only(fitting: list[Trial], module: Any, x: Tensor, theirs: Recognised) -> Any:
    """Return the dictionary of the only description that fits. Raise ConfigError if x does not decide between several."""
    if len(fitting) > 1:
        said = "; ".join(trial.said for trial in fitting)
        raise ConfigError(
            f"x does not decide between descriptions of {described(module)}: {said}. Give more activations, of the hook it was "
            "trained on, or say what holds, such as rule= or subtract_b_dec="
        )
    (trial,) = fitting
    errors = ", ".join(f"{name} differ by {error:.1e}" for name, error in trial.errors.items())
    log.info("%s is %s; relative to their size, %s on %d activations", type(module).__name__, trial.said, errors, len(x))
    if trial.n_other:
        log.warning(
            "%s: %d of %d activations have other codes, as when two pre-activations are nearly equal; all others agree",
            type(module).__name__, trial.n_other, len(x),
        )  # fmt: skip
    if theirs.surplus:
        log.info("tensors without effect on the output: %s", shortened(theirs.surplus))
    trial.dictionary.training_record = {
        "read_from": {"format": "module", "config": {"module": type(module).__name__, "names": dict(theirs.names)}}
    }
    return trial.dictionary


def _refusal(module: Any, trials: list[Trial], refusals: list[str], theirs: Recognised) -> str:
    """Return the message for a module that no description explains."""
    taken = ", ".join(f"{name} = {ours}" for ours, name in theirs.names.items())
    said = f"no description of {described(module)} reproduces its output on x (recognised: {taken}"
    said += f"; not recognised: {shortened(theirs.surplus)})" if theirs.surplus else ")"
    if trials:
        best = min(trials, key=lambda trial: trial.error)
        errors = " and ".join(f"{name} by {error:.2g}" for name, error in best.errors.items())
        said += f". The closest of {len(trials)}, {best.said}, misses {errors} of their size"
    elif refusals:
        said += f". It was tried as {refusals[0]}"
    else:
        said += ". No rule takes its tensors: set rule= and options="
    return (
        f"{said}. Say what is known: rule=, options=, mean=, scale=, token_norm=, writes=, names=, or output= if the module "
        "returns something other than x_hat; or fold the rest into the tensors and use Dictionary.from_tensors"
    )
