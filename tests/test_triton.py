"""The Triton kernels against float64 dense references: compiled where there is a GPU, by Triton's interpreter elsewhere."""

import json
import os
import subprocess
import sys
from inspect import unwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import saelens_lite
from saelens_lite.codes import Support, support_of_indices, support_of_mask
from saelens_lite.codes.gpu import available
from saelens_lite.errors import ShapeError

if sys.platform != "linux":
    pytest.skip("Triton is made for Linux", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRET = "1" if DEVICE == "cpu" else "0"

with pytest.MonkeyPatch.context() as patch:  # for this module alone: conftest.py says why
    patch.setenv("TRITON_INTERPRET", INTERPRET)
    from saelens_lite.codes import triton_kernels as kernels
    from saelens_lite.codes import triton_products, triton_select, triton_threshold


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", INTERPRET)
        yield


@pytest.fixture
def small_pieces(monkeypatch):
    """Rows of dozens of columns in several pieces and several rounds; a cut after every third pair."""
    monkeypatch.setattr(triton_select, "PIECE", 16)
    monkeypatch.setattr(triton_products, "CUT", 3)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def largest(pre: torch.Tensor, k: int) -> list[list[int]]:
    """Return the latents of the k largest of each row by sorting in Python: NaN first, then by value, then the lower latent."""
    rows = [[(x == x, -x, i) for i, x in enumerate(row)] for row in pre.double().tolist()]  # noqa: PLR0124
    return [sorted(i for _, _, i in sorted(row)[:k]) for row in rows]


# --- top-k ---------------------------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")
ROWS = {
    "random": randn(3, 37),
    "a batch of one": randn(1, 64),
    "one latent": randn(2, 1),
    "all equal": torch.full((2, 19), 0.25),
    "all zero": torch.zeros(2, 19),
    "many ties": randn(3, 50, seed=1).round(),
    "all negative": -randn(2, 33).abs() - 1e-3,
    "two positive": torch.nn.functional.pad(randn(2, 2).abs(), (30, 0)),
    "zeros of both signs": torch.tensor([[0.0, -0.0, 0.0, -0.0, -1.0, -0.0, 0.0]]),
    "infinities": torch.tensor([[-INF, 1.0, INF, -INF, -3.0, INF, -INF]]),
    "all -infinity": torch.full((1, 20), -INF),
    "NaN of both signs": torch.tensor([[1.0, NAN, INF, -1.0, 2.0, -NAN, 3.0]]),
    "the smallest and the largest floats": torch.tensor([[1e-45, -1e-45, 0.0, 3.4028235e38, -3.4028235e38, 1.1754944e-38]]),
    "neighbours": torch.tensor([[1.0, 1.0000001, 0.99999994, 1.0000002, 1.0]]),
    "bfloat16": randn(2, 40).bfloat16(),
    "a slice of columns": randn(3, 60)[:, 7:40],
    "every other column": randn(2, 60)[:, ::2],
    "a transpose": randn(30, 3).T,
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("k", [1, 5, 10**9])
def test_topk_is_exact(name, k):
    pre = ROWS[name].to(DEVICE)
    k = min(k, pre.shape[1])
    assert kernels.topk(pre, k).tolist() == largest(pre, k)


@given(st.integers(1, 3), st.integers(1, 90), st.data())
def test_topk_of_any_shape_in_many_pieces(n, d_sae, data):
    k = data.draw(st.integers(1, min(d_sae, 40)))
    pre = randn(n, d_sae, seed=n * d_sae + k)
    if data.draw(st.booleans()):
        pre = pre.mul(2).round()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_select, "PIECE", 16)
        assert kernels.topk(pre, k).tolist() == largest(pre, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("size", [8, 32])
def test_topk_by_groups_is_exact(name, size, dtype):
    pre = ROWS[name].to(DEVICE, dtype)
    n_groups = -(-pre.shape[1] // size)
    for k in {1, min(2, n_groups), n_groups}:
        assert triton_select._topk_by_groups(triton_select.with_whole_rows(pre), k, size).tolist() == largest(pre, k)


@given(st.integers(1, 3), st.integers(1, 300), st.sampled_from([8, 16, 64]), st.data())
def test_topk_by_groups_of_any_shape(n, d_sae, size, data):
    k = data.draw(st.integers(1, -(-d_sae // size)))
    pre = randn(n, d_sae, seed=n * d_sae + k)
    if data.draw(st.booleans()):
        pre = pre.round()
    if data.draw(st.booleans()):
        pre[:, data.draw(st.integers(0, d_sae - 1))] = NAN
    assert triton_select._topk_by_groups(pre, k, size).tolist() == largest(pre, k)


@pytest.mark.parametrize(
    ("d_sae", "k", "by_groups"),
    [
        (9_001, 3, True),
        (8_193, 200, True),
        (20_000, 700, True),
        (5_000, 2_000, False),
        (5_000, 4_500, False),
        (1_000, 3, False),
    ],
)
def test_topk_of_wide_rows(d_sae, k, by_groups):
    assert (triton_select._best_group_size(d_sae, k) is not None) == by_groups
    for dtype in (torch.float32, torch.bfloat16):
        pre = randn(1, d_sae).to(dtype)
        pre[0, ::97] = 2.5  # ties across pieces and groups
        assert kernels.topk(pre, k).tolist() == largest(pre, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_maxima_are_the_keys_of_the_maxima(dtype):
    """The order of the keys, as unsigned numbers, is the order of the maxima."""
    pre = torch.cat([randn(3, 50), torch.full((3, 5), -INF).to(DEVICE)], 1).to(dtype)
    pre[1, 20], pre[2, 40], pre[0, 3] = NAN, INF, -0.0
    maxima = triton_select.group_maxima(pre, 8).long() & (0xFFFF if dtype == torch.bfloat16 else 0xFFFFFFFF)
    groups = torch.nn.functional.pad(pre.double(), (0, 1), value=-INF).reshape(21, 8).tolist()
    order = sorted(range(21), key=lambda i: (any(x != x for x in groups[i]), max(x for x in groups[i] if x == x)))  # noqa: PLR0124
    assert maxima.flatten().argsort(stable=True).tolist() == order


@pytest.mark.parametrize("shape", [(0, 5), (3, 5), (3, 0)])
def test_topk_of_nothing(shape):
    assert kernels.topk(torch.zeros(shape, device=DEVICE), 0).shape == (shape[0], 0)
    assert kernels.topk(torch.zeros(0, 5, device=DEVICE), 2).shape == (0, 2)


@pytest.mark.parametrize("k", [-1, 6])
def test_topk_wants_a_k_that_fits(k):
    with pytest.raises(ShapeError, match=f"top-k was asked for {k} of 5 latents; k must lie between 0 and their number"):
        kernels.topk(torch.zeros(2, 5, device=DEVICE), k)


# --- the largest of a matrix, and entries above a threshold -----------------------------------------------------------------


def in_compressed_rows(n_rows: int, pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Return (offsets of the rows, latents) of (row, latent) pairs."""
    pairs = sorted(pairs)
    return [sum(row < i for row, _ in pairs) for i in range(n_rows + 1)], [latent for _, latent in pairs]


def largest_of_all(pre: torch.Tensor, n: int) -> tuple[list[int], list[int]]:
    """Return the n largest entries by sorting in Python: NaN first, then by value, then in row-major order."""
    entries = [(x == x, -x, r, i) for r, row in enumerate(pre.double().tolist()) for i, x in enumerate(row)]  # noqa: PLR0124
    return in_compressed_rows(len(pre), [(r, i) for _, _, r, i in sorted(entries)[:n]])


def lists(found: tuple[torch.Tensor, torch.Tensor]) -> tuple[list[int], list[int]]:
    assert all(part.dtype == torch.long for part in found)
    return found[0].tolist(), found[1].tolist()


def a_heavy_row(n: int, d_sae: int) -> torch.Tensor:
    """Return entries of which one row has all the largest, with ties across rows."""
    pre = randn(n, d_sae).round()
    pre[n // 2] += 9
    return pre


MATRICES = ROWS | {
    "many groups": randn(5, 130),
    "many groups with ties": randn(5, 130).mul(2).round(),
    "a heavy row": a_heavy_row(5, 70),
    "NaN in some rows": torch.where(randn(4, 66) > 1.9, torch.tensor(NAN).to(DEVICE), randn(4, 66, seed=1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MATRICES)
def test_n_largest_is_exact(name, dtype):
    pre = MATRICES[name].to(DEVICE, dtype)
    n = min(2 * len(pre), pre.numel() // 2)
    assert lists(kernels.n_largest(pre, n)) == largest_of_all(pre, n)


@pytest.mark.parametrize("n", [0, 1, 10, 20])
def test_n_largest_of_any_number(n):
    pre = randn(2, 10)
    assert lists(kernels.n_largest(pre, n)) == largest_of_all(pre, n)


@settings(max_examples=6)
@given(st.integers(1, 3), st.integers(1, 150), st.data())
def test_n_largest_of_any_shape(n_rows, d_sae, data):
    pre = randn(n_rows, d_sae, seed=n_rows + d_sae)
    if data.draw(st.booleans()):
        pre = pre.round()
    n = data.draw(st.integers(0, pre.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_threshold, "BLOCK", 128)  # several rounds in a row
        assert lists(kernels.n_largest(pre, n)) == largest_of_all(pre, n)


@pytest.mark.parametrize("n", [-1, 11])
def test_n_largest_wants_as_many_entries(n):
    with pytest.raises(
        ShapeError, match=f"the {n} largest of 10 entries were asked for; n must lie between 0 and their number"
    ):
        unwrap(kernels.n_largest)(torch.zeros(2, 5, device=DEVICE), n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MATRICES)
def test_entries_above_a_threshold(monkeypatch, name, dtype):
    monkeypatch.setattr(triton_threshold, "CHUNK", 64)  # several chunks in a row
    pre = MATRICES[name].to(DEVICE, dtype)
    for bound in (0.5, randn(pre.shape[1], seed=7)):
        wanted = (pre.float() > bound).nonzero().tolist()
        assert lists(kernels.above(pre, bound)) == in_compressed_rows(len(pre), [tuple(pair) for pair in wanted])


@pytest.mark.parametrize(("threshold", "latents"), [(-INF, [1, 2, 4]), (1.0, [2]), (INF, [])])
def test_nothing_is_above_itself(threshold, latents):
    pre = torch.tensor([[-INF, 1.0, INF, NAN, -3.0]], device=DEVICE)
    assert lists(kernels.above(pre, threshold)) == ([0, len(latents)], latents)


@pytest.mark.parametrize("d_sae", [2_048, 2_049])
def test_entries_above_a_threshold_in_wide_rows(d_sae):
    pre = randn(2, d_sae)
    pre[0] = -1
    wanted = (pre > 1.5).nonzero().tolist()
    assert lists(kernels.above(pre, 1.5)) == in_compressed_rows(2, [tuple(pair) for pair in wanted])


def test_thresholds_want_one_for_each_latent():
    with pytest.raises(ShapeError, match=r"5 latents need as many thresholds, not a tensor of shape \(4,\)"):
        unwrap(kernels.above)(torch.zeros(2, 5, device=DEVICE), torch.zeros(4, device=DEVICE))


def test_no_rows_have_no_largest_entries():
    nothing = torch.zeros(0, 5, device=DEVICE)
    assert lists(kernels.n_largest(nothing, 0)) == ([0], [])
    assert lists(kernels.above(nothing, 0.0)) == ([0], [])


# --- products ------------------------------------------------------------------------------------------------------------


def support_like(kind: str) -> tuple[Support, int]:
    """Return (support, d_sae) of each adversarial kind."""
    mask = randn(7, 11, seed=3) > 0.5
    if kind == "no pairs":
        mask[:] = False
    elif kind == "all pairs":
        mask[:] = True
    elif kind == "a latent of every row, one of none":
        mask[:, 4], mask[:, 5], mask[:, 10] = True, False, False
    elif kind == "empty rows":
        mask[[0, 3, 6]] = False
    elif kind == "a batch of one":
        mask = mask[:1]
    elif kind == "no rows":
        mask = mask[:0]
    elif kind == "unsorted rows":
        return support_of_indices(torch.tensor([[9, 0, 4], [4, 10, 1], [8, 4, 3]], device=DEVICE)), 11
    return support_of_mask(mask), 11


KINDS = ["random", "no pairs", "all pairs", "a latent of every row, one of none", "empty rows", "a batch of one", "no rows"]
KINDS += ["unsorted rows"]


def dense(support: Support, value: torch.Tensor, d_sae: int) -> torch.Tensor:
    """S in float64."""
    S = torch.zeros(support.n_rows, d_sae, dtype=torch.float64, device=DEVICE)
    S[support.row, support.latent] = value.double()
    return S


def assert_products(support: Support, d_sae: int, value: torch.Tensor, by_row: torch.Tensor, by_latent: torch.Tensor) -> None:
    """Check all three products against S, `by_row` [rows d] and `by_latent` [d_sae d] in float64."""
    S = dense(support, value, d_sae)
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(kernels.decode(support, value, by_latent), S @ by_latent.double(), **close)
    torch.testing.assert_close(kernels.transposed_product(support, value, by_row, d_sae), S.T @ by_row.double(), **close)
    wanted = (by_row.double() @ by_latent.double().T)[support.row, support.latent]
    torch.testing.assert_close(kernels.pair_products(support, by_row, by_latent), wanted, **close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_pieces")
def test_products_of_a_support(kind):
    support, d_sae = support_like(kind)
    assert_products(support, d_sae, randn(len(support.latent)), randn(support.n_rows, 5, seed=1), randn(d_sae, 5, seed=2))


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 40), st.floats(0, 1), st.integers(1, 9))
def test_products_of_any_shape(n, d_sae, d, density, cut):
    support = support_of_mask(torch.rand(n, d_sae, generator=torch.Generator().manual_seed(d)).to(DEVICE) < density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_products, "CUT", cut)
        assert_products(support, d_sae, randn(len(support.latent)), randn(n, d, seed=1), randn(d_sae, d, seed=2))


def test_products_of_more_columns_than_a_block():
    support, d_sae = support_like("random")
    assert_products(support, d_sae, randn(len(support.latent)), randn(7, 300, seed=1), randn(d_sae, 300, seed=2))


def long_rows(lengths: list[int], d_sae: int) -> Support:
    """Return a support with so many pairs in each row."""
    crow = torch.tensor([0, *lengths]).cumsum(0)
    latent = torch.cat([torch.arange(n) * 7 % d_sae for n in lengths])
    return Support(crow.to(DEVICE), latent.to(DEVICE))


@pytest.mark.parametrize(("lengths", "d"), [([0, 20_000, 0, 3], 5), ([300, 0, 250], 70), ([5] * 3, 1_030)])
def test_pair_products_of_long_and_empty_rows(lengths, d):
    d_sae = 20_011
    support = long_rows(lengths, d_sae)
    left, right = randn(len(lengths), d, seed=1), randn(d_sae, d, seed=2)
    wanted = torch.cat([right[i].double() @ row for row, i in zip(left.double(), support.latent.split(lengths), strict=True)])
    torch.testing.assert_close(kernels.pair_products(support, left, right).double(), wanted, rtol=1e-5, atol=1e-5)


def between_nan(matrix: torch.Tensor) -> torch.Tensor:
    """Return the same matrix as columns of a wider one, NaN on both sides."""
    n, d = matrix.shape
    wide = matrix.new_full((n, d + 7), NAN)
    wide[:, 3 : 3 + d] = matrix
    return wide[:, 3 : 3 + d]


LAYOUTS = {
    "between NaN": between_nan,
    "transposed": lambda matrix: matrix.T.contiguous().T,
    "one row for all": lambda matrix: matrix[:1].expand(matrix.shape),
    "one number for all": lambda matrix: matrix[:1, :1].expand(matrix.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_any_layout(layout):
    support, d_sae = support_like("random")
    value = randn(2 * len(support.latent))[::2]
    by_row, by_latent = LAYOUTS[layout](randn(7, 5, seed=1)), LAYOUTS[layout](randn(d_sae, 5, seed=2))
    assert not by_row.is_contiguous()
    assert_products(support, d_sae, value, by_row, by_latent)


def test_bfloat16_is_summed_in_float32():
    """512 ones: a bfloat16 sum would stop at 256."""
    every_row = support_of_indices(torch.zeros(512, 1, dtype=torch.long, device=DEVICE))
    every_latent = support_of_indices(torch.arange(512, device=DEVICE)[None])
    one = torch.ones(512, 3, dtype=torch.bfloat16, device=DEVICE)
    products = [
        kernels.decode(every_latent, one[:, 0], one),
        kernels.transposed_product(every_row, one[:, 0], one, 2)[:1],
        kernels.pair_products(every_latent, one.T[:1], one.T[:1].expand(512, 512))[:3],
    ]
    for product in products:
        assert product.dtype == torch.bfloat16
        assert product.flatten().tolist() == [512.0] * 3


def test_mixed_dtypes_give_the_wider():
    support, d_sae = support_like("random")
    value, by_row, by_latent = randn(len(support.latent)), randn(7, 5).bfloat16(), randn(d_sae, 5).bfloat16()
    assert_products(support, d_sae, value, by_row, by_latent.float())
    assert kernels.decode(support, value, by_latent).dtype == torch.float32
    assert kernels.transposed_product(support, value, by_row, d_sae).dtype == torch.float32
    assert kernels.pair_products(support, by_row, by_latent.float()).dtype == torch.float32
    assert kernels.pair_products(support, by_row, by_latent).dtype == torch.bfloat16


@pytest.mark.usefixtures("small_pieces")
def test_the_same_input_gives_the_same_bytes():
    """Nothing reads what was not written, and on a GPU nothing depends on which program comes first."""
    support, d_sae = support_like("a latent of every row, one of none")
    value, by_row = randn(len(support.latent)), randn(7, 20)
    first = kernels.transposed_product(support, value, by_row, d_sae)
    for _ in range(3):
        assert torch.equal(kernels.transposed_product(support, value, by_row, d_sae), first)
    pre = randn(6, 70).round()
    found = kernels.n_largest(pre, 40)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(kernels.n_largest(pre, 40), found, strict=True))


def test_products_want_tensors_that_fit():
    support, d_sae = support_like("random")
    value, by_row, by_latent = randn(len(support.latent)), randn(7, 5), randn(d_sae, 5)
    n = len(value)
    with pytest.raises(ShapeError, match=f"a product with this support needs {n} values, not {n - 1}"):
        kernels.decode(support, value[1:], by_latent)
    with pytest.raises(ShapeError, match=f"needs {n} values, not {n - 1}"):
        kernels.transposed_product(support, value[1:], by_row, d_sae)
    with pytest.raises(ShapeError, match="needs 7 rows on the right, not 6"):
        kernels.transposed_product(support, value, by_row[1:], d_sae)
    with pytest.raises(ShapeError, match="needs 7 rows on the left, not 6"):
        kernels.pair_products(support, by_row[1:], by_latent)
    with pytest.raises(ShapeError, match="needs 5 columns on the right, not 4"):
        unwrap(kernels.pair_products)(support, by_row, by_latent[:, 1:])  # the annotations' own check would come first


@pytest.mark.usefixtures("small_pieces")
def test_gradients_of_a_training_step():
    """x → top-k → x_hat → loss and back through the kernels, against autograd through the dense definition in float64."""
    n, d_in, d_sae, k = 6, 10, 40, 4
    x, W_enc, W_dec = randn(n, d_in), randn(d_in, d_sae, seed=1), randn(d_sae, d_in, seed=2)

    pre = x @ W_enc
    support = support_of_indices(kernels.topk(pre, k))
    value = pre[support.row, support.latent].relu()
    x_hat = kernels.decode(support, value, W_dec)
    e = 2 * (x_hat - x) / n
    dv = kernels.pair_products(support, e, W_dec) * (value > 0)
    dW_dec = kernels.transposed_product(support, value, e, d_sae)
    dW_enc = kernels.transposed_product(support, dv, x, d_sae).T

    exact_enc, exact_dec = W_enc.double().requires_grad_(), W_dec.double().requires_grad_()
    h = x.double() @ exact_enc
    f = torch.zeros_like(h).scatter(1, h.topk(k).indices, h.topk(k).values.relu())
    f.retain_grad()
    exact_hat = f @ exact_dec
    ((x.double() - exact_hat) ** 2).sum(1).mean().backward()

    exact_dv = f.grad[support.row, support.latent] * (value > 0)
    for found, exact in [(x_hat, exact_hat), (dv, exact_dv), (dW_dec, exact_dec.grad), (dW_enc, exact_enc.grad)]:
        torch.testing.assert_close(found.double(), exact.detach(), rtol=1e-4, atol=1e-4)


# --- the optimiser --------------------------------------------------------------------------------------------------------


def unit_rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix / matrix.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("shape", [(7, 20), (3, 1_500), (1, 1), (2, 4_099)])
@pytest.mark.parametrize("unit", [False, True])
def test_adam_rows_do_as_torch(shape, unit):
    """Four steps, of which one is skipped, with clipped gradients."""
    dtype = torch.float64 if shape == (1, 1) else torch.float32  # of the numbers of a step
    lr, betas, eps, largest_norm = 0.01, (0.9, 0.99), 1e-6, 0.5
    p, m, v = randn(*shape), torch.zeros(shape, device=DEVICE), torch.zeros(shape, device=DEVICE)
    half, exact = p.bfloat16(), torch.nn.Parameter(p.double())
    optimiser, n_steps = torch.optim.Adam([exact], lr=lr, betas=betas, eps=eps), 0
    for skip in (False, False, True, False):
        g = randn(*shape, seed=n_steps + 1) * 10.0**-n_steps
        scale = 1 / max(1.0, float(g.double().norm()) / largest_norm)
        if not skip:
            n_steps += 1
            exact.grad = g.double() * scale
            optimiser.step()
            if unit:
                exact.data = unit_rows(exact.data)
        step_size, root = lr / (1 - betas[0] ** n_steps), (1 - betas[1] ** n_steps) ** -0.5
        numbers = [torch.tensor(number, dtype=dtype, device=DEVICE) for number in (scale, step_size, root)]
        settings = dict(zip(("scale", "step_size", "root"), numbers, strict=True), skip=torch.tensor(skip, device=DEVICE))
        kernels.adam_rows_(p, m, v, g, half=half, unit=unit, betas=betas, eps=eps, **settings)
        torch.testing.assert_close(p.double(), exact.data, rtol=2e-6, atol=2e-6)
    state = optimiser.state[exact]
    torch.testing.assert_close(m.double(), state["exp_avg"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(v.double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-10)
    if DEVICE == "cuda":
        assert torch.equal(half, p.bfloat16())
    else:  # the interpreter cuts digits off where a GPU rounds
        assert bool(((half.float() - p).abs() <= p.abs() * 2**-7).all())


def adam_arguments(shape: tuple[int, int] = (3, 5)) -> tuple[list[torch.Tensor], dict]:
    """Return tensors p, m, v, g and settings of a step."""
    tensors = [randn(*shape, seed=seed).abs() for seed in range(4)]
    one = torch.tensor(1.0, device=DEVICE)
    numbers = {"scale": one, "step_size": one, "root": one, "skip": torch.tensor(0, device=DEVICE)}
    return tensors, {**numbers, "half": tensors[0].bfloat16(), "unit": True, "betas": (0.9, 0.999), "eps": 1e-8}


@pytest.mark.parametrize("flag", [True, 1, 7])
def test_a_skipped_step_changes_nothing(flag):
    tensors, settings = adam_arguments()
    tensors[3][0, 0] = NAN
    changing = [*tensors[:3], settings["half"]]
    before = [tensor.clone() for tensor in changing]
    kernels.adam_rows_(*tensors, **{**settings, "skip": torch.tensor(flag, device=DEVICE)})
    assert all(torch.equal(a, b) for a, b in zip(changing, before, strict=True))
    kernels.adam_rows_(*tensors, **settings)
    assert not any(torch.equal(a, b) for a, b in zip(changing, before, strict=True))


def test_a_row_of_zeros_stays_without_a_direction():
    tensors, settings = adam_arguments()
    for tensor in tensors:
        tensor[1] = 0.0
    kernels.adam_rows_(*tensors, **settings)
    assert tensors[0][1].tolist() == [0.0] * 5
    torch.testing.assert_close(tensors[0][[0, 2]].norm(dim=1), torch.ones(2, device=DEVICE))


def test_adam_rows_want_tensors_that_fit():
    tensors, settings = adam_arguments()
    p, m, v, g = tensors
    with pytest.raises(
        ShapeError, match=r"gradients of a parameter of shape \(3, 5\) must have this shape .* shape is \(3, 4\)"
    ):
        unwrap(kernels.adam_rows_)(p, m, v, g[:, 1:], **settings)
    with pytest.raises(ShapeError, match=r"must have this shape and be contiguous; .* strides are \(1, 3\)"):
        kernels.adam_rows_(p, m, v, g.T.contiguous().T, **settings)


# --- waiting --------------------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Lists the operations whose result on a GPU the CPU waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waiting = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags)
        masked = function is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if waiting or masked:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_only_a_number_of_entries_is_waited_for():
    pre, wide = randn(3, 50), randn(1, 2_000)
    support, d_sae = support_like("random")
    value, by_row, by_latent = randn(len(support.latent)), randn(7, 5, seed=1), randn(d_sae, 5, seed=2)
    kernels.transposed_product(support, value, by_row, d_sae)  # the support derives its indices once
    tensors, settings = adam_arguments()
    with Waits() as waits:
        kernels.topk(pre, 4)
        kernels.topk(wide, 4)
        kernels.n_largest(pre, 70)
        kernels.decode(support, value, by_latent)
        kernels.pair_products(support, by_row, by_latent)
        kernels.transposed_product(support, value, by_row, d_sae)
        kernels.adam_rows_(*tensors, **settings)
    assert waits.seen == []
    with waits:
        kernels.above(pre, 0.5)
    assert waits.seen == ["_local_scalar_dense.default"]


# --- where the kernels run -----------------------------------------------------------------------------------------------


def in_a_fresh_process(code: str, **env: str) -> str:
    path = os.pathsep.join([str(Path(saelens_lite.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path, **env}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_cpu_runs_them_only_when_asked_to_interpret(monkeypatch):
    x = torch.zeros(2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available(x)
    assert available(x.bfloat16())
    assert not available(x.double())
    assert not available(x.to("meta"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not available(x)


def test_asking_for_them_does_not_import_triton():
    code = "import sys, torch, saelens_lite.codes.products; from saelens_lite.codes.gpu import available\n"
    code += "print(available(torch.zeros(2)), available(torch.zeros(2, dtype=torch.float64)), 'triton' in sys.modules)"
    assert in_a_fresh_process(code, TRITON_INTERPRET="1") == "True False False"


def test_the_kernels_compile_without_spills(tmp_path):
    """For an A100 and an H100, launched nowhere: the compiler refuses what the interpreter lets pass."""
    script = Path(__file__).parents[1] / "scripts/benchmarks/kernel_report.py"
    code = f"import runpy, sys; sys.argv[1:] = ['--json', {str(tmp_path / 'report.json')!r}]\n"
    in_a_fresh_process(f"{code}runpy.run_path({str(script)!r}, run_name='__main__')", TRITON_CACHE_DIR=str(tmp_path))
    report = json.loads((tmp_path / "report.json").read_text())
    launched = {
        "_group_maxima",
        "_select_by_groups",
        "_select",
        "_sum_rows",
        "_dot_rows",
        "_sum_cuts",
        "_sum_latents",
        "_adam_rows",
    }
    launched |= {
        "_count_maxima",
        "_list_groups",
        "_count_entries",
        "_count_rows",
        "_write_largest",
        "_mark_above",
        "_write_marked",
    }
    assert {one["kernel"] for one in report} == launched
    assert {one["sm"] for one in report} == {80, 90}
    assert [one for one in report if one["spilled"]] == []


RULES = {
    "topk": {"k": 3},
    "l1": {},
    "gated": {},
    "p_anneal": {},
    "batch_topk": {"k": 3},
    "matryoshka": {"k": 3, "prefixes": (0.5,)},
    "group_max": {"k": 4},
    "jumprelu": {"bandwidth": 0.1},
    "matching_pursuit": {"k": 3},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_training_step_goes_through_the_kernels(monkeypatch, rule):
    from saelens_lite.codes import products
    from saelens_lite.dictionary import Dictionary
    from saelens_lite.training.step import DenseStep, SparseStep

    called = set()
    for name in ("topk", "decode", "pair_products", "transposed_product"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, original=original: (called.add(name), original(*a))[1])
    monkeypatch.setattr(products, "DENSE_ABOVE", dict.fromkeys(products.DENSE_ABOVE, 1.0))
    monkeypatch.setattr(products, "latent_sums", products._sorted_sums)  # as on a GPU
    d = Dictionary.create(rule, reads=12, d_sae=40, options=RULES[rule]).to(DEVICE)
    gradients = []
    for step_class in (SparseStep, DenseStep):
        d.zero_grad()
        dead = (torch.arange(40) % 2 == 0).to(DEVICE)
        step = step_class(d, randn(9, 12), dead=dead, progress=0.5, warmup=1.0)
        sum(step.losses().values()).backward()
        gradients.append({name: p.grad for name, p in d.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)
    revives = rule in ("topk", "batch_topk", "matryoshka", "group_max")  # dead latents, the largest of them
    assert called == {"decode", "pair_products", "transposed_product"} | ({"topk"} if revives else set())


def test_tensors_are_read_at_latents_through_the_kernels(monkeypatch):
    from saelens_lite.codes import products

    monkeypatch.setattr(products, "DENSE_ABOVE", dict.fromkeys(products.DENSE_ABOVE, 1.0))
    monkeypatch.setattr(products, "latent_sums", products._sorted_sums)  # as on a GPU
    support = support_of_mask(randn(9, 40) > 0.5)
    for latent in (support.latent, support.latent.flip(0)):
        for shape in ((40,), (40, 12)):
            tensor, weights = randn(*shape, seed=1).requires_grad_(), randn(len(latent), *shape[1:], seed=2)
            (found,) = torch.autograd.grad((products.read_at(tensor, latent) * weights).sum(), tensor)
            wanted = torch.zeros(shape, dtype=torch.double, device=DEVICE).index_add(0, latent, weights.double())
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
