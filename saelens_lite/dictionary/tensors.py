"""A dictionary made of somebody's tensors: which axis is which, and what is folded into the weights.

Sizes decide the order of axes. Vectors are kept in float64 until everything is folded in; matrices are float32 throughout.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelens_lite import registry
from saelens_lite.config import Origin
from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError
from saelens_lite.ports import Port, Ports, as_ports, names, width

AXES = {"W_enc": "d_in d_sae", "W_dec": "d_sae d_out", "W_skip": "d_out d_in"}


PLACES = (str, int, Port, list, tuple)
TYPES = {  # of the arguments that are not tensors
    "rule": (str,),
    "options": (Mapping,),
    "subtract_b_dec": (bool, np.bool_),
    "token_norm": (str,),
    "d_in": (int, np.integer),
    "d_sae": (int, np.integer),
    "axes": (Mapping,),
    "hook": (str,),
    "reads": PLACES,
    "writes": PLACES,
    "origin": (Origin,),
}


class Sizes(NamedTuple):
    """The widths of a dictionary."""

    d_in: int
    d_sae: int
    d_out: int


@torch.no_grad()
def dictionary_of(
    cls: type,
    tensors: Mapping[str, Any],
    rule_tensors: Mapping[str, Any],
    *,
    rule: str,
    options: Mapping[str, Any] | None,
    mean: Any,
    scale: Any,
    subtract_b_dec: bool | None,
    token_norm: str | None,
    d_in: int | None,
    d_sae: int | None,
    axes: Mapping[str, str] | None,
    hook: str | None,
    reads: str | Ports | None,
    writes: str | Ports | None,
    origin: Origin | None,
) -> Any:
    """Return a dictionary of class `cls` from tensors; see `Dictionary.from_tensors`."""
    check_types(
        {"rule": rule, "options": options, "subtract_b_dec": subtract_b_dec, "token_norm": token_norm, "d_in": d_in}
        | {"d_sae": d_sae, "axes": axes, "hook": hook, "reads": reads, "writes": writes, "origin": origin}
    )
    reads = _one_place(hook, reads)
    rule_class = registry.load(rule)
    own, settings = rule_class.from_published(_own_tensors(rule_tensors), dict(options or {}))
    given = float_tensors(tensors)
    if missing := {"W_dec", *(() if rule_class.tied else ("W_enc",))} - given.keys():
        raise ConfigError(f"{rule} needs {' and '.join(sorted(missing))}")
    given |= {name: _turned(name, given[name], said) for name, said in (axes or {}).items() if _is_known(name, given)}
    outside = float_tensors({"mean": mean, "scale": scale})
    is_other = writes is not None or "W_skip" in given
    stated = {"d_in": d_in if d_in is not None else _width_of(reads), "d_sae": d_sae, "d_out": _width_of(writes)}
    sizes = sizes_of(given | own | outside, is_other, stated, axes or {})
    self = cls(
        rule_class(rule_class.Config(**settings), d_in=sizes.d_in, d_sae=sizes.d_sae),
        reads=_of_width(reads, sizes.d_in),
        writes=_of_width(writes, sizes.d_out) if is_other else None,
        d_sae=sizes.d_sae,
        skip="W_skip" in given,
        origin=origin or Origin(excluded_positions=()),
        token_norm=token_norm,
    )
    state = self.state_dict()
    given |= {f"rule.{name}": tensor for name, tensor in own.items()}
    check_names(self.rule, state, given)
    given = {name: _in_order(name.removeprefix("rule."), x, *state[name].shape) for name, x in given.items()}
    given |= {name: _in_order(name, x, sizes.d_in) for name, x in outside.items()}
    _fold(self, given, subtract_b_dec)
    for name, tensor in given.items():
        state[name].copy_(tensor)
    if name := self.not_finite():
        raise NonFiniteError(f"{name} becomes NaN or infinite (as float32) when mean, scale and biases are folded in")
    norms = torch.linalg.vector_norm(self.W_dec, dim=1)
    if rule_class.tied and (norms - 1).abs().max() > 1e-3:
        raise ConfigError(f"rows of W_dec have norms {norms.min():.3g} to {norms.max():.3g}; {rule} needs unit vectors")
    return self.eval()


def check_types(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument of the wrong type. Only the rule must not be None."""
    for name, value in given.items():
        kinds, is_bool = TYPES[name], isinstance(value, bool) and bool not in TYPES[name]
        inner = {"options": str, "axes": str, "reads": Port, "writes": Port}.get(name)
        parts = value if isinstance(value, list | tuple | Mapping) and inner else ()
        fits = isinstance(value, kinds) and not is_bool and all(isinstance(part, inner or object) for part in parts)
        if not fits and (value is not None or name == "rule"):
            wanted = " or ".join(kind.__name__ for kind in kinds if kind.__module__ != "numpy")
            of = f" (with {inner.__name__} inside)" if inner and isinstance(value, kinds) else ""
            raise ConfigError(f"{name} is {str(value)[:80]!r}, a {type(value).__name__}; expected {wanted}{of}")


def float_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copy tensors, arrays, lists and numbers to the CPU: matrices as float32, the rest as float64. None is left out.

    Raises:
        ShapeError: a value is of another type.
        NonFiniteError: a value holds NaN or infinity.
    """
    tensors = {}
    for name, value in values.items():
        if value is None:
            continue
        tensor = value.detach() if isinstance(value, Tensor) else _from_numpy(name, value)
        if tensor.is_complex() or tensor.dtype == torch.bool or tensor.layout != torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else tensor.layout
            raise ShapeError(f"{name} is a {kind} tensor of {tensor.dtype}; expected a dense one of real numbers")
        tensors[name] = tensor.to("cpu", torch.float64 if tensor.ndim < 2 else torch.float32, copy=True)
        if not torch.isfinite(tensors[name].float()).all():
            raise NonFiniteError(f"{name} holds NaN or infinity (as float32)")
    return tensors


def _from_numpy(name: str, value: Any) -> Tensor:
    """Return an array as a tensor: of numpy, of jax (also bfloat16), a list, a number or anything that numpy converts."""
    try:
        array = np.asarray(value)
        if array.dtype.kind == "b":
            raise ShapeError(f"{name} is a dense array of torch.bool; expected a dense one of real numbers")
        if array.dtype.kind not in "fiuc" and not array.dtype.name.startswith(("bfloat", "float")):
            raise TypeError
        return torch.from_numpy(np.array(array, dtype=np.complex128 if array.dtype.kind == "c" else np.float64))
    except ShapeError:
        raise
    except Exception:  # the conversion is a stranger's code
        raise ShapeError(f"{name} is a {type(value).__name__}; expected a tensor or an array of numbers") from None


def _own_tensors(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the rule's own tensors. A log_threshold becomes a threshold."""
    own = float_tensors(values)
    if "log_threshold" in own and "threshold" not in own:
        own["threshold"] = own.pop("log_threshold").exp()
    return own


def _is_known(name: str, given: Mapping[str, Tensor]) -> bool:
    """Return whether axes may be given for a name. Raise ConfigError if there is no such matrix."""
    if name in AXES and name in given:
        return True
    raise ConfigError(f"axes are given for {name!r}; expected names of given matrices: {', '.join(AXES.keys() & given.keys())}")


def _turned(name: str, tensor: Tensor, said: str) -> Tensor:
    """Return a matrix with our order of axes, given its own order in words, such as "d_sae d_in"."""
    ours = AXES[name]
    theirs = " ".join(reversed(ours.split()))
    if said not in (ours, theirs):
        raise ConfigError(f"axes of {name} are {said!r}; expected {ours!r} or {theirs!r}")
    return tensor if said == ours else _matrix(name, tensor).T


def sizes_of(
    tensors: Mapping[str, Tensor], transcoder: bool, stated: Mapping[str, int | None], oriented: Collection[str] = ()
) -> Sizes:
    """Return the sizes on which all tensors agree.

    Args:
        stated: sizes that are known otherwise, by the name of their axis.
        oriented: matrices that have our order of axes.

    Raises:
        ShapeError: the tensors contradict each other, or do not decide which axis is which.
    """
    W_dec = _matrix("W_dec", tensors["W_dec"])
    W_enc = _matrix("W_enc", tensors["W_enc"]) if "W_enc" in tensors else None
    decoders = _orders(W_dec, "W_dec" in oriented)
    encoders = {(d_out, d_sae) for d_sae, d_out in decoders} if W_enc is None else _orders(W_enc, "W_enc" in oriented)
    shapes = f"W_dec has shape {tuple(W_dec.shape)}"
    if W_enc is not None:
        shapes = f"W_enc has shape {tuple(W_enc.shape)} and W_dec {tuple(W_dec.shape)}"
    fits = {Sizes(d_in, n, d_out) for d_in, n in encoders for m, d_out in decoders if m == n}
    if not fits:
        raise ShapeError(f"{shapes}; expected the number of latents in both")
    if min(min(sizes) for sizes in fits) < 1:
        raise ShapeError(f"{shapes}; expected no empty tensor")
    for name, axis, size in _facts(tensors, stated):
        agreeing = {sizes for sizes in fits if getattr(sizes, axis) == size}
        if not agreeing and axis in ("d_sae", name):
            said = f"{name} = {size}" if name == axis else f"{name} has {size} entries"
            raise ShapeError(f"{said}; {shapes}".replace(" and W_dec", ", W_dec"))
        fits = agreeing or fits  # a bias that does not fit is reported with its shape
    if not transcoder:
        sizes = min(fits)
        if not (fits := {sizes for sizes in fits if sizes.d_in == sizes.d_out}):
            raise ShapeError(
                f"{shapes}: with {sizes.d_sae} latents the input has {sizes.d_in} entries and the output {sizes.d_out}; "
                "give writes= if the output is of another hook"
            )
    if len(fits) > 1:
        raise ShapeError(f"{shapes}, which do not decide which axis is that of the latents; give d_in= or d_sae=")
    (sizes,) = fits
    for name in AXES.keys() & tensors.keys() - set(oriented):
        if tensors[name].ndim == 2 and tensors[name].shape[0] == tensors[name].shape[1]:
            ours, theirs = AXES[name], " ".join(reversed(AXES[name].split()))
            raise ShapeError(
                f"{name} is square, {tuple(tensors[name].shape)}, so its sizes do not decide which axis is which; give "
                f"axes={{{name!r}: {ours!r}}} or {{{name!r}: {theirs!r}}} (a torch.nn.Linear holds [output input])"
            )
    return sizes


def _orders(matrix: Tensor, oriented: bool) -> set[tuple[int, int]]:
    """Return the sizes that the axes of a matrix may have."""
    rows, columns = matrix.shape
    return {(rows, columns)} if oriented else {(rows, columns), (columns, rows)}


def _facts(tensors: Mapping[str, Tensor], stated: Mapping[str, int | None]) -> list[tuple[str, str, int]]:
    """Return (name, axis, size) for all that is known of the sizes; the first tensor over latents decides their number."""
    facts = [(axis, axis, size) for axis, size in stated.items() if size is not None]
    vectors = {name: len(x) for name, x in tensors.items() if name not in AXES and x.ndim == 1 and len(x) > 1}
    others = {"b_dec": "d_out", "mean": "d_in", "scale": "d_in"}
    facts += [(name, "d_sae", size) for name, size in vectors.items() if name not in others][:1]
    return facts + [(name, others[name], size) for name, size in vectors.items() if name in others]


def check_names(rule: Any, state: Collection[str], given: Collection[str]) -> None:
    """Raise ConfigError unless the given names are in the state dict of a dictionary, and the rule's own are given."""
    form = rule.inference_form()
    needed = {f"rule.{name}" for name, _ in rule.named_parameters()}
    needed |= {f"rule.{name}" for name in (form.tensors if form else ()) if f"rule.{name}" in state}
    unknown, missing = set(given) - set(state), needed - set(given)
    if unknown or missing:
        of_rule = form.tensors if form else [name.removeprefix("rule.") for name in needed]
        missing = missing and ({name for name in of_rule if f"rule.{name}" not in given} or missing)
        lists = [{name for name in state if not name.startswith("rule.")}, set(of_rule), unknown, missing]
        taken, own_names, surplus, absent = (
            ", ".join(sorted(n.removeprefix("rule.") for n in some)) or "none" for some in lists
        )
        raise ConfigError(
            f"{rule.plugin_name} takes the tensors {taken}, and of its own: {own_names}; missing: {absent}; "
            f"not expected: {surplus}"
        )


def _fold(dictionary: Any, w: dict[str, Tensor], subtract_b_dec: bool | None) -> None:
    """Fold `mean`, `scale` and a b_dec that the encoder treats in the other way into the weights, in place.

    ((x − mean) s − b_dec) W_enc + b_enc = (x − (mean + b_dec / s)) (s W_enc) + b_enc
    (codes W_dec + b_dec) / s + mean     = codes (W_dec / s) + (mean + b_dec / s)
    """
    subtracts, rule = dictionary.writes_what_it_reads, dictionary.rule.plugin_name
    if subtract_b_dec not in (None, subtracts) and "b_dec" in w:
        _shift_pre(dictionary, w, subtracts)
    mean, scale = w.pop("mean", None), w.pop("scale", None)
    if mean is None and scale is None:
        return
    if not subtracts or dictionary.token_norm:
        kind = "a token_norm" if dictionary.token_norm else "an output that is not its input"
        raise ConfigError(
            f"mean= and scale= are for autoencoders, not for a dictionary with {kind}; for a transcoder, use fold_shift_ and "
            "fold_scales_ of the dictionary"
        )
    if scale is not None:
        if dictionary.rule.tied:
            raise ConfigError(f"codes of {rule} are in the units of x, so scale= would change them; leave it out")
        if not (scale > 0).all():
            raise ConfigError(f"scale is {scale.min():.3g}; expected a number above 0")
        w["W_enc"] = w["W_enc"] * scale[:, None].float()
        w["W_dec"] = w["W_dec"] / scale.float()
        w["b_dec"] = w.get("b_dec", torch.zeros_like(scale)) / scale
    if mean is not None:
        w["b_dec"] = w.get("b_dec", 0) + mean


def _shift_pre(dictionary: Any, w: dict[str, Tensor], subtracts: bool) -> None:
    """Add b_dec W_enc to the pre-activations, which our equation subtracts; for a transcoder, the other way round."""
    if dictionary.d_in != dictionary.d_out:
        raise ShapeError(f"subtract_b_dec=True needs b_dec of the input's width {dictionary.d_in}; it has {dictionary.d_out}")
    shift = torch.zeros(dictionary.d_sae).double()
    if "W_enc" in w:
        shift = (1 if subtracts else -1) * (w["b_dec"] @ w["W_enc"].double())
    if dictionary.b_enc is not None:
        w["b_enc"] = w.get("b_enc", torch.zeros_like(shift)) + shift
    elif {"rule.b_gate", "rule.r_mag", "rule.b_mag"} <= w.keys():
        w["rule.b_gate"] = w["rule.b_gate"] + shift
        w["rule.b_mag"] = w["rule.b_mag"] + shift * w["rule.r_mag"].exp()
    else:
        rule = dictionary.rule.plugin_name
        raise ConfigError(f"{rule} has no encoder bias that could undo the subtraction of b_dec; leave out subtract_b_dec")


def _in_order(name: str, tensor: Tensor, *wanted: int) -> Tensor:
    """Return a parameter in the wanted shape: unchanged, transposed, or a repeated number.

    Raises:
        ShapeError: the tensor has another shape.
    """
    if tuple(tensor.shape) == wanted:
        return tensor
    if len(wanted) == 2 and tuple(tensor.shape) == wanted[::-1]:
        return tensor.T
    if len(wanted) == 1 and tensor.numel() == 1:
        return tensor.reshape(1).expand(wanted)
    turned = " or the other way round" if len(wanted) == 2 else ""
    raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected {wanted}{turned}")


def _matrix(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim != 2:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}; expected a matrix")
    return tensor


def _one_place(hook: str | None, reads: str | Ports | None) -> str | Ports | None:
    """Return the place that is read. Raise ConfigError if it is given twice."""
    if hook is not None and reads is not None:
        raise ConfigError(f"hook={hook!r} and reads={reads!r} both say what is read; give one of them")
    return reads if hook is None else hook


def _width_of(given: str | Ports | None) -> int | None:
    """Return the width that ports state, or None for a hook name."""
    return None if given is None or isinstance(given, str) else width(as_ports(given))


def _of_width(given: str | Ports | None, d: int) -> tuple[Port, ...]:
    """Return ports of total width d. A hook name, or None for an unknown hook, becomes a port of that width.

    Raises:
        ShapeError: the given ports have another width.
    """
    ports = (Port(hook=given, width=d),) if given is None or isinstance(given, str) else as_ports(given)
    if width(ports) != d:
        raise ShapeError(f"{names(ports)} has width {width(ports)}, but the tensors have {d} entries for it")
    return ports
