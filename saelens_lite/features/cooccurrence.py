"""Latents that fire together: counts of pairs, and the most notable partners of each latent.

    pmi(i, j) = ln( (n_ij / m) / (n_i / n · n_j / n) )     how much more often than if they were independent, in nats

n_i of the n tokens fire latent i. n_ij is counted on m tokens: on all, or on a random sample of about 4 million if there are
more. So the time for pairs, m · L0², does not grow with longer texts. A count of c in the sample has a relative standard error
of at most 1 / sqrt(c). Pairs on less than a share of 5 / m of the tokens are mostly missed.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saelens_lite.features.code_log import Lists
from saelens_lite.features.reduce import Block
from saelens_lite.features.tensors import NONE

N_PARTNERS = 10
MIN_TOGETHER = 5  # tokens on which a specific partner must fire too; the PMI of rarer pairs is noise
MAX_CELLS = 1 << 22  # counts of pairs in memory at once
MAX_PAIRS = 1 << 17  # pairs listed at once
DENSE_GAIN = 128  # how many times cheaper a cell of a matrix product is than a pair of a list
RATIO_BITS = 40


class Partners(NamedTuple):
    """The partners of some latents; fields as in FeatureTensors."""

    frequent_partner: Int[Tensor, "latents n_partners"]
    frequent_count: Int[Tensor, "latents n_partners"]
    specific_partner: Int[Tensor, "latents n_partners"]
    specific_count: Int[Tensor, "latents n_partners"]


def partners(block: Block, lists: Lists, count: Int[Tensor, " d_sae"]) -> Partners:
    """Return the partners of the latents of a block; `count` has how often each latent of the dictionary fires."""
    size = max(1, MAX_CELLS // len(count))
    place, latent, n_here = block.place, block.latent, block.count
    if lists.sample.share < 1:
        listed = lists.sample.holds(place)
        place, latent = place[listed], latent[listed]
        n_here = torch.bincount(latent, minlength=block.n)
    token, stops = lists.find(place), n_here.cumsum(0)
    parts = []
    for start in range(0, block.n, size):
        n = min(size, block.n - start)
        first, last = stops[start] - n_here[start], stops[start + n - 1]
        together = pair_counts(token[first:last], latent[first:last] - start, n, block.first + start, lists, len(count))
        parts.append(Partners(*_most(together), *_most(together, count)))
    return Partners(*(torch.cat(field) for field in zip(*parts, strict=True)))


def pair_counts(
    token: Int[Tensor, " entries"], latent: Int[Tensor, " entries"], n: int, first: int, lists: Lists, d_sae: int
) -> Int[Tensor, "n d_sae"]:
    """Return on how many listed tokens latent `first + i` fires together with each other latent; 0 for itself.

    `token` and `latent` are the entries of the n latents, sorted by latent.
    """
    n_here = lists.crow.diff()[token]
    if int(n_here.sum()) * DENSE_GAIN > (len(lists.crow) - 1) * n * d_sae:
        together = _by_product(n, first, lists, d_sae)
    else:
        together = _by_list(token, latent, n_here, n, lists, d_sae)
    together[torch.arange(n), first + torch.arange(n)] = 0
    return together


def _by_list(
    token: Int[Tensor, " entries"],
    latent: Int[Tensor, " entries"],
    n_here: Int[Tensor, " entries"],
    n: int,
    lists: Lists,
    d_sae: int,
) -> Int[Tensor, "n d_sae"]:
    """Count pairs from a list of them, in pieces that fit in the processor's cache."""
    together = np.zeros((n, d_sae), np.int64)
    sizes, begins = n_here.numpy(), lists.crow[token].numpy()
    ends = n_here.cumsum(0) // MAX_PAIRS
    stops = ends.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
    for piece in (slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)):
        size, latents = sizes[piece], latent.numpy()[piece]
        index = np.repeat(begins[piece] - (size.cumsum() - size), size)
        index += np.arange(len(index))
        first, last = latents[0], latents[-1] + 1
        cell = np.repeat((latents - first) * d_sae, size)
        cell += lists.latent[index]
        counts = np.bincount(cell, minlength=(last - first) * d_sae)
        together[first:last] += counts.reshape(last - first, d_sae)
    return torch.from_numpy(together)


def _by_product(n: int, first: int, lists: Lists, d_sae: int) -> Int[Tensor, "n d_sae"]:
    """Count pairs by dense float32 products of zeros and ones over pieces of the text, which are exact below 2²⁴."""
    together = torch.zeros(n, d_sae, dtype=torch.long)
    size = min(max(1, MAX_CELLS // d_sae), 1 << 16)
    n_here = lists.crow.diff()
    for start in range(0, len(n_here), size):
        sizes = n_here[start : start + size]
        here = slice(int(lists.crow[start]), int(lists.crow[start + len(sizes)]))
        latent = torch.from_numpy(lists.latent[here].astype("int64"))
        fires = torch.zeros(len(sizes), d_sae)
        fires[torch.arange(len(sizes)).repeat_interleave(sizes), latent] = 1
        together += (fires[:, first : first + n].T @ fires).long()
    return together


def _most(
    together: Int[Tensor, "n d_sae"], count: Int[Tensor, " d_sae"] | None = None
) -> tuple[Int[Tensor, "n n_partners"], Int[Tensor, "n n_partners"]]:
    """Return the latents with the largest counts (with `count`: largest PMI) and the counts; ties go to the lower number."""
    d_sae = together.shape[1]
    if count is None:
        size = together
    else:  # for a given latent i, the PMI grows with n_ij / n_j
        share = (together / count.clamp(min=1).double()).masked_fill_(together < MIN_TOGETHER, 0)
        size = (share * (1 << RATIO_BITS)).long()
    best = (size * d_sae + torch.arange(d_sae - 1, -1, -1)).topk(min(N_PARTNERS, d_sae), dim=1).values
    partner = torch.where(best < d_sae, NONE, d_sae - 1 - best % d_sae)
    n_together = torch.where(partner == NONE, 0, together.gather(1, partner.clamp(min=0)))
    return partner.int(), n_together.int()
