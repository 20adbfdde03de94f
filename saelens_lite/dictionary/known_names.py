"""Names that people give to the tensors of a dictionary, and the parameters of ours that they mean."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch

from saelens_lite import registry
from saelens_lite.dictionary.tensors import check_names
from saelens_lite.errors import ConfigError, SaelensLiteError, near_matches
from saelens_lite.files import shortened

SYNONYMS = {  # in small letters, without the names of the modules that they are in
    "W_enc": "w_enc w_e w_encoder encoder_weight encoder.weight encoder_linear.weight encoder.0.weight encoder.linear.weight "
    "enc.weight linear_encoder.weight encoder enc",
    "b_enc": "b_enc b_e b_encoder encoder_bias latent_bias encoder.bias encoder_linear.bias encoder.0.bias encoder.linear.bias "
    "enc.bias linear_encoder.bias bias_enc",
    "W_dec": "w_dec w_d w_decoder decoder_weight decoder.weight decoder_linear.weight decoder.0.weight decoder.linear.weight "
    "dec.weight linear_decoder.weight decoder dec",
    "b_dec": "b_dec b_d b_decoder decoder_bias pre_bias decoder.bias decoder_linear.bias decoder.0.bias decoder.linear.bias "
    "dec.bias linear_decoder.bias bias_dec b_pre bias",
    "W_skip": "w_skip skip.weight skip_connection.weight affine_skip_connection",
    "threshold": "threshold theta topk_threshold activation_function.threshold activation.threshold jumprelu.threshold",
    "log_threshold": "log_threshold log_jumprelu_threshold activation_function.log_jumprelu_threshold",
    "b_gate": "b_gate gate_bias",
    "r_mag": "r_mag",
    "b_mag": "b_mag mag_bias",
    "k": "k",
}
OURS = {theirs: ours for ours, names in SYNONYMS.items() for theirs in names.split()}
STATISTICS = {  # of training, without effect on the function
    "stats_last_nonzero", "latents_activation_frequency", "latents_mean_square", "num_batches_not_active",
}  # fmt: skip
PARAMETERS = {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip"}


class Recognised(NamedTuple):
    """The tensors of a state dict: our name → theirs, and those without a known meaning."""

    names: dict[str, str]
    surplus: list[str]


def recognise(
    theirs: Collection[str],
    said: Mapping[str, str] | None = None,
    *,
    prefix: str | None = None,
    ignore: Collection[str] = (),
    needed: str = "W_dec",
) -> Recognised:
    """Return the tensors of a state dict by our names.

    Args:
        said: our name → theirs, for names that are not in the table.
        prefix: the names of the modules that the tensors are in, such as "model.sae."; other tensors are left out.
        ignore: names or patterns, such as "optimizer.*", of tensors to leave out.

    Raises:
        ConfigError: no decoder is recognised, or several; two tensors have the same meaning; a name is not in the state dict.
    """
    said = dict(said or {})
    for name in said.values():
        if name not in theirs:
            raise ConfigError(f"no tensor {name!r}{near_matches(name, theirs)} (tensors: {shortened(set(theirs))})")
    left = [name for name in theirs if name not in said.values() and not any(fnmatchcase(name, one) for one in ignore)]
    if prefix is not None:
        left = [name for name in left if name.startswith(prefix)]
    heads: dict[str, dict[str, list[str]]] = {}
    for name in left:
        head, ours = _meaning(name)
        if ours is not None and ours not in said:
            heads.setdefault(head, {}).setdefault(ours, []).append(name)
    inside = [head for head, of_head in heads.items() if needed in of_head]
    if needed not in said and len(inside) != 1:
        if inside:
            raise ConfigError(f"several decoders; set prefix= to one of {', '.join(map(repr, sorted(inside)))}")
        raise ConfigError(
            f"no tensor has a known name of {needed}; say which one it is, such as names={{{needed!r}: "
            f"{min(left, default='')!r}}} (tensors: {shortened(set(theirs))})"
        )
    if needed in said and not inside:
        inside = [head for head in heads if head == (prefix or "")]
    chosen = heads[inside[0]] if inside else {}
    for ours, several in chosen.items():
        if len(several) > 1:
            raise ConfigError(
                f"{' and '.join(sorted(several))} could both be {ours}; set names={{{ours!r}: …}} to one of them, and "
                "ignore= to the other if it has no effect"
            )
    names = said | {ours: several[0] for ours, several in chosen.items()}
    known = set(names.values())
    return Recognised(names, [n for n in left if n not in known and n.rpartition(".")[2] not in STATISTICS])


def _meaning(name: str) -> tuple[str, str | None]:
    """Return the modules that a tensor is in, and the name of ours that the rest of its name means, if any."""
    parts = name.split(".")
    for n in range(len(parts)):
        if ours := OURS.get(".".join(parts[n:]).lower()):
            return "".join(f"{part}." for part in parts[:n]), ours
    return "", None


def rules_that_fit(names: Collection[str]) -> list[str]:
    """Return the sparsity rules that take tensors of exactly these names of ours."""
    return [rule for rule in registry.names() if _fits(rule, set(names) - {"k"})]


def _fits(rule: str, names: set[str]) -> bool:
    """Return whether a rule takes tensors of exactly these names."""
    try:
        rule_class = registry.load(rule)
        own = {name: torch.ones(64) for name in names - PARAMETERS}
        if "log_threshold" in own:
            own["threshold"] = own.pop("log_threshold")
        own, settings = rule_class.from_published(own, {})
        made = rule_class(rule_class.Config(**settings), d_in=8, d_sae=64)
        given = (names & PARAMETERS) | {f"rule.{name}" for name in own}
        state = {f"rule.{name}" for name in made.state_dict()} | {"W_dec", "b_dec", "W_skip"}
        state |= ({"b_enc"} if made.encoder_bias else set()) | (set() if made.tied else {"W_enc"})
        check_names(made, state, given)
    except SaelensLiteError:
        return False
    return ("W_enc" in names) != rule_class.tied
