"""Synthetic activations with a known truth, and the measures of a dictionary against it."""

from saelens_lite.synthesis.report import SyntheticReport
from saelens_lite.synthesis.settings import SyntheticConfig
from saelens_lite.synthesis.source import Synthetic, Truth, synthetic

__all__ = ["Synthetic", "SyntheticConfig", "SyntheticReport", "Truth", "synthetic"]
