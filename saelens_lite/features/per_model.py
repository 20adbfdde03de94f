"""Numbers about each of several models: its share in what drives a latent, and its own direction.

    h = Σ_m part_m + bias        part_m = Σ_p (x_p − b_p) W_enc^p    over the ports p of model m

A port that is a difference, x_p = x_chat − x_base, adds x_chat W_enc^p to the part of chat and −x_base W_enc^p to that of
base; its −b_p W_enc^p is in the bias.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.codes import SparseCodes
from saelens_lite.codes.products import pair_products
from saelens_lite.config import ModelFacts, StoreConfig
from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError
from saelens_lite.features.info import StoreInfo
from saelens_lite.features.tensors import NONE, FeatureTensors
from saelens_lite.features.weights import logit_effects, unembedding_of
from saelens_lite.model import Models, passes
from saelens_lite.model.models import AnyModel
from saelens_lite.ports import Port, apart, key_of
from saelens_lite.tokens import TokenRows

SCALE_TOKENS = 8192  # on which the size of activations is measured


class ModelTensors(NamedTuple):
    """The numbers about several models, in the order of `StoreInfo.models`.

    A part is the share of a model in a latent's pre-activation. `best` are the contexts in which the model's part is largest
    among those where the latent fires, at most one a row; places and activations are as in FeatureTensors. The last axis of
    every part is the model.

    Norms, delta_norm and cosine are in units in which the activations of every port have the same RMS norm, √width, measured
    on the first tokens of the text. A norm is 0 for a model without a port of its own that is written. delta_norm and cosine
    are empty (n_compared = 0) unless exactly two models have such ports. n_effects is 0 if a model has no direct effects on its
    logits.
    """

    norm: Float[Tensor, "d_sae n_models"]
    bias: Float[Tensor, " d_sae"]  # the pre-activation without all parts
    delta_norm: Float[Tensor, " n_compared"]  # 0: only the second model has a direction; 1: only the first
    cosine: Float[Tensor, " n_compared"]  # between the directions of the two models
    promoted: Int[Tensor, "d_sae n_models n_effects"]
    promoted_effect: Float[Tensor, "d_sae n_models n_effects"]
    suppressed: Int[Tensor, "d_sae n_models n_effects"]
    suppressed_effect: Float[Tensor, "d_sae n_models n_effects"]

    mean_part: Float[Tensor, "d_sae n_models"]  # over all activations
    top_part: Float[Tensor, "d_sae top_n n_models"]
    group_part: Float[Tensor, "d_sae n_groups group_size n_models"]
    random_part: Float[Tensor, "d_sae n_random n_models"]
    best_place: Int[Tensor, "d_sae n_models top_n"]
    best_nearby: Float[Tensor, "d_sae n_models top_n window"]
    best_part: Float[Tensor, "d_sae n_models top_n n_models"]

    def fit(self, info: StoreInfo, t: FeatureTensors, n_vocab: int) -> bool:
        """Return whether the tensors fit a store, and every token and place exists."""
        shape = (info.d_sae, len(info.models))
        if self.norm.shape != shape or self.best_place.shape != (*shape, info.top_n):
            return False
        if not {len(self.delta_norm), len(self.cosine)} <= {0, info.d_sae}:
            return False
        for ids in (self.promoted, self.suppressed):
            if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < n_vocab):
                return False
        there = self.best_place != NONE
        if not (there == (self.best_nearby[..., info.window[0]] > 0)).all():
            return False
        at, n_ctx = self.best_place[there].long(), t.tokens.shape[1]
        return bool(((at >= 0) & (at < t.tokens.numel())).all()) and bool((at % n_ctx < t.length[at // n_ctx]).all())


OF_CODES = ModelTensors._fields[ModelTensors._fields.index("mean_part") :]


def models_of(dictionary: Dictionary, lm: AnyModel) -> tuple[ModelFacts, ...]:
    """Return the facts about those of several models that the ports of a dictionary name; none for a model without a name."""
    if not isinstance(lm, Models):
        return ()
    ports = (*dictionary.reads, *dictionary.writes)
    named = {name for port in ports for name in (port.model, port.minus)}
    return tuple(facts for facts in lm.facts if facts.name in named)


class PartEncoder:
    """The parts of models in the pre-activations of a dictionary.

    Raises:
        ConfigError: the dictionary normalises each activation, so that its pre-activations are not a sum of parts.
    """

    def __init__(self, dictionary: Dictionary, models: tuple[str, ...]):
        if dictionary.token_norm is not None:
            raise ConfigError(
                f"the dictionary reads several models and has token_norm = {dictionary.token_norm}, so no model has a part of "
                "its own in a latent; give a dictionary without token_norm"
            )
        self.models = models
        bias = dictionary.input_bias
        biases = [None] * len(dictionary.reads) if bias is None else apart(bias.detach(), dictionary.reads)
        weights = [part.contiguous() for part in apart(dictionary.W_enc.detach().T, dictionary.reads)]
        self._of_ports = list(zip(dictionary.reads, weights, biases, strict=True))

    @property
    def keys(self) -> list[str]:
        """The activations that the parts are computed from."""
        return [key for port, _, _ in self._of_ports for key in _signs(port)]

    def at(self, codes: SparseCodes, acts: Mapping[str, Float[Tensor, "n _"]]) -> Float[Tensor, "nnz n_models"]:
        """Return the parts at the entries of codes."""
        parts = [torch.zeros_like(codes.value) for _ in self.models]
        for port, weight, bias in self._of_ports:
            for key, (model, sign) in _signs(port).items():
                x = acts[key].to(weight)
                x = x if bias is None or port.minus is not None else x - bias
                parts[self.models.index(model)] += sign * pair_products(codes.support, x, weight)
        return torch.stack(parts, dim=1)


def _signs(port: Port) -> dict[str, tuple[str, int]]:
    """Return the keys of the activations that a port holds, each with its model and sign."""
    signs = {key_of(port.hook, port.model): (port.model, 1)}
    return signs if port.minus is None else signs | {key_of(port.hook, port.minus): (port.minus, -1)}


@torch.no_grad()
def model_weights(dictionary: Dictionary, lm: Models, rows: TokenRows, config: StoreConfig) -> dict[str, Tensor]:
    """Return the fields of ModelTensors that follow from the weights, and from the size of the activations, on the CPU."""
    names = [facts.name for facts in models_of(dictionary, lm)]
    scales = _scales(lm, rows, [port.key for port in dictionary.writes if port.minus is None], config.batch_tokens)
    own: dict[str, list[Tensor]] = {name: [] for name in names}
    for port, part in zip(dictionary.writes, apart(dictionary.W_dec.float(), dictionary.writes), strict=True):
        if port.minus is None:
            own[port.model].append(part * scales[port.key])
    directions = {name: torch.cat(parts, dim=1) for name, parts in own.items() if parts}
    norms = {name: torch.linalg.vector_norm(x, dim=1) for name, x in directions.items()}
    none = torch.zeros_like(dictionary.W_dec[:, 0], dtype=torch.float32)
    compared = {"delta_norm": none[:0], "cosine": none[:0]}
    if len(directions) == 2:
        first, second = directions.values()
        compared["delta_norm"] = delta_norm(*norms.values())
        if first.shape == second.shape:
            compared["cosine"] = torch.cosine_similarity(first, second, dim=1)
    norm = torch.stack([norms.get(name, none) for name in names], dim=1)
    effects = _effects(dictionary, lm, names, config.raw_unembedding)
    return {name: x.cpu() for name, x in {"norm": norm, "bias": _bias(dictionary), **compared, **effects}.items()}


def _scales(lm: Models, rows: TokenRows, keys: list[str], batch_tokens: int) -> dict[str, float]:
    """Return the factors that give the activations of each key the RMS norm √width, from the first tokens of the text."""
    square, n = dict.fromkeys(keys, 0.0), 0
    width: dict[str, int] = {}
    for read in passes.activations(lm, rows, keys, batch_tokens, "as it is") if keys else ():
        n += len(read.row)
        for key, x in read.acts.items():
            square[key] += float(x.double().square().sum())
            width[key] = x.shape[1]
        if n >= SCALE_TOKENS:
            break
    return {key: (width[key] * n / total) ** 0.5 if total else 1.0 for key, total in square.items()}


def delta_norm(first: Float[Tensor, " d_sae"], second: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """Return ½ ((‖d_1‖ − ‖d_2‖) / max(‖d_1‖, ‖d_2‖) + 1): 0 if only the second model has a direction, 1 if only the first."""
    largest = torch.maximum(first, second)
    return torch.where(largest > 0, ((first - second) / largest + 1) / 2, 0.5)


def _bias(dictionary: Dictionary) -> Float[Tensor, " d_sae"]:
    """Return the part of the pre-activations that belongs to no model."""
    total = dictionary.W_dec.new_zeros(dictionary.d_sae) if dictionary.b_enc is None else dictionary.b_enc.clone()
    if dictionary.input_bias is not None:
        biases, weights = apart(dictionary.input_bias, dictionary.reads), apart(dictionary.W_enc.T, dictionary.reads)
        for port, bias, weight in zip(dictionary.reads, biases, weights, strict=True):
            if port.minus is not None:
                total -= weight @ bias
    return total.float()


def _effects(dictionary: Dictionary, lm: Models, names: list[str], raw: bool) -> dict[str, Tensor]:
    """Return the tokens that the last direction of each model promotes and suppresses by the model's own unembedding."""
    directions = list(zip(dictionary.writes, apart(dictionary.W_dec.float(), dictionary.writes), strict=True))
    fields = ("promoted", "promoted_effect", "suppressed", "suppressed_effect")
    of_models = []
    for name in names:
        own = [x for port, x in directions if name in (port.model, port.minus)]
        direction = own[-1] if own else dictionary.W_dec.new_zeros(dictionary.d_sae, 0)
        effects = logit_effects(direction, unembedding_of(lm, name, raw))
        of_models.append([getattr(effects, field).to(dictionary.W_dec.device) for field in fields])
    n = min(one[0].shape[1] for one in of_models)
    return {field: torch.stack([one[i][:, :n] for one in of_models], dim=1) for i, field in enumerate(fields)}
