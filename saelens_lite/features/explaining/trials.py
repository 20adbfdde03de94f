"""The contexts on which an explanation is scored: as many in which it should be confirmed as in which it should not.

Detection: contexts in which the latent fires, and silent ones. Fuzzing: contexts in which it fires, once with the tokens on
which it fires marked, and once with as many others.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from saelens_lite.features.explaining.halves import HeldOut, apart_from, held_out_contexts, shown_contexts
from saelens_lite.features.explaining.scores import Kind
from saelens_lite.features.queries import StoreQueries
from saelens_lite.features.summary import Example
from saelens_lite.seeds import mixed_seed

FEWEST = 4  # contexts of each kind, below which a score says nothing


class Posed(NamedTuple):
    """A context to judge: whether the latent fires in it, or for fuzzing, exactly on the `marked` tokens.

    `is_hard` is true for a context in which the nearest latent fires. `group` is as in `HeldOut`.
    """

    example: Example
    fires: bool
    marked: tuple[int, ...] = ()
    is_hard: bool = False
    group: int | None = None


def trials_of(store: StoreQueries, latent: int, kind: Kind, n: int, seed: int) -> list[list[Posed]] | str:
    """Return up to n contexts with each answer, and up to n hard ones, in random order. If there are too few, say so in words.

    Contexts in different lists must not be in one question: they are the same context with other tokens marked.
    """
    draw = random.Random(mixed_seed("trials", seed, latent, kind))
    held_out = held_out_contexts(store, latent)
    firing = _from_all_groups([one for one in held_out if one.group is not None], draw)
    silent = [one.example for one in held_out if one.group is None]
    draw.shuffle(silent)
    hard = _hard(store, latent, draw)[:n]
    if kind == "detection":
        n = min(n, len(firing), len(silent))
        trials = [Posed(one.example, True, group=one.group) for one in firing[:n]]
        trials += [Posed(example, False) for example in silent[:n]]
        blocks = [trials + [Posed(example, False, is_hard=True) for example in hard]]
        lacking = f"{len(firing)} held-out contexts in which it fires, and {len(silent)} in which it is silent"
    else:
        pairs = [(one, marks) for one in firing if (marks := _other_marks(one.example, draw))]
        n = min(n, len(pairs))
        blocks = [[], []]
        for i, (one, marks) in enumerate(pairs[:n]):
            blocks[i % 2].append(Posed(one.example, True, _firing(one.example), group=one.group))
            blocks[1 - i % 2].append(Posed(one.example, False, marks))
        for i, example in enumerate(hard):
            blocks[i % 2].append(Posed(example, False, _firing(example), is_hard=True))
        lacking = f"{len(pairs)} held-out contexts with enough tokens of both sorts, those on which it fires and others"
    if n < FEWEST:
        return f"{lacking}; expected {FEWEST} of each, so give the store more text"
    for trials in blocks:
        draw.shuffle(trials)
    return blocks


def _from_all_groups(firing: Sequence[HeldOut], draw: random.Random) -> list[HeldOut]:
    """Return contexts in turn from the top and from each group of activations, in random order within each."""
    by_group: dict[int, list[HeldOut]] = {}
    for one in firing:
        by_group.setdefault(one.group, []).append(one)
    for group in by_group.values():
        draw.shuffle(group)
    longest = max(map(len, by_group.values()), default=0)
    return [group[i] for i in range(longest) for _, group in sorted(by_group.items()) if i < len(group)]


def _firing(example: Example) -> tuple[int, ...]:
    return tuple(i for i, value in enumerate(example.values) if value > 0)


def _other_marks(example: Example, draw: random.Random) -> tuple[int, ...]:
    """Return as many tokens as those on which the latent fires, on which it does not; none if there are too few."""
    firing = _firing(example)
    others = [i for i, (token, value) in enumerate(zip(example.tokens, example.values, strict=True)) if token and not value > 0]
    return tuple(sorted(draw.sample(others, len(firing)))) if len(firing) <= len(others) else ()


def _hard(store: StoreQueries, latent: int, draw: random.Random) -> list[Example]:
    """Return contexts in which the nearest latent that ever fires does, and this one is silent.

    They have the activations of the nearest latent. Only a store with the table of its codes knows them; others have none.
    """
    if store.codes is None:
        return []
    nearest = [other for other, cosine in store.similar(latent) if cosine > 0 and int(store.tensors.count[other])]
    if not nearest:
        return []
    other = nearest[0]
    examples = [*store.top_examples(other), *store.random_examples(other)]
    examples += [example for group in store.quantile_examples(other) for example in group.examples]
    by_text = {example.tokens: example for example in reversed(examples)}
    apart = apart_from(shown_contexts(store, latent).all, by_text.values(), sum(store.info.window))
    rows = ", ".join(map(str, sorted({example.row for example in apart})))
    if not rows:
        return []
    select = f"select row, position from codes where latent = {latent} and value > 0 and row in ({rows})"
    fired = store.codes.query(select, store.vocabulary).to_pydict()
    places = set(zip(fired["row"], fired["position"], strict=True))
    silent = [one for one in apart if not any((one.row, one.position - one.peak + i) in places for i in range(len(one.tokens)))]
    silent.sort(key=lambda one: (one.row, one.position))
    draw.shuffle(silent)
    return silent
