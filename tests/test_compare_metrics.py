"""The script that sets our metrics beside those of other tools calls only equal what is equal."""

import math

import compare_metrics
import pytest

OWN = {"l0": 3.0, "mse": 500.0}
FORMULAS = {("SAEBench", "mse"): 1.0}


@pytest.mark.parametrize(
    ("judge", "agree"),
    [
        ({"l0": 3.0, "mse": 500.0}, True),
        ({"l0": 3.0, "mse": 1.0}, True),
        ({"mse": 1.0}, True),
        ({"l0": 3.1, "mse": 1.0}, False),
        ({"l0": 3.0, "mse": 2.0}, False),
        ({"l0": math.nan, "mse": 1.0}, False),
        ({"l0": 3.0, "mse": math.nan}, False),
    ],
)
def test_values_agree_with_ours_or_with_their_formula(judge, agree):
    assert compare_metrics.compare("a", OWN, {"SAEBench": judge}, FORMULAS) is agree


def test_nan_agrees_with_nothing():
    assert not compare_metrics.compare("a", {"l0": math.nan}, {"SAELens": {"l0": math.nan}}, {})
