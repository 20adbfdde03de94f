"""Evaluation on activations, without a model, against formulas in float64."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

import saelens_lite as sl
from saelens_lite.errors import ConfigError, NonFiniteError, ShapeError
from saelens_lite.evaluation import EvalReport, rows, table
from saelens_lite.tokens import token_rows


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return 3 + torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, d + 1)


@pytest.fixture(scope="module")
def x():
    return normal(500, 8)


@pytest.fixture(scope="module")
def d():
    return sl.Dictionary.create("topk", reads=8, d_sae=24, options={"k": 3}, seed=1)


@pytest.fixture(scope="module")
def transcoder():
    d = sl.Dictionary.create("topk", reads=8, writes=sl.Port(hook="out", width=5), d_sae=24, options={"k": 3}, seed=1)
    d.b_dec.data.copy_(torch.arange(5.0))
    return d


def by_formula(d: sl.Dictionary, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    with torch.no_grad():
        acts, y_hat, y = d.encode(x).to_dense().double(), d(x).double(), y.double()
    fvu = float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum())
    fires = acts > 0
    return {
        "l0": float(fires.sum(1).double().mean()),
        "l1": float(acts.sum(1).mean()),
        "mse": float((y - y_hat).square().sum(1).mean()),
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "explained_variance_legacy": float(
            (1 - (y - y_hat).square().sum(1) / (y - y.mean(0)).square().sum(1)).mean()
        ),
        "cossim": float(torch.cosine_similarity(y, y_hat).mean()),
        "l2_ratio": float((y_hat.norm(dim=1) / y.norm(dim=1)).mean()),
        "relative_reconstruction_bias": float(y_hat.square().sum() / (y * y_hat).sum()),
        "frac_alive": float(fires.any(0).double().mean()),
        "frac_dense": float((fires.double().mean(0) > 0.1).double().mean()),
    }  # fmt: skip


@pytest.mark.parametrize("batch_tokens", [None, 7])
def test_the_metrics_are_those_of_the_formulas(d, x, batch_tokens):
    report = sl.evaluate(d, x, batch_tokens=batch_tokens, n_bootstrap=20, text_name="noise")
    assert {name: m.value for name, m in report.metrics.items()} == pytest.approx(by_formula(d, x, x), rel=1e-5)
    assert torch.allclose(report.density, (d.encode(x).to_dense() > 0).float().mean(0))
    assert (report.n_tokens, report.n_sequences, report.text, report.model) == (500, 500, "noise", None)


def test_the_metrics_are_those_of_the_same_activations_in_a_model(lm):
    hook = "blocks.1.hook_resid_pre"
    d = sl.Dictionary.create("topk", reads=sl.Port(hook=hook, width=lm.d_model), d_sae=96, options={"k": 8}, seed=3)
    text = token_rows(lm, [page.text for page in sl.python_docs()][100:104], n_ctx=32, n_tokens=300)
    here = text.keep.nonzero()[:, 0]
    x = lm.run(text.tokens, hooks=[hook])[hook][text.keep]
    with_model, without = sl.evaluate(d, lm, text, n_bootstrap=200), sl.evaluate(d, x, groups=here, n_bootstrap=200)
    assert without.n_sequences == with_model.n_sequences
    for name, metric in without.metrics.items():
        assert metric.value == pytest.approx(with_model[name], rel=1e-4), name
        width = with_model.metrics[name].high - with_model.metrics[name].low
        assert metric.high - metric.low == pytest.approx(width, rel=0.5, abs=1e-4), name


@pytest.mark.parametrize("form", [np.asarray, pd.DataFrame, torch.Tensor.tolist, torch.Tensor.double])
def test_every_form_of_the_activations_gives_the_same(d, x, form):
    wanted = sl.evaluate(d, x, n_bootstrap=0).metrics
    found = sl.evaluate(d, form(x), n_bootstrap=0).metrics
    assert [m.value for m in found.values()] == pytest.approx([m.value for m in wanted.values()], rel=1e-6)


@pytest.mark.parametrize("most", [4096, 100])
def test_intervals_of_independent_rows_have_the_length_of_the_normal_ones(monkeypatch, most):
    """A mean over n independent rows has the standard error s / √n, also if rows are drawn several at a time."""
    monkeypatch.setattr(rows, "MAX_UNITS", most)
    d = sl.Dictionary.create("l1", reads=8, d_sae=24, seed=1)
    x = normal(3000, 8)[torch.randperm(3000, generator=torch.Generator().manual_seed(1))].sort(0).values  # in an order
    report = sl.evaluate(d, x, n_bootstrap=2000)
    l0 = d.encode(x).l0.double()
    metric, half = report.metrics["l0"], 1.96 * float(l0.std()) / 3000**0.5
    assert metric.value == pytest.approx(float(l0.mean()))
    assert metric.high - metric.low == pytest.approx(2 * half, rel=0.25)
    assert report.n_sequences == 3000


def test_intervals_of_groups_are_those_of_independent_groups(d, x):
    """Each row four times: as groups, the intervals of the rows; as rows, half as long."""
    four, subjects = x.repeat(4, 1), [f"subject {i % 500}" for i in range(2000)]
    once, grouped, rowwise = (
        sl.evaluate(d, data, groups=groups, n_bootstrap=2000) for data, groups in ((x, None), (four, subjects), (four, None))
    )
    assert (grouped.n_tokens, grouped.n_sequences) == (2000, 500)
    for name in ("fvu", "l1", "cossim"):
        lengths = [report.metrics[name].high - report.metrics[name].low for report in (once, grouped, rowwise)]
        assert grouped[name] == pytest.approx(once[name], rel=1e-6)
        assert lengths[1] == pytest.approx(lengths[0], rel=0.15)
        assert lengths[2] == pytest.approx(lengths[0] / 2, rel=0.15)
    assert "2,000 rows in 500 groups of" in grouped.where
    assert "over 500 groups." in grouped.to_markdown()


@pytest.mark.parametrize("size", [1, 3, 10, 100])
def test_batches_hold_every_row_once_with_its_unit(size):
    unit = torch.tensor([2, 0, 1, 0, 2, 2, 2, 3, 2, 4])
    seen, n_units = [], 0
    for some, places, first in rows._batches(unit, size):
        assert first <= n_units
        n_units = first + places.n
        assert len(some) <= size
        assert torch.equal(places.row + first, unit[some])
        seen += some.tolist()
    assert sorted(seen) == list(range(10))
    assert n_units == 5


def test_one_group_has_no_interval_and_the_log_says_why(d, x, caplog):
    report = sl.evaluate(d, x, groups=["a"] * 500, n_bootstrap=20)
    assert np.isnan([report.metrics["fvu"].low, report.metrics["fvu"].high]).all()
    assert "no intervals: a bootstrap draws groups of rows, and there is only one" in caplog.text


def test_a_transcoder_is_measured_on_its_target(transcoder, x):
    y = normal(500, 5, seed=2)
    report = sl.evaluate(transcoder, (x, y), n_bootstrap=5)
    assert {name: m.value for name, m in report.metrics.items()} == pytest.approx(by_formula(transcoder, x, y), rel=1e-5)
    assert report == sl.evaluate(transcoder, x.tolist(), target=y.tolist(), n_bootstrap=5)
    assert report.hook == "out"
    controls = sl.evaluate(transcoder, (x, y), n_bootstrap=5, controls=True).controls
    values = torch.linalg.svdvals((y - y.mean(0)).double()).square()
    n = round(report["l0"])
    assert controls["PCA"]["fvu"] == pytest.approx(float(values[n:].sum() / values.sum()), rel=1e-4)


def test_controls_and_several_dictionaries(d, x):
    other = sl.Dictionary.create("topk", reads=8, d_sae=16, options={"k": 5}, seed=2)
    reports = sl.evaluate([d, other], x, n_bootstrap=20, controls=True)
    assert [r.metrics for r in reports] == [sl.evaluate(one, x, n_bootstrap=20).metrics for one in (d, other)]
    values = torch.linalg.svdvals((x - x.mean(0)).double()).square()
    for report, k, d_sae in zip(reports, (3, 5), (24, 16), strict=True):
        assert set(report.controls) == {"random", "PCA", "10 % permuted"}
        assert report.controls["PCA"]["fvu"] == pytest.approx(float(values[k:].sum() / values.sum()), rel=1e-4)
        assert len(report.controls["random"].density) == d_sae
        assert report.controls["random"]["l0"] == pytest.approx(k, abs=0.5)
    shown = io.StringIO()
    Console(width=200, file=shown).print(table({"mine": reports[0]}))
    assert "fvu" in shown.getvalue()
    assert "CE recovered" not in shown.getvalue()


def test_the_report_is_read_back(d, x, tmp_path):
    report = sl.evaluate(d, x, n_bootstrap=5, text_name="noise", controls=True)
    report.to_json(tmp_path / "eval.json")
    assert EvalReport.from_json(tmp_path / "eval.json") == report
    assert json.loads(report.to_json())["model"] is None
    for shown in (str(report), report.to_markdown(), report._repr_html_()):
        assert "500 rows of noise" in shown
        assert "None" not in shown
        assert "rows are not compared with those of the training" in shown


def spoilt(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[[4, 9], 1] = torch.nan
    return x


PORTS = {"base:h": 5, "chat:h": 3, "chat:out": 4}


def of_ports(*keys: str, writes: tuple[str, ...] | None = None, seed: int = 1) -> sl.Dictionary:
    reads, writes = ([sl.Port.of(key, PORTS[key]) for key in side] if side else None for side in (keys, writes))
    return sl.Dictionary.create("topk", reads=reads, writes=writes, d_sae=24, options={"k": 3}, seed=seed)


@pytest.fixture(scope="module")
def by_port() -> dict[str, torch.Tensor]:
    return {key: 10**i * normal(300, width, seed=i) for i, (key, width) in enumerate(PORTS.items())}


def test_activations_by_port_have_an_error_for_each(by_port):
    d, x = of_ports("base:h", "chat:h"), torch.cat([by_port["base:h"], by_port["chat:h"]], dim=1)
    report = sl.evaluate(d, {key: x.numpy() for key, x in reversed(by_port.items())}, controls=True, n_bootstrap=50)
    assert {name: report[name] for name in report.metrics} == pytest.approx(by_formula(d, x, x), rel=1e-4)
    with torch.no_grad():
        x_hat = dict(zip(report.by_port, d(x).double().split([5, 3], dim=1), strict=True))
    for key, part in x_hat.items():
        y = by_port[key].double()
        fvu = float((y - part).square().sum() / (y - y.mean(0)).square().sum())
        wanted = {"mse": float((y - part).square().sum(1).mean()), "fvu": fvu, "explained_variance": 1 - fvu}
        assert {name: m.value for name, m in report.by_port[key].items()} == pytest.approx(wanted, rel=1e-5)
        assert report.by_port[key]["fvu"].low < fvu < report.by_port[key]["fvu"].high
    assert list(report.by_port) == ["base:h", "chat:h"]
    assert report.by_model is None
    assert report.hook == "base:h + chat:h"
    for control in report.controls.values():
        assert list(control.by_port) == ["base:h", "chat:h"]
    assert sl.evaluate(d, x, n_bootstrap=50).by_port == report.by_port
    assert "at chat " in str(report)


def test_activations_by_port_of_a_transcoder_hold_its_target(by_port):
    several = [of_ports("base:h", writes=("chat:h", "chat:out"), seed=seed) for seed in (1, 2)]
    x, y = by_port["base:h"], torch.cat([by_port["chat:h"], by_port["chat:out"]], dim=1)
    named, given = sl.evaluate(several, by_port, n_bootstrap=5), sl.evaluate(several, (x, y), n_bootstrap=5)
    assert [report.to_json() for report in named] == [report.to_json() for report in given]
    one = of_ports("base:h", writes=("chat:out",))
    assert sl.evaluate(one, by_port, n_bootstrap=5).by_port is None


def test_dictionaries_of_other_ports_share_a_pass_on_one_tensor():
    x, several = normal(200, 8), [of_ports("base:h", "chat:h"), of_ports("chat:h", "base:h")]
    together = sl.evaluate(several, x, n_bootstrap=5)
    assert [list(report.by_port) for report in together] == [["base:h", "chat:h"], ["chat:h", "base:h"]]
    for d, report in zip(several, together, strict=True):
        alone = sl.evaluate(d, x, n_bootstrap=5).by_port
        assert {key: fit["fvu"].value for key, fit in report.by_port.items()} == pytest.approx(
            {key: fit["fvu"].value for key, fit in alone.items()}
        )
    unnamed = sl.Dictionary.create("topk", reads=[sl.Port(width=5), sl.Port(width=3)], d_sae=24, options={"k": 3})
    assert list(sl.evaluate(unnamed, x, n_bootstrap=5).by_port) == ["port 0", "port 1"]


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        ({"chat:h": None}, {}, ConfigError, "no activations of 'chat:h'; did you mean chat:out"),
        ({"base:h": normal(300, 4)}, {}, ShapeError, r"x\['base:h'\] has shape \(300, 4\); the dictionary has 5 columns"),
        ({"base:h": normal(20, 5)}, {}, ShapeError, "different numbers of rows: 20 of base:h, 300 of chat:h"),
        ({"chat:h": torch.zeros(300, 3)}, {}, NonFiniteError, r"rows of x\['chat:h'\] are all the same"),
        ({}, {"target": torch.ones(300, 3)}, ConfigError, "also those that are written; leave out target"),
    ],
)
def test_bad_activations_by_port(by_port, change, settings, error, message):
    x = {key: x for key, x in (by_port | change).items() if x is not None}
    with pytest.raises(error, match=message):
        sl.evaluate(of_ports("base:h", "chat:h"), x, **settings)


def test_activations_by_port_need_dictionaries_that_name_them(d, by_port):
    with pytest.raises(ConfigError, match="names no hook; give one tensor"):
        sl.evaluate(d, by_port)
    with pytest.raises(ConfigError, match="for dictionaries of the same ports"):
        sl.evaluate([of_ports("base:h", "chat:h"), of_ports("chat:h", "base:h")], by_port)


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        (spoilt, {}, NonFiniteError, "x holds NaN or infinity in 2 of 500 rows, the first of which is row 4"),
        (lambda x: x[:, :5], {}, ShapeError, r"x has shape \(500, 5\); this dictionary takes \[n, 8\]"),
        (lambda x: x[:1], {}, ShapeError, "x has 1 rows; at least two are needed"),
        (lambda x: x[0], {}, ShapeError, r"expected floating-point numbers \[n d\]"),
        (torch.Tensor.long, {}, ShapeError, "int64; expected floating-point numbers"),
        (torch.ones_like, {}, NonFiniteError, "the 500 rows of x are all the same"),
        (lambda x: "book.txt", {}, ShapeError, "x is a str"),
        (lambda x: "tiny", {"text": "some text"}, ConfigError, "the second argument is a str; for a text it must be a Lang"),
        (lambda x: x, {"by_frequency": True, "n_tokens": 5}, ConfigError, "by_frequency, n_tokens belong to the evaluation on"),
        (lambda x: x, {"groups": [1, 2]}, ShapeError, r"groups have shape \(2,\); expected a label for each of the 500 rows"),
        (lambda x: x, {"target": torch.ones(500, 8)}, NonFiniteError, "rows of target are all the same"),
        (lambda x: (x, x), {}, ConfigError, "this dictionary writes what it reads; leave out the target"),
        (lambda x: (x, x[:9]), {}, ShapeError, "x has 500 rows and target 9"),
    ],
)
def test_bad_requests(d, x, change, settings, error, message):
    with pytest.raises(error, match=message):
        sl.evaluate(d, change(x), **settings)


def test_bad_requests_with_a_transcoder_and_with_a_model(transcoder, d, x, lm):
    with pytest.raises(ConfigError, match=r"predicts other activations than it reads .* evaluate\(d, \(x, y\)\)"):
        sl.evaluate(transcoder, x)
    with pytest.raises(ShapeError, match=r"target has shape \(500, 8\); this dictionary returns \[n, 5\]"):
        sl.evaluate(transcoder, (x, x))
    with pytest.raises(
        ConfigError, match=r"evaluate\(d, lm, text\) needs a text; target and groups belong to evaluate\(d, x\)"
    ):
        sl.evaluate(d, lm)
    with pytest.raises(ConfigError, match="target and groups belong"):
        sl.evaluate(d, lm, "text", groups=[1])
