"""SparseCodes against dense tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelens_lite.codes import SparseCodes, Support, support_of_indices, support_of_mask
from saelens_lite.codes.choice import largest_latents
from saelens_lite.errors import ShapeError


def dense(shape: tuple[int, ...], density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)


SHAPES = [(5, 7), (1, 1), (7,), (2, 3, 11), (0, 4), (3, 0, 4), (4, 1, 2, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_there_and_back(shape, density):
    acts = dense(shape, density)
    codes = SparseCodes.from_dense(acts)
    assert codes.shape == shape[:-1]
    assert codes.d_sae == shape[-1]
    assert codes.n_rows == acts.reshape(-1, shape[-1]).shape[0]
    assert torch.equal(codes.to_dense(), acts)
    assert torch.equal(codes.l0, (acts != 0).sum(-1))
    assert len(codes.value) == int((acts != 0).sum())


@given(st.integers(1, 9), st.integers(1, 20), st.floats(0, 1), st.integers(0, 1000))
def test_pairs_are_the_non_zeros(n, d_sae, density, seed):
    acts = dense((n, d_sae), density, seed)
    codes = SparseCodes.from_dense(acts)
    row, latent = acts.nonzero(as_tuple=True)
    assert torch.equal(codes.row, row)
    assert torch.equal(codes.latent, latent)
    assert torch.equal(codes.value, acts[row, latent])
    for r in range(n):
        assert codes.latent[codes.crow[r] : codes.crow[r + 1]].tolist() == acts[r].nonzero().flatten().tolist()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3])
def test_decode_is_the_dense_product(shape, density):
    acts = dense(shape, density)
    weight = torch.randn(shape[-1], 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(SparseCodes.from_dense(acts).decode(weight), acts @ weight)


def test_decode_wants_as_many_rows_as_latents():
    codes = SparseCodes.from_dense(dense((3, 5), 0.5))
    with pytest.raises(ShapeError, match=r"codes over 5 latents cannot be decoded by a W_dec of shape \(4, 2\)"):
        codes.decode(torch.zeros(4, 2))


def test_gradients_of_everything_differentiable():
    acts = dense((4, 6), 0.5).double()
    codes = SparseCodes.from_dense(acts)
    value = codes.value.clone().requires_grad_()
    weight = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: codes._replace(value=v).to_dense(), (value,))
    assert torch.autograd.gradcheck(lambda v, w: codes._replace(value=v).decode(w), (value, weight))


def test_gradient_through_dense_codes_stays_on_the_support():
    acts = dense((4, 6), 0.5).double().requires_grad_()
    weight = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    SparseCodes.from_dense(acts).decode(weight).square().sum().backward()
    wanted = 2 * (acts.detach() @ weight) @ weight.T * (acts.detach() != 0)
    torch.testing.assert_close(acts.grad, wanted)


def test_rows_are_slices_of_the_flat_batch():
    acts = dense((2, 5, 7), 0.4)
    codes, flat = SparseCodes.from_dense(acts), acts.reshape(10, 7)
    for start, stop in [(0, 10), (0, 3), (3, 8), (9, 10), (4, 4), (0, 0), (8, 99)]:
        piece = codes.rows(start, stop)
        assert piece.shape == (len(flat[start:stop]),)
        assert torch.equal(piece.to_dense(), flat[start:stop])
        assert torch.equal(piece.l0, (flat[start:stop] != 0).sum(1))


def test_stored_zeros_do_not_fire():
    acts = dense((6, 8), 0.6)
    codes = SparseCodes.from_dense(acts)
    with_zeros = codes._replace(value=codes.value * (torch.arange(len(codes.value)) % 2))
    assert torch.equal(with_zeros.l0, (with_zeros.to_dense() != 0).sum(1))
    without = with_zeros.without_zeros()
    assert torch.equal(without.to_dense(), with_zeros.to_dense())
    assert (without.value != 0).all()
    assert torch.equal(without.l0, with_zeros.l0)
    assert codes.without_zeros() is codes
    nothing = codes._replace(value=codes.value * 0).without_zeros()
    assert len(nothing.value) == len(nothing.latent) == 0
    assert torch.equal(nothing.crow, torch.zeros(7, dtype=torch.long))


def test_to_casts_values_only():
    codes = SparseCodes.from_dense(dense((3, 5), 0.5))
    half = codes.to(torch.float16)
    assert half.value.dtype == torch.float16
    assert half.latent.dtype == half.crow.dtype == torch.long
    torch.testing.assert_close(half.to_dense(), codes.to_dense().half())
    assert torch.equal(codes.to("cpu").to_dense(), codes.to_dense())
    assert codes.to("meta").crow.device.type == codes.to("meta").latent.device.type == "meta"


def test_detach_drops_the_gradient():
    codes = SparseCodes.from_dense(dense((3, 5), 0.5).requires_grad_())
    assert codes.value.requires_grad
    assert not codes.detach().value.requires_grad


@pytest.mark.parametrize(("n", "k"), [(4, 3), (1, 1), (0, 3), (4, 0)])
def test_support_of_a_table(n, k):
    table = torch.arange(n * k).reshape(n, k) * 3 % 7
    support = support_of_indices(table)
    assert support.crow.tolist() == [i * k for i in range(n + 1)]
    assert torch.equal(support.latent.reshape(n, k), table)
    assert torch.equal(support.row, torch.arange(n).repeat_interleave(k))


@pytest.mark.parametrize("shape", [(4, 6), (0, 6), (3, 1)])
def test_support_of_a_mask(shape):
    mask = dense(shape, 0.5) != 0
    support = support_of_mask(mask)
    back = torch.zeros(shape, dtype=torch.bool)
    back[support.row, support.latent] = True
    assert torch.equal(back, mask)
    assert len(support.crow) == shape[0] + 1
    codes = SparseCodes.of(Support(support.crow, support.latent), torch.ones(len(support.latent)), shape[1])
    assert torch.equal(codes.to_dense(), mask.float())


@pytest.mark.parametrize("k", [1, 3, 512, 600])
@pytest.mark.parametrize("width", [4096, 8192, 4100, 2048])
def test_largest_are_those_of_a_sort(k, width):
    pre = torch.randn(7, width, generator=torch.Generator().manual_seed(k))
    pre[0] = 1.0  # ties
    pre[1] = -pre[1].abs()
    pre[2, 5:] = -torch.inf
    found = pre.gather(1, largest_latents(pre, k)).sort(dim=1, descending=True).values
    assert torch.equal(found, pre.sort(dim=1, descending=True).values[:, :k])
    assert all(len(set(row)) == k for row in largest_latents(pre, k).tolist())
