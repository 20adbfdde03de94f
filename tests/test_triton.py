"""The Triton kernels against float64 dense references: compiled where there is a GPU, by Triton's interpreter elsewhere."""

import os
import subprocess
import sys
from inspect import unwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", INTERPRET)
        yield


@pytest.fixture
def small_pieces(monkeypatch):
    """Rows of dozens of columns in several pieces and several rounds; a cut after every third pair."""
    monkeypatch.setattr(kernels, "PIECE", 16)
    monkeypatch.setattr(kernels, "CUT", 3)


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
        patch.setattr(kernels, "PIECE", 16)
        assert kernels.topk(pre, k).tolist() == largest(pre, k)


@pytest.mark.parametrize(("d_sae", "k"), [(9_001, 3), (8_193, 200)])
def test_topk_of_wide_rows(d_sae, k):
    pre = randn(1, d_sae)
    pre[0, ::97] = 2.5  # ties across pieces
    assert kernels.topk(pre, k).tolist() == largest(pre, k)


@pytest.mark.parametrize("shape", [(0, 5), (3, 5), (3, 0)])
def test_topk_of_nothing(shape):
    assert kernels.topk(torch.zeros(shape, device=DEVICE), 0).shape == (shape[0], 0)
    assert kernels.topk(torch.zeros(0, 5, device=DEVICE), 2).shape == (0, 2)


@pytest.mark.parametrize("k", [-1, 6])
def test_topk_wants_a_k_that_fits(k):
    with pytest.raises(ShapeError, match=f"top-k was asked for {k} of 5 latents; k must lie between 0 and their number"):
        kernels.topk(torch.zeros(2, 5, device=DEVICE), k)


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
        patch.setattr(kernels, "CUT", cut)
        assert_products(support, d_sae, randn(len(support.latent)), randn(n, d, seed=1), randn(d_sae, d, seed=2))


def test_products_of_more_columns_than_a_block():
    support, d_sae = support_like("random")
    assert_products(support, d_sae, randn(len(support.latent)), randn(7, 300, seed=1), randn(d_sae, 300, seed=2))


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


# What a GPU would launch, compiled for an H100 as it would be there, launched nowhere: the compiler refuses what the
# interpreter lets pass.
COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class NoDriver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

def compile_only(kernel, *args, **options):
    binary = launch(kernel, *args, **{**options, "warmup": True})
    assert len(binary.asm["cubin"]) > 1000
    print(kernel.__name__)

driver.set_active(NoDriver())
launch, JITFunction.run = JITFunction.run, compile_only

from saelens_lite.codes import support_of_indices, triton_kernels as kernels

for d_sae, k in [(8192, 40), (5, 1)]:
    kernels.topk(torch.zeros(2, d_sae), k)
support, value = support_of_indices(torch.arange(12).reshape(4, 3)), torch.ones(12)
for d, dtype in [(768, torch.float32), (1, torch.bfloat16)]:
    kernels.decode(support, value, torch.ones(16, d, dtype=dtype))
    kernels.pair_products(support, torch.ones(4, d, dtype=dtype), torch.ones(16, d, dtype=dtype))
    kernels.transposed_product(support, value, torch.ones(4, d, dtype=dtype), 16)
"""


def test_the_kernels_compile_for_an_h100(tmp_path):
    compiled = in_a_fresh_process(COMPILE, TRITON_CACHE_DIR=str(tmp_path)).split()
    assert compiled == ["_select"] * 3 + ["_sum_rows", "_dot_rows", "_sum_rows", "_sum_rows"] * 2


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
