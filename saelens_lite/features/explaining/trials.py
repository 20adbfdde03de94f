"""The contexts on which an explanation is scored: as many in which it should be confirmed as in which it should not.

Detection: contexts in which the latent fires, and silent ones. Fuzzing: contexts in which it fires, once with the tokens on
which it fires marked, and once with as many others. The wrong marks are the right ones moved, and the text shown is cut so that
both are at the same places in it: where marks are says nothing.

Contexts that overlap are no two contexts, so the intervals would be too narrow. They are kept apart from one another, also
those that fire from silent and hard ones, unless fewer than 4 of a sort are left.
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
    draw, reach = random.Random(mixed_seed("trials", seed, latent, kind)), sum(store.info.window)
    held_out = held_out_contexts(store, latent)
    fired = _spread([one for one in held_out if one.group is not None], (), reach)
    places = [one.example for one in fired]
    firing = _from_all_groups(fired, draw)
    hard = _hard(store, latent)
    if kind == "detection":
        quiet = _spread([one for one in held_out if one.group is None], places, reach)
        silent, places = [one.example for one in quiet], [*places, *(one.example for one in quiet)]
        draw.shuffle(silent)
        n_easy = min(n, len(firing), len(silent))
        trials = [Posed(one.example, True, group=one.group) for one in firing[:n_easy]]
        trials += [Posed(example, False) for example in silent[:n_easy]]
        blocks, lacking = (
            [trials],
            f"{len(firing)} held-out contexts in which it fires, and {len(silent)} in which it is silent",
        )
    else:
        pairs = [(one, pair) for one in firing if (pair := _pair(one.example, draw))]
        n_easy, blocks = min(n, len(pairs)), [[], []]
        for i, (one, (right, wrong)) in enumerate(pairs[:n_easy]):
            blocks[i % 2].append(Posed(right.example, True, right.marked, group=one.group))
            blocks[1 - i % 2].append(Posed(wrong.example, False, wrong.marked))
        lacking = f"{len(pairs)} held-out contexts with enough tokens of both sorts, those on which it fires and others"
    apart = [one.example for one in _spread([HeldOut(example, None) for example in hard], places, reach)]
    draw.shuffle(apart)
    for i, example in enumerate(apart[:n]):
        cut = _Cut(example, ()) if kind == "detection" else next(iter(_pair(example, draw)), None)
        if cut:
            blocks[i % len(blocks)].append(Posed(cut.example, False, cut.marked, is_hard=True))
    if n_easy < FEWEST:
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


def _spread(contexts: Sequence[HeldOut], others: Sequence[Example], reach: int) -> list[HeldOut]:
    """Return contexts, in the order of the text, that overlap neither with one another nor with others, if enough do not."""
    taken: dict[int, list[int]] = {}
    for other in others:
        taken.setdefault(other.row, []).append(other.position)
    apart = []
    for one in contexts:
        places = taken.setdefault(one.example.row, [])
        if all(abs(place - one.example.position) > reach for place in places):
            places.append(one.example.position)
            apart.append(one)
    return apart if len(apart) >= FEWEST else list(contexts)


class _Cut(NamedTuple):
    """A part of a context, and the marked tokens of it."""

    example: Example
    marked: tuple[int, ...]


def _firing(example: Example) -> set[int]:
    """Return the tokens on which the latent fires, and those that complete the character of a token without text."""
    firing = {i for i, value in enumerate(example.values) if value > 0}
    for i, token in enumerate(example.tokens[:-1]):
        if i in firing and not token:
            firing.add(i + 1)
    return firing


def _pair(example: Example, draw: random.Random) -> tuple[_Cut, ...]:
    """Return two parts of a context with marks at the same places: where the latent fires, and where it does not.

    The second part is the first one moved by some tokens, of all numbers of them for which the first one has the peak, and the
    marks of the second one are on tokens with text on which the latent does not fire. No part begins or ends inside of a
    character. Returns nothing if there is no such number.
    """
    n, firing = len(example.tokens), _firing(example)
    shown = {i for i in firing if example.tokens[i]}  # the others are marked with the token that completes them
    peak = next((i for i in range(example.peak, n) if i in shown), n)
    pairs, moves = [], range(-peak, n - peak) if peak < n else ()
    for move in moves:
        first, last = max(0, -move), min(n, n - move)
        marked = [i for i in sorted(shown) if first <= i < last]
        ends = {first - 1, last - 1, first + move - 1, last + move - 1} - {-1, n - 1}
        others = [i + move for i in marked]
        if move and all(example.tokens[i] for i in (*others, *ends)) and not firing & set(others):
            pairs.append((first, last, move, marked))
    if not pairs:
        return ()
    first, last, move, marked = draw.choice(pairs)
    marks = tuple(i - first for i in marked)
    return tuple(_Cut(_part(example, first + by, last + by, peak + by), marks) for by in (0, move))


def _part(example: Example, first: int, last: int, peak: int) -> Example:
    """Return the tokens of a context from `first` to before `last`. `peak` is the token to take for the peak."""
    return example._replace(
        tokens=example.tokens[first:last],
        values=example.values[first:last],
        peak=peak - first,
        value=example.values[peak],
        position=example.position - example.peak + peak,
    )


def _hard(store: StoreQueries, latent: int) -> list[Example]:
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
    return sorted(silent, key=lambda one: (one.row, one.position))
