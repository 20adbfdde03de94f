"""FVU by token frequency against a loop over tokens, and where it is shown."""

import io
import json
import math
from collections import Counter

import pytest
import torch
from rich.console import Console

import saelens_lite as sl
from saelens_lite.errors import ConfigError
from saelens_lite.evaluation import frequency_markdown, frequency_table
from saelens_lite.hub import write_card
from saelens_lite.tokens import TokenRows, token_rows

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def rows(lm, documents):
    return token_rows(lm, documents, n_ctx=32, n_tokens=900)


@pytest.fixture(scope="module")
def x(lm, rows):
    return lm.run(rows, HOOK)[HOOK].double()


def dictionary(lm, **options):
    return sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=lm.d_model), d_sae=96, options={"k": 8, **options})


def test_each_band_is_its_formula(lm, rows, x):
    d = dictionary(lm)
    report = sl.evaluate(d, lm, rows, by_frequency=True, n_bootstrap=50, batch_tokens=200)
    with torch.no_grad():
        x_hat = d(x.float()).double()
    places = [tuple(place) for place in rows.keep.nonzero().tolist()]
    counts = Counter(int(rows.tokens[place]) for place in places)
    mean = x[rows.keep].mean(0)
    error, variance, n_tokens, ids = Counter(), Counter(), Counter(), {}
    for place in places:
        token = int(rows.tokens[place])
        band = math.floor(math.log10(counts[token]) + 1e-9)
        error[band] += float((x[place] - x_hat[place]).square().sum())
        variance[band] += float((x[place] - mean).square().sum())
        n_tokens[band] += 1
        ids.setdefault(band, set()).add(token)
    assert len(error) >= 2
    assert [(band.low, band.high) for band in report.by_frequency] == [(10**b, 10 ** (b + 1) - 1) for b in sorted(error)]
    for b, band in zip(sorted(error), report.by_frequency, strict=True):
        assert band.fvu.value == pytest.approx(error[b] / variance[b], rel=1e-5)
        assert (band.n_tokens, band.n_ids) == (n_tokens[b], len(ids[b]))
        assert band.fvu.low < band.fvu.value < band.fvu.high
    weighted = sum(band.fvu.value * variance[b] for b, band in zip(sorted(error), report.by_frequency, strict=True))
    assert report["fvu"] == pytest.approx(weighted / sum(variance.values()), rel=1e-6)


def test_a_band_that_is_the_whole_text_has_the_fvu_and_interval_of_the_text(lm, rows):
    few = rows[:3]
    again = TokenRows(few.tokens.repeat(12, 1), few.keep.repeat(12, 1))
    assert 12 * max(Counter(few.tokens[few.keep].tolist()).values()) < 100
    report = sl.evaluate(dictionary(lm), lm, again, by_frequency=True, n_bootstrap=100)
    (band,) = report.by_frequency
    assert tuple(band.fvu) == pytest.approx(tuple(report.metrics["fvu"]), rel=1e-9)
    assert (band.low, band.high, band.n_tokens) == (10, 99, report.n_tokens)


def test_the_mean_scores_one_in_every_band(lm, rows, x):
    d = dictionary(lm)
    torch.nn.init.zeros_(d.W_dec)
    d.b_dec.data.copy_(x[rows.keep].mean(0))
    for band in sl.evaluate(d, lm, rows, by_frequency=True, n_bootstrap=5).by_frequency:
        assert band.fvu.value == pytest.approx(1, abs=1e-5)


def test_it_is_shown_only_on_request(lm, rows, tmp_path):
    d = dictionary(lm)
    without, with_ = (sl.evaluate(d, lm, rows, by_frequency=asked, n_bootstrap=20) for asked in (False, True))
    assert without.by_frequency is None
    assert "by_frequency" not in without.to_dict()
    assert with_.metrics == without.metrics
    read = json.loads(with_.to_json(tmp_path / "eval.json"))
    assert {key: read[key] for key in without.to_dict()} == without.to_dict()
    assert [band["n_tokens"] for band in read["by_frequency"]] == [band.n_tokens for band in with_.by_frequency]
    assert read["by_frequency"][0]["fvu"]["value"] == with_.by_frequency[0].fvu.value
    assert "times" in str(with_)
    assert "times" not in str(without)
    reports = {"a": with_, "b": with_}
    lines = frequency_markdown(reports).splitlines()
    assert len(lines) == 2 + len(with_.by_frequency)
    assert lines[0] == "| occurs | ids | tokens | fvu, a | fvu, b |"
    assert lines[2].startswith(f"| 1 – 9 times | {with_.by_frequency[0].n_ids} | {with_.by_frequency[0].n_tokens / 900:.1%} | ")
    shown = io.StringIO()
    Console(width=200, file=shown).print(frequency_table(reports))
    assert all(band.label in shown.getvalue() for band in with_.by_frequency)
    folder = d.save(tmp_path / "d")
    assert "times here" in write_card(folder, d, with_).read_text()
    assert "times here" not in write_card(folder, d, without).read_text()


def test_reports_that_do_not_belong_together(lm, rows):
    d = dictionary(lm)
    report, other = (sl.evaluate(d, lm, part, by_frequency=True, n_bootstrap=5) for part in (rows, rows[:9]))
    for reports in ({"a": sl.evaluate(d, lm, rows[:2], n_bootstrap=5)}, {"a": report, "b": other}, {}):
        with pytest.raises(ConfigError, match="evaluate together with by_frequency=True"):
            frequency_table(reports)


def test_text_settings_of_an_evaluation(lm, documents):
    d = dictionary(lm)
    origin = d.origin.replace(n_ctx=24, prepend_bos=False)
    d.origin = origin
    plain = sl.evaluate(d, lm, documents, n_tokens=300, n_bootstrap=5)
    assert (
        plain.text_sha256
        == sl.evaluate(d, lm, token_rows(lm, documents, n_ctx=24, prepend_bos=False, n_tokens=300), n_bootstrap=5).text_sha256
    )
    config = sl.TextConfig(pack=True, exclude_positions=(0, 1))
    packed = sl.evaluate(d, lm, documents, n_tokens=300, n_bootstrap=5, text_config=config)
    wanted = token_rows(lm, documents, n_tokens=300, text_config=config.replace(n_ctx=24, bos="none"))
    assert packed.text_sha256 == sl.evaluate(d, lm, wanted, n_bootstrap=5).text_sha256 != plain.text_sha256
    assert (plain.excluded, packed.excluded) == ("BOS, padding and position 0", "BOS, padding and positions 0, 1")
