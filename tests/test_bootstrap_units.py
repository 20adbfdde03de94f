"""The documents that a bootstrap draws, and the width of intervals from few of them."""

import numpy as np
import pytest
import torch
from scipy.stats import norm
from scipy.stats import t as student

import saelens_lite as sl
from saelens_lite.evaluation.replicates import Units
from saelens_lite.evaluation.sums import PooledSums
from saelens_lite.tokens import token_rows
from saelens_lite.tokens.rows import SpecialTokens, cut_rows
from saelens_lite.tokens.sources import Piece

HOOK = "blocks.1.hook_resid_pre"
N_CTX = 16


@pytest.fixture(scope="module")
def d(lm):
    return sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=96, options={"k": 8}, seed=3)


def evaluated(d, lm, texts):
    return sl.evaluate(d, lm, texts, text_config=sl.TextConfig(n_ctx=N_CTX), n_bootstrap=200)


def test_the_rows_of_a_document_are_drawn_together(lm, d, documents):
    """The same intervals as of activations in groups, whose labels come from the tokenizer alone."""
    texts = [text[: 60 + 35 * i] for i, text in enumerate([*documents, *(text[200:] for text in documents)]) if text[200:]]
    report = evaluated(d, lm, texts)
    sizes = [len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    units = report.replicates.units
    assert (units.name, units.n) == ("documents", len(texts))
    assert units.n_effective == pytest.approx(sum(sizes) ** 2 / sum(n * n for n in sizes))
    assert report.n_sequences > 2 * len(texts)
    rows = token_rows(lm, texts, n_ctx=N_CTX)
    x = lm.run(rows, HOOK)[HOOK][rows.keep]
    grouped = sl.evaluate(d, x, groups=np.repeat(np.arange(len(texts)), sizes), n_bootstrap=200)
    for name in ("l0", "l1", "mse", "fvu", "cossim"):
        assert tuple(report.metrics[name]) == pytest.approx(tuple(grouped.metrics[name]), rel=1e-4)
    assert f"over {len(texts)} documents." in report.intervals
    again = sl.EvalReport.from_dict(report.to_dict())
    assert again.replicates.units == units
    assert again.intervals == report.intervals


def test_few_documents_are_not_drawn_and_the_report_says_so(lm, d, documents):
    report = evaluated(d, lm, documents[3:])
    assert report.replicates.units == Units(f"sequences of {len(documents[3:])} documents", report.n_sequences, pytest.approx(
        report.n_sequences, rel=0.2))  # fmt: skip
    assert "may be too narrow" in report.intervals
    rows = token_rows(lm, documents[3:], n_ctx=N_CTX)
    alone = sl.evaluate(d, lm, rows.tokens, n_bootstrap=20)  # rows of ids are documents of their own
    assert alone.replicates.units.name == "documents"
    assert "narrow" not in alone.intervals


def test_a_packed_row_belongs_to_the_document_in_which_it_begins():
    pieces = [Piece([100, 101, 102], True), Piece([103], True), Piece([], True), Piece([104, 105, 106, 107, 108, 109], True)]
    rows = cut_rows(pieces, sl.TextConfig(pack=True, bos="none"), 5, SpecialTokens(None, 2))
    wanted = [([100, 101, 102, 2, 103], 0), ([104, 105, 106, 107, 108], 2), ([109], 2)]
    assert [(row.ids, row.document) for row in rows] == wanted


@pytest.mark.parametrize("n", [2, 7.5, 40, 10_000])
def test_intervals_of_few_units_are_wider(n):
    sums = PooledSums(200, 0, n)
    assert sums.widening == pytest.approx(student.ppf(0.975, n - 1) / norm.ppf(0.975) * (n / (n - 1)) ** 0.5, rel=1e-4)
    values = torch.linspace(0, 1, 2001, dtype=torch.float64)
    value, low, high = sums.metric(torch.cat([torch.tensor([0.4], dtype=torch.float64), values]))
    assert (value, low, high) == pytest.approx((0.4, 0.4 - 0.375 * sums.widening, 0.4 + 0.575 * sums.widening))


def test_intervals_over_documents_hold_the_mean_of_other_documents():
    """Means of documents differ; 12 documents of unequal length. If their rows count as independent, coverage is poor."""
    generator, held = np.random.default_rng(0), {"documents": 0, "rows": 0}
    n_corpora, n_bootstrap = 300, 300
    for seed in range(n_corpora):
        n_rows = generator.integers(2, 30, size=12)
        means = generator.normal(0, 1, 12)
        of = np.repeat(np.arange(12), n_rows)
        x = torch.from_numpy(means[of] + generator.normal(0, 0.5, len(of)))
        units = {"documents": Units.of_sizes("documents", n_rows.tolist()), "rows": Units.of_sizes("rows", [1] * len(of))}
        for name, number in (("documents", of), ("rows", np.arange(len(of)))):
            sums = PooledSums(n_bootstrap, seed, units[name].n_effective)
            sums.weigh(torch.from_numpy(number))
            sums.add("x", x)
            sums.add("n", torch.ones(len(of)))
            metric = sums.metric(sums["x"] / sums["n"])
            held[name] += metric.low <= 0 <= metric.high
    assert held["documents"] / n_corpora > 0.92
    assert held["rows"] / n_corpora < 0.75
