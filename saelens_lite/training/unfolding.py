"""Start of training from the parameters of an existing dictionary.

A saved dictionary takes raw activations, while training works on scaled ones. So the steps of `Trainer.result` are undone:

    W_enc / s        b_enc + shift W_enc        W_dec · t        b_dec · t + W_skip shift

with the scales s and t of the read and write ports. Then ‖W_dec[i]‖, summed over the write ports, is made 1, as at the start of
any training.
"""

import copy
import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError

SAME = 1e-3  # relative difference of decoder norms that counts as none
log = logging.getLogger(__name__)


@torch.no_grad()
def unfold_into(
    new: Dictionary,
    given: Dictionary,
    scales: Sequence[float],
    target_scales: Sequence[float],
    shift: Float[Tensor, " d_in"] | None,
) -> None:
    """Copy the parameters of a dictionary of raw activations into one of scaled activations, which has the same codes.

    A rule of the same family also gets the rule's parameters, and the buffers that its codes depend on. Another rule begins
    with its own.

    Raises:
        ConfigError: the parameters do not fit, or the dictionary normalises each activation.
    """
    _check_ports(new, given)
    d = copy.deepcopy(given).float().to(new.W_dec.device)
    d.fold_scales_([1 / s for s in scales], [1 / s for s in target_scales])
    if shift is not None:
        d.fold_shift_(-shift)
    if not d.rule.tied and (new.rule.unit_decoder or d.rule.homogeneous):  # Adam's steps fit rows of about norm 1
        _make_unit_(d)
    state, wanted = d.state_dict(), new.state_dict()
    own = {name for name in state if not name.startswith("rule.")} | _of_rule(new, d)
    needed = {name for name in wanted if not name.startswith("rule.")} | (own & wanted.keys())
    shapes = {name: tuple(state[name].shape) for name in own}
    expected = {name: tuple(wanted[name].shape) for name in needed}
    if shapes != expected:
        names = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))
        raise ConfigError(
            f"a {new.rule.plugin_name} dictionary cannot start from this {d.rule.plugin_name} dictionary, because "
            + "; ".join(f"{n} has the shape {shapes.get(n, 'missing')}, expected {expected.get(n, 'none')}" for n in names)
        )
    for name in own:
        wanted[name].copy_(state[name])
    begins = sorted(name.removeprefix("rule.") for name in wanted.keys() - own)
    log.info("starts from the parameters of a %s dictionary; new are: %s", d.rule.plugin_name, ", ".join(begins) or "none")


def _check_ports(new: Dictionary, given: Dictionary) -> None:
    """Raise ConfigError unless both dictionaries have ports of the same widths."""
    if given.token_norm:
        raise ConfigError(f"training cannot start from a dictionary with token_norm = {given.token_norm!r}")
    sides = [([port.width for port in d.reads], None if d.writes_what_it_reads else [port.width for port in d.writes])
             for d in (given, new)]  # fmt: skip
    if sides[0] != sides[1] or given.d_sae != new.d_sae:
        raise ConfigError(
            f"training on {new.place} cannot start from a dictionary of {given.place}: its ports have the widths "
            f"{sides[0][0]} → {sides[0][1] or 'the same'} and it has {given.d_sae} latents; expected {sides[1][0]} → "
            f"{sides[1][1] or 'the same'} and {new.d_sae}"
        )


def _make_unit_(d: Dictionary) -> None:
    """Make the decoder norms 1, and change codes so that the output stays the same.

    If the rule compares latents, as top-k does, all codes change by one factor. That is exact if the norms are equal.
    """
    norms = d.decoder_norms()
    norms = torch.where(norms > 0, norms, 1)
    factor = norms if d.rule.homogeneous else norms.mean().expand_as(norms)
    if not d.rule.homogeneous and (norms / factor - 1).abs().max() > SAME:
        log.warning(
            "the directions of the dictionary have norms %.3g to %.3g, and %s makes them equal: training starts from a "
            "changed dictionary",
            *(norms.min(), norms.max(), d.rule.plugin_name),
        )
    d.W_enc.mul_(factor)
    if d.b_enc is not None:
        d.b_enc.mul_(factor)
    d.W_dec.div_(norms[:, None])
    d.rule.rescale_(factor)


def _of_rule(new: Dictionary, d: Dictionary) -> set[str]:
    """Return the names of the rule's tensors to copy: its parameters, and the buffers of its published form.

    Other buffers are the state of a schedule, which begins anew. Nothing is copied between rules of different families.
    """
    if not (isinstance(new.rule, type(d.rule)) or isinstance(d.rule, type(new.rule))):
        return set()
    form = d.rule.inference_form()
    buffers = {name for name, _ in d.rule.named_buffers() if form is None or name in form.tensors}
    names = {name for name, _ in d.rule.named_parameters()} | buffers
    return {f"rule.{name}" for name in names} & d.state_dict().keys()
