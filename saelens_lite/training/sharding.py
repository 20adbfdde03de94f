"""The latents of one process: its slices of all tensors that have an entry for each latent, and the whole tensors again.

Process number r of W holds the latents r · d_sae / W … (r + 1) · d_sae / W − 1.
"""

import torch
from torch import Tensor

from saelens_lite.dictionary import Dictionary
from saelens_lite.processes import Team

WEIGHTS = frozenset({"W_enc", "W_dec", "b_enc"})
COUNTERS = frozenset({"since_fired", "fire_count", "dead"})


class OwnLatents:
    """The latents of this process among those of a whole dictionary. Tensors are named as in the state of a trainer.

    Such names are "dictionary.W_enc", "adam.W_dec.exp_avg" and "since_fired".
    """

    def __init__(self, dictionary: Dictionary, team: Team):
        self.team, self.d_sae = team, dictionary.d_sae
        self.n = self.d_sae // team.world
        of_rule = {name: x for name, x in _tensors(dictionary).items() if name.startswith("rule.")}
        self._names = WEIGHTS | {name for name, x in of_rule.items() if x.shape[:1] == (self.d_sae,)}

    @property
    def is_part(self) -> bool:
        """True if other processes hold other latents."""
        return self.team.world > 1

    def divides(self, name: str) -> bool:
        """Return whether a tensor has an entry for each latent."""
        if name.startswith("adam."):
            parameter, _, moment = name.removeprefix("adam.").rpartition(".")
            return parameter in self._names and moment != "step"
        return name in COUNTERS or name.removeprefix("dictionary.") in self._names

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """Return the part of a whole tensor that belongs to the latents of this process, as a view."""
        if not self.is_part or not self.divides(name):
            return tensor
        return tensor.narrow(latent_axis(name), self.team.rank * self.n, self.n)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor, gathered from all processes."""
        if not self.is_part or not self.divides(name):
            return part
        rows = self.team.stack(part.movedim(latent_axis(name), 0)).flatten(0, 1)
        return rows.movedim(0, latent_axis(name))

    @torch.no_grad()
    def cut_(self, dictionary: Dictionary) -> None:
        """Cut the parameters and buffers of a whole dictionary to the latents of this process."""
        for name, tensor in _tensors(dictionary).items():
            if self.is_part and self.divides(f"dictionary.{name}"):
                own = self.own(f"dictionary.{name}", tensor.data)
                tensor.data = own.T.clone().T if name == "W_enc" else own.clone()  # the row of a latent stays contiguous


def _tensors(dictionary: Dictionary) -> dict[str, Tensor]:
    """Return the parameters and buffers of a dictionary, also those that are not saved."""
    return {**dict(dictionary.named_parameters()), **dict(dictionary.named_buffers())}


def latent_axis(name: str) -> int:
    """Return the axis of the latents in a tensor that has an entry for each of them."""
    return 1 if name == "dictionary.W_enc" else 0


def joined(name: str, parts: list[Tensor]) -> Tensor:
    """Return a whole tensor, given the parts of all processes."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, latent_axis(name))
