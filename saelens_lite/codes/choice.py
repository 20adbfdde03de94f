"""The largest pre-activations of each row, or of a whole batch. Of equal ones, the first."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from saelens_lite.codes import gpu, support_of_mask
from saelens_lite.codes.support import Support

GROUPS = 1024  # groups of latents; the maximum of each is looked at first
SAMPLED_ROWS = 64  # rows that give the first bound in the search for the largest entries of a batch


def largest_latents(pre: Float[Tensor, "batch d_sae"], k: int) -> Int[Tensor, "batch k"]:
    """Return the latents of the k largest pre-activations of each row, in no particular order."""
    if kernels := gpu.kernels(pre):
        return kernels.topk(pre, k)
    if k >= pre.shape[1]:
        return torch.arange(pre.shape[1], device=pre.device).expand(len(pre), -1)
    value, latent = _largest(pre, k + 1)
    table = latent[:, :k]
    ties = (value[:, k - 1] == value[:, k]).nonzero().squeeze(1)  # one more entry equals the last
    if len(ties):
        table[ties] = pre.index_select(0, ties).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return table


def _largest(pre: Float[Tensor, "batch d_sae"], k: int) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """Return the k largest pre-activations of each row, the largest first, and their latents."""
    n_groups = GROUPS if pre.device.type == "cpu" and pre.shape[1] % GROUPS == 0 else 0
    if 2 * k > n_groups or pre.shape[1] < 4 * n_groups:
        return pre.topk(k, dim=1)
    groups = rearrange(pre, "batch (member group) -> batch member group", group=n_groups)
    best = groups.amax(1).topk(k, dim=1, sorted=False).indices  # the k largest are in the groups of the k largest maxima
    first = torch.arange(0, pre.shape[1], n_groups, device=pre.device)
    candidates = rearrange(best[:, None] + first[:, None], "batch member k -> batch (member k)")
    value, place = pre.gather(1, candidates).topk(k, dim=1)
    return value, candidates.gather(1, place)


def largest_positive_pairs(pre: Float[Tensor, "batch d_sae"], n: int) -> Support:
    """Return the n largest positive entries of a whole batch, or all if there are fewer.

    On a GPU, if there are fewer, the largest of the others are there too, because their number is known without waiting.
    """
    if kernels := gpu.kernels(pre):
        return Support(*kernels.n_largest(pre, min(n, pre.numel())))
    candidates = support_of_mask(pre > _lower_bound(pre, n))
    if len(candidates.latent) < n:
        candidates = support_of_mask(pre > 0)
    value = pre[candidates.row, candidates.latent]
    if len(value) <= n:
        return candidates
    nth = value.kthvalue(len(value) - n + 1).values
    keep = value > nth
    keep[(value == nth).nonzero().squeeze(1)[: n - int(keep.sum())]] = True
    return candidates.where(keep)


def _lower_bound(pre: Float[Tensor, "batch d_sae"], n: int) -> Float[Tensor, ""]:
    """Return a number ≥ 0 that about 2n entries exceed, estimated from some rows, because sorting a whole batch is slow."""
    sample = pre[:: max(1, len(pre) // SAMPLED_ROWS)].flatten()
    above = 2 * n * len(sample) // pre.numel()
    return sample.topk(min(above, len(sample) - 1) + 1, sorted=True).values[-1].clamp(min=0)
