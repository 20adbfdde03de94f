"""The products of a training step that need only the support, with their backward passes.

With x the centred input, S the codes (value v at the support) and e the gradient at x_hat:

    x_hat = S W_dec            dv = ⟨W_dec[latent], e[row]⟩        dW_dec = Sᵀ e
    h     = x W_enc + b_enc    dW_enc = xᵀ G    db_enc = Σ_rows G    db_dec = −W_enc db_enc

where G holds the gradient at h on the support. Both weight gradients use one index, the support sorted by latent.
A dense support uses dense products instead, with bfloat16 factors and float32 sums if `halves` allows it. W_enc must be the
transpose of a contiguous [d_sae d_in] tensor, so that its gradient needs no copy.

The support alone fixes the order of every sum, on every device: nothing here uses atomics. The pairs are sorted by latent,
and Triton kernels, embedding_bag's forward pass or numpy sum their segments. Dense products and torch.sparse.sampled_addmm
come from BLAS, cuBLAS and cuSPARSE, which repeat their results on one device and stream.
"""

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelens_lite.codes import Support, gpu, support_of_mask
from saelens_lite.devices import asynchronous

# Share of the pairs above which dense products are faster: measured on two CPU cores, and derived for an H100 from the times of
# both kinds of products, without bfloat16 factors and with them
DENSE_ABOVE = {"cpu": 0.15, "gpu": 0.07, "gpu in halves": 0.01}


with warnings.catch_warnings():  # torch warns once per process that its compressed rows are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], torch.empty(0), (1, 1), check_invariants=False)


def is_dense(support: Support, d_sae: int, halves: bool) -> bool:
    """Return whether dense products are faster for a support: over the latents that fire, or on a GPU over all that could."""
    n_pairs = len(support.latent)
    if asynchronous(support.latent):
        width = d_sae if support.among is None else len(support.among)
        return n_pairs > DENSE_ABOVE["gpu in halves" if halves else "gpu"] * support.n_rows * width
    return n_pairs > 0 and n_pairs > DENSE_ABOVE["cpu"] * support.n_rows * len(support.used)


def _mm(a: Float[Tensor, "m k"], b: Float[Tensor, "k n"], halves: bool) -> Float[Tensor, "m n"]:
    """Return a b in float32. halves: of both factors rounded to bfloat16."""
    if not halves:
        return a @ b
    if a.is_cuda:
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    return a.bfloat16().float() @ b.bfloat16().float()  # bfloat16 products are slow on a CPU


def _in_halves(x: Tensor, halves: bool) -> bool:
    """Return whether dense products round their factors: if allowed, on a GPU."""
    return halves and x.dtype == torch.float32 and asynchronous(x)


def sparse_product(
    support: Support, value: Float[Tensor, " nnz"], weight: Float[Tensor, "d_sae d"], halves: bool = False
) -> Float[Tensor, "batch d"]:
    """Return S weight."""
    if not len(value):
        return weight.new_zeros(support.n_rows, weight.shape[1])
    if is_dense(support, len(weight), halves):
        dense, halves = support.as_dense(len(weight)), _in_halves(weight, halves)
        return _mm(dense.matrix(value, halves), dense.rows_of(weight), halves)
    if kernels := gpu.kernels(weight):
        return kernels.decode(support, value, weight)
    return F.embedding_bag(
        support.latent32, weight, support.crow32, mode="sum", per_sample_weights=value, include_last_offset=True
    )


def transposed_product(
    support: Support, value: Float[Tensor, " nnz"], right: Float[Tensor, "batch d"], d_sae: int, halves: bool = False
) -> Float[Tensor, "d_sae d"]:
    """Return Sᵀ right."""
    if not len(value):
        return right.new_zeros(d_sae, right.shape[1])
    if is_dense(support, d_sae, halves):
        dense, halves = support.as_dense(d_sae), _in_halves(right, halves)
        return dense.all_rows(_mm(dense.matrix(value, halves).T, right, halves), d_sae)
    if kernels := gpu.kernels(right):
        return kernels.transposed_product(support, value, right, d_sae)
    return F.embedding_bag(
        support.row_by_latent,
        right,
        support.by_latent(d_sae),
        mode="sum",
        per_sample_weights=value[support.order],
        include_last_offset=True,
    )


def pair_products(
    support: Support, left: Float[Tensor, "batch d"], right: Float[Tensor, "d_sae d"], halves: bool = False
) -> Float[Tensor, " nnz"]:
    """Return ⟨left[row], right[latent]⟩ at each pair."""
    if not len(support.latent):
        return left.new_zeros(0)
    if is_dense(support, len(right), halves):
        dense, halves = support.as_dense(len(right)), _in_halves(left, halves)
        return _mm(left, dense.rows_of(right).T, halves).flatten().index_select(0, dense.flat)
    if kernels := gpu.kernels(left):
        return kernels.pair_products(support, left, right)
    zeros = left.new_zeros(len(support.latent))
    shape = (support.n_rows, len(right))
    pattern = torch.sparse_csr_tensor(support.crow32, support.latent32, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


def latent_sums(support: Support, value: Float[Tensor, " nnz"], d_sae: int, halves: bool = False) -> Float[Tensor, " d_sae"]:
    """Sum the values of each latent in a fixed order."""
    if value.device.type == "cpu" and not asynchronous(value):
        sums = np.bincount(support.latent.numpy(), value.double().numpy(), d_sae)
        return torch.from_numpy(sums).to(value.dtype)
    return _sorted_sums(support, value, d_sae, halves)


def _sorted_sums(support: Support, value: Float[Tensor, " nnz"], d_sae: int, halves: bool = False) -> Float[Tensor, " d_sae"]:
    """Sum the values of each latent over segments of the pairs sorted by latent, or over the columns of a dense matrix."""
    return transposed_product(support, value, value.new_ones(support.n_rows, 1), d_sae, halves)[:, 0]


def _row_sums(latent: Int[Tensor, " nnz"], rows: Float[Tensor, "nnz d"], n: int) -> Float[Tensor, "n d"]:
    """Sum the rows of each latent in a fixed order."""
    pairs = Support(torch.arange(len(latent) + 1, device=latent.device), latent)
    return transposed_product(pairs, rows.new_ones(len(latent)), rows, n)


def read_at(tensor: Float[Tensor, "n ..."], index: Int[Tensor, " nnz"]) -> Float[Tensor, "nnz ..."]:
    """Return tensor[index]; differentiable, and its gradient is summed in a fixed order on every device.

    Indexing and index_select sum gradients by atomics on a GPU, so the same seed would not give the same bytes. If `index` is
    the `latent` of a support, the order of that support is reused.
    """
    return _ReadAt.apply(tensor, index)


def sum_at(value: Float[Tensor, " nnz"], index: Int[Tensor, " nnz"], n: int) -> Float[Tensor, " n"]:
    """Return the sum of the values that belong to each of n indices; differentiable, in a fixed order on every device."""
    return _SumAt.apply(value, index, n)


class _ReadAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, index):
        ctx.n, ctx.support = len(tensor), Support.of_latent(index)
        return tensor.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if g.ndim == 1:
            return latent_sums(ctx.support, g.contiguous(), ctx.n), None
        return _row_sums(ctx.support.latent, g.flatten(1), ctx.n).reshape(ctx.n, *g.shape[1:]), None


class _SumAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, index, n):
        ctx.save_for_backward(index)
        return latent_sums(Support.of_latent(index), value.contiguous(), n)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.index_select(0, index), None, None


class Decode(torch.autograd.Function):
    """The product x_hat = S W_dec, from values at a support."""

    @staticmethod
    def forward(ctx, value, W_dec, support, halves=False):
        ctx.support, ctx.halves = support, halves
        ctx.save_for_backward(value, W_dec)
        return sparse_product(support, value, W_dec, halves)

    @staticmethod
    @once_differentiable
    def backward(ctx, e):
        value, W_dec = ctx.saved_tensors
        e = e.contiguous()
        dv = pair_products(ctx.support, e, W_dec, ctx.halves) if ctx.needs_input_grad[0] else None
        dW_dec = transposed_product(ctx.support, value, e, len(W_dec), ctx.halves) if ctx.needs_input_grad[1] else None
        return dv, dW_dec, None, None


def _encoder_gradients(ctx, support: Support, g: Float[Tensor, " nnz"], halves: bool = False) -> tuple[Tensor | None, ...]:
    """Return the gradients of (W_enc, b_enc, input bias, x), given gradients g at the pre-activations of a support."""
    W_enc, centred = ctx.saved_tensors
    d_sae = W_enc.shape[1]
    db_enc = latent_sums(support, g, d_sae, halves)
    dW_enc = transposed_product(support, g, centred, d_sae, halves).T if ctx.needs_input_grad[0] else None
    dx = sparse_product(support, g, W_enc.T, halves) if ctx.needs_input_grad[3] else None
    d_input_bias = -(W_enc @ db_enc) if ctx.needs_input_grad[2] else None
    return dW_enc, db_enc if ctx.needs_input_grad[1] else None, d_input_bias, dx


class PreAt(torch.autograd.Function):
    """The pre-activations at a support, which are already computed."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, input_bias, x, value, centred, support, halves=False):
        ctx.support, ctx.halves = support, halves
        ctx.save_for_backward(W_enc, centred)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return *_encoder_gradients(ctx, ctx.support, g, ctx.halves), None, None, None, None


class PreDense(torch.autograd.Function):
    """All pre-activations, which are already computed. For rules that define only their activation function."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, input_bias, x, pre, centred):
        ctx.save_for_backward(W_enc, centred)
        return pre.view_as(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        support = support_of_mask(g != 0)
        return *_encoder_gradients(ctx, support, g.flatten()[support.flat(g.shape[1])]), None, None
