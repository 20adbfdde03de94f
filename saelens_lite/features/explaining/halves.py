"""Two halves of a latent's contexts: an explanation is made from one half and scored on the other."""

from typing import NamedTuple

from saelens_lite.features.queries import StoreQueries
from saelens_lite.features.summary import Example

TOP = -1  # the group of the strongest contexts


class HeldOut(NamedTuple):
    """A context to judge. `group` counts from the strongest group; -1 is a top context, None one without firing."""

    example: Example
    group: int | None


class Shown(NamedTuple):
    """The contexts that an explainer may see: the strongest ones, and those of each group of activations, strongest first."""

    top: list[Example]
    groups: list[list[Example]]

    @property
    def all(self) -> list[Example]:
        """All of the contexts."""
        return [*self.top, *(example for group in self.groups for example in group)]


def shown_contexts(store: StoreQueries, latent: int) -> Shown:
    """Return the half of a latent's contexts that an explanation is made from."""
    groups = [group.examples[::2] for group in store.quantile_examples(latent)]
    return Shown(store.top_examples(latent)[::2], groups)


def held_out_contexts(store: StoreQueries, latent: int) -> list[HeldOut]:
    """Return the other half, with silent contexts, in the order of the text. None of them overlaps with a shown one."""
    shown = shown_contexts(store, latent).all
    kinds = {TOP: store.top_examples(latent)}
    kinds |= {number: group.examples for number, group in enumerate(store.quantile_examples(latent))}
    held_out = [HeldOut(example, kind) for kind, examples in kinds.items() for example in examples[1::2]]
    held_out += [HeldOut(example, None) for example in store.silent_examples(latent)]
    reach = sum(store.info.window)
    apart: dict[tuple[int, int], HeldOut] = {}
    for one in held_out:
        row, position = one.example.row, one.example.position
        if not any(other.row == row and abs(other.position - position) <= reach for other in shown):
            apart.setdefault((row, position), one)
    return [apart[place] for place in sorted(apart)]
