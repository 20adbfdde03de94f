"""The modules between a model's last block and its logits, measured on one forward pass over a few tokens.

    logits = W_U norm(x) + bias         x: output of the last block; W_U: weight of the head, times the projection if any

Post-norm models have no norm there, models with narrow embeddings have a projection, and quantised heads have no float weight.
"""

from contextlib import ExitStack
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelens_lite.errors import ConfigError
from saelens_lite.model.hooks import Architecture, alone
from saelens_lite.model.identities import Noted, is_sum, probe_tokens
from saelens_lite.model.spread import weight_of

UNIT_VECTORS = 1024  # per call of the head
QUANTISED = 0.05  # a head's own products may be off by this much of the largest
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Readout(NamedTuple):
    """The modules that the output of a model's last block goes through, and the factors that multiply it on the way.

    `before` applies before the norm, `after` between norm and head.
    """

    norm: nn.Module | None
    projection: nn.Module | None
    head: nn.Module
    before: float
    after: float
    head_in: Float[Tensor, "tokens d"]  # from the pass, to check weights that are computed from the head's outputs
    head_out: Float[Tensor, "tokens d_vocab"]

    @classmethod
    def of(cls, module: nn.Module, known: Architecture) -> "Readout":
        """Find the modules between the last block and the logits.

        Raises:
            ConfigError: there is more than a norm and a projection.
        """
        head = module.get_output_embeddings()
        blocks = known.components.get("blocks")
        if head is None or blocks is None:
            raise _refusal(module, f"it has no {'unembedding' if head is None else 'one stack of blocks'}")
        last = module.get_submodule(blocks.name)[-1]
        inside = {part for block in module.get_submodule(blocks.name) for part in block.modules()}
        outside = [part for part in module.modules() if part not in inside and not [*part.children()]]
        norm = _part(module, known, "ln_final")
        noted = Noted()
        with alone(), torch.no_grad(), ExitStack() as stack:
            noted.note([last, head, *outside, *([] if norm is None else [norm])], stack)
            try:
                module(probe_tokens(module), use_cache=False)
            except Exception as error:
                raise _refusal(module, f"a forward pass on token ids fails ({' '.join(str(error).split())[:200]})") from error
        stream, head_in, head_out = noted.of(last, "out"), noted.of(head, "in"), noted.of(head, "out")
        if stream is None or head_in is None or head_out is None:
            raise _refusal(module, "its last block or its head does not return one tensor")
        before: float | None = 1.0
        if norm is not None:
            before, stream = _factor(noted.of(norm, "in"), stream), noted.of(norm, "out")
        if before is None or stream is None:
            raise _refusal(module, "the output of its last block does not go straight into its final norm")
        after = _factor(head_in, stream)
        if after is not None:
            return cls(norm, None, head, before, after, head_in, head_out)
        for part in outside:
            if type(part) is nn.Linear and is_sum(noted.of(part, "in"), stream) and is_sum(head_in, noted.of(part, "out")):
                return cls(norm, part, head, before, 1.0, head_in, head_out)
        raise _refusal(module, "there is more than a norm and a projection between its last block and its head")

    @torch.no_grad()
    def weight(self) -> Float[Tensor, "d_vocab d_model"]:
        """Return the matrix that multiplies the normalised stream, in float32.

        Raises:
            ConfigError: the head is not linear.
        """
        weight = self._head_weight()
        if self.projection is not None:
            weight = weight @ weight_of(self.projection).float().to(weight.device)
        return weight * self.after if self.after != 1 else weight

    def _head_weight(self) -> Float[Tensor, "d_vocab d"]:
        weight = weight_of(self.head)
        if type(self.head) is nn.Linear and type(weight) in (nn.Parameter, Tensor) and weight.dtype in FLOATS:
            return weight.float()
        try:
            return self._from_outputs()
        except ConfigError:
            raise
        except Exception as error:  # kernels of quantised weights fail in many ways
            raise ConfigError(
                f"cannot read the weight of the head, a {type(self.head).__name__}: {' '.join(str(error).split())[:200]}"
            ) from error

    def _from_outputs(self) -> Float[Tensor, "d_vocab d"]:
        """Return the head's outputs for unit vectors, one column each."""
        x = self.head_in
        units = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        with alone():
            bias = self.head(torch.zeros_like(units[:1])).float()
            weight = torch.cat([self.head(some).float() - bias for some in units.split(UNIT_VECTORS)]).T
        out, product = self.head_out.float() - bias, x.float() @ weight.T
        if not (out - product).abs().max() <= QUANTISED * out.abs().max():
            raise ConfigError(f"the head, a {type(self.head).__name__}, is not linear: no weight gives its outputs")
        return weight


def _part(module: nn.Module, known: Architecture, key: str) -> nn.Module | None:
    try:
        return module.get_submodule(known.components[key].name)
    except (KeyError, AttributeError):  # OPT has None for the norm it lacks
        return None


def _factor(value: Tensor | None, of: Tensor) -> float | None:
    """Return the positive factor c with value = c · of, or None if there is no such factor."""
    if value is None or value.shape != of.shape:
        return None
    if is_sum(value, of):
        return 1.0
    exact, exact_of = value.cpu().double(), of.cpu().double()
    factor = float((exact * exact_of).sum() / exact_of.square().sum())
    return factor if factor > 0 and is_sum(value, of.cpu() * factor) else None


def _refusal(module: nn.Module, reason: str) -> ConfigError:
    return ConfigError(
        f"directions of the residual stream have no direct effects on the logits of {type(module).__name__}: {reason}; "
        "where a metric is asked for, give metric="
    )
