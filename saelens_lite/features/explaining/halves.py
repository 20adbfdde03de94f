"""Two halves of a latent's contexts: an explanation is made from one half and scored on the other."""

from collections.abc import Iterable
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
    """Return the other half, with those drawn from all activations and silent ones, in the order of the text.

    None of them overlaps with a shown one or has the same text, and no two have the same text.
    """
    groups = store.quantile_examples(latent)
    kinds = {TOP: store.top_examples(latent)} | {number: group.examples for number, group in enumerate(groups)}
    held_out = [HeldOut(example, kind) for kind, examples in kinds.items() for example in examples[1::2]]
    for example in store.random_examples(latent):
        held_out.append(HeldOut(example, min(sum(example.value < group.low for group in groups), len(groups) - 1)))
    held_out += [HeldOut(example, None) for example in store.silent_examples(latent)]
    places = {(one.example.row, one.example.position): one for one in reversed(held_out)}
    apart = apart_from(shown_contexts(store, latent).all, (one.example for one in places.values()), sum(store.info.window))
    by_text = {example.tokens: places[example.row, example.position] for example in sorted(apart, key=_place, reverse=True)}
    return sorted(by_text.values(), key=lambda one: _place(one.example))


def apart_from(shown: Iterable[Example], examples: Iterable[Example], reach: int) -> list[Example]:
    """Return the contexts that do not overlap with a shown one and do not have the text of one.

    Args:
        reach: positions that two contexts of one row may be apart and still overlap.
    """
    shown = list(shown)
    texts = {one.tokens for one in shown}
    return [
        one
        for one in examples
        if one.tokens not in texts
        and not any(other.row == one.row and abs(other.position - one.position) <= reach for other in shown)
    ]


def _place(example: Example) -> tuple[int, int]:
    return example.row, example.position
