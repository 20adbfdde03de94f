"""Names and numbers in tables: short, whole, and as many digits as the interval allows."""

import io
import math

import pytest
from rich.console import Console

from saelens_lite.evaluation import EvalReport, Metric, table
from saelens_lite.tables import short_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/0-topk/dictionary", "runs/a/1-l1/dictionary"], ["0-topk", "1-l1"]),
        (["runs/a/0-topk/dictionary"], ["0-topk"]),
        (["runs/a/x", "runs/b/x"], ["a/x", "b/x"]),
        (["dictionary"], ["dictionary"]),
        (["a/dictionary", "b.safetensors"], ["a/dictionary", "b.safetensors"]),
        (["hf://me/repo/h.1@abc", "hf://me/repo/h.2@abc"], ["h.1@abc", "h.2@abc"]),
        (["a/b", "a/b"], ["b", "b"]),
        ([], []),
    ],
)
def test_names_lose_the_folders_that_all_share(paths, names):
    assert short_names(paths) == names


def test_long_names_break_between_words():
    assert short_names(["first-experiment_of_batch_topk"], width=12) == ["first-\nexperiment_\nof_batch_\ntopk"]


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (0.81072, 0.80, 0.82, "0.811 ±0.01"),
        (0.81072, 0.8105, 0.8109, "0.8107 ±0.0002"),
        (17.321, 16.9, 17.7, "17.3 ±0.4"),
        (1846.2, 1826, 1866, "1846 ±20"),
        (16.0, 16.0, 16.0, "16.0 ±0"),
        (0.3457, math.nan, math.nan, "0.346"),
        (math.nan, math.nan, math.nan, "nan"),
        (0.0, 0.0, 0.0, "0 ±0"),
    ],
)
def test_a_value_has_the_digits_that_its_interval_allows(value, low, high, shown):
    assert Metric(value, low, high).short == shown


def report(n_sequences: int) -> EvalReport:
    low, high = (math.nan, math.nan) if n_sequences == 1 else (0.79, 0.83)
    names = ("l0", "fvu", "ce_loss_score", "kl_div_score", "frac_alive")
    facts = {
        "text": "t",
        "text_sha256": "0",
        "disjoint": True,
        "disjoint_why": "",
        "model": "m",
        "hook": "h",
        "excluded": "BOS",
    }
    return EvalReport(metrics={n: Metric(0.81, low, high) for n in names}, n_tokens=9, n_sequences=n_sequences, **facts)


def test_the_table_fits_80_columns_under_the_names_of_the_metrics(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    screen = io.StringIO()
    Console(width=80, file=screen).print(table({f"runs/a/{i}-batch_topk/dictionary": report(3) for i in range(3)}))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["dictionary", "l0", "fvu", "ce_loss_score", "kl_div_score", "frac_alive"]
    assert sum("-batch_topk " in line for line in lines) == 3


def test_a_report_of_one_sequence_says_why_it_has_no_intervals():
    one, several = report(1), report(3)
    for text in (str(one), one.to_markdown()):
        assert "they need several sequences, and this text has one" in text
        assert "nan" not in text
    assert "several sequences" not in str(several)
    assert "95 % bootstrap" in several.to_markdown()
