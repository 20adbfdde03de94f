"""Synthetic activations with a known truth, and the measures of a dictionary against it."""

from saelens_lite.synthesis.benchmark import Synthetic, synthetic
from saelens_lite.synthesis.report import SyntheticReport
from saelens_lite.synthesis.settings import SyntheticConfig
from saelens_lite.synthesis.source import Truth

__all__ = ["Synthetic", "SyntheticConfig", "SyntheticReport", "Truth", "synthetic"]
