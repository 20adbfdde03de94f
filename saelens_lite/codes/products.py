"""The products of a training step that need only the support: what is left after the one dense product, with backward.

With x the centred input, S the codes (value v at the support) and e the gradient at x_hat:

    x_hat = S W_dec            dv = ⟨W_dec[latent], e[row]⟩        dW_dec = Sᵀ e
    h     = x W_enc + b_enc    dW_enc = xᵀ G    db_enc = Σ_rows G    db_dec = −W_enc db_enc

where G holds the gradient at h on the support. Both weight gradients go through one index, the support sorted by latent.
Where the support is dense, the same quantities come from dense products. W_enc is expected as the transpose of a
contiguous [d_sae d_in] tensor, so that its gradient needs no copy.
"""

import warnings

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saelens_lite.codes import Support, support_of_mask

DENSE_ABOVE = 0.15  # share of the pairs above which dense products are faster on a CPU


with warnings.catch_warnings():  # torch says once in a process that its compressed rows are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], torch.empty(0), (1, 1), check_invariants=False)


def is_dense(support: Support, d_sae: int) -> bool:
    """Whether dense products are faster for a support."""
    return len(support.latent) > DENSE_ABOVE * support.n_rows * d_sae


def to_dense(support: Support, value: Float[Tensor, " nnz"], d_sae: int) -> Float[Tensor, "batch d_sae"]:
    """The values at their pairs, zeros elsewhere; without gradient."""
    flat = value.new_zeros(support.n_rows * d_sae)
    return flat.index_copy_(0, support.flat(d_sae), value).reshape(support.n_rows, d_sae)


def transposed_product(
    support: Support, value: Float[Tensor, " nnz"], right: Float[Tensor, "batch d"], d_sae: int
) -> Float[Tensor, "d_sae d"]:
    """Sᵀ right."""
    if is_dense(support, d_sae):
        return to_dense(support, value, d_sae).T @ right
    shape = (d_sae, support.n_rows)
    matrix = torch.sparse_csr_tensor(
        support.by_latent(d_sae), support.row_by_latent, value[support.order], shape, check_invariants=False
    )
    return matrix @ right


def pair_products(support: Support, left: Float[Tensor, "batch d"], right: Float[Tensor, "d_sae d"]) -> Float[Tensor, " nnz"]:
    """⟨left[row], right[latent]⟩ at each pair."""
    shape = (support.n_rows, len(right))
    if is_dense(support, len(right)):
        return (left @ right.T).flatten()[support.flat(len(right))]
    zeros = left.new_zeros(len(support.latent))
    pattern = torch.sparse_csr_tensor(support.crow32, support.latent32, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()


class Decode(torch.autograd.Function):
    """x_hat = S W_dec, from values at a support."""

    @staticmethod
    def forward(ctx, value, W_dec, support):
        ctx.support = support
        ctx.save_for_backward(value, W_dec)
        if not len(value):
            return W_dec.new_zeros(support.n_rows, W_dec.shape[1])
        if is_dense(support, len(W_dec)):
            return to_dense(support, value, len(W_dec)) @ W_dec
        return F.embedding_bag(
            support.latent32, W_dec, support.crow32, mode="sum", per_sample_weights=value, include_last_offset=True
        )

    @staticmethod
    def backward(ctx, e):
        value, W_dec = ctx.saved_tensors
        if not len(value):
            return torch.zeros_like(value), torch.zeros_like(W_dec) if ctx.needs_input_grad[1] else None, None
        e = e.contiguous()
        dv = pair_products(ctx.support, e, W_dec) if ctx.needs_input_grad[0] else None
        dW_dec = transposed_product(ctx.support, value, e, len(W_dec)) if ctx.needs_input_grad[1] else None
        return dv, dW_dec, None


def _encoder_gradients(support: Support, g: Tensor, W_enc: Tensor, centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dW_enc, db_enc, db_dec) of gradients g at the pre-activations of a support."""
    d_sae = W_enc.shape[1]
    db_enc = g.new_zeros(d_sae).index_add_(0, support.latent, g)
    if not len(g):
        return torch.zeros_like(W_enc), db_enc, torch.zeros_like(W_enc[:, 0])
    return transposed_product(support, g, centred, d_sae).T, db_enc, -(W_enc @ db_enc)


class PreAt(torch.autograd.Function):
    """Pre-activations at a support, read from the dense ones that are known already."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, b_dec, pre, centred, support):
        ctx.support, ctx.has_bias = support, b_enc is not None
        ctx.save_for_backward(W_enc, centred)
        return pre.flatten()[support.flat(pre.shape[1])]

    @staticmethod
    def backward(ctx, g):
        dW_enc, db_enc, db_dec = _encoder_gradients(ctx.support, g, *ctx.saved_tensors)
        return dW_enc, db_enc if ctx.has_bias else None, db_dec, None, None, None


class PreDense(torch.autograd.Function):
    """All pre-activations, known already; for rules that only say what their activation function is."""

    @staticmethod
    def forward(ctx, W_enc, b_enc, b_dec, pre, centred):
        ctx.has_bias = b_enc is not None
        ctx.save_for_backward(W_enc, centred)
        return pre.clone()

    @staticmethod
    def backward(ctx, g):
        support = support_of_mask(g != 0)
        value = g.flatten()[support.flat(g.shape[1])]
        dW_enc, db_enc, db_dec = _encoder_gradients(support, value, *ctx.saved_tensors)
        return dW_enc, db_enc if ctx.has_bias else None, db_dec, None, None
