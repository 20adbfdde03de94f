"""Synthetic activations that measure dictionaries."""

from dataclasses import replace
from typing import Any

import torch

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, ShapeError, not_a_dictionary
from saelens_lite.synthesis.controls import control_reports
from saelens_lite.synthesis.measure import FEWEST, decoded, score
from saelens_lite.synthesis.report import SyntheticReport
from saelens_lite.synthesis.settings import SyntheticConfig
from saelens_lite.synthesis.source import SyntheticSource


class Synthetic(SyntheticSource):
    """Synthetic activations of planted features: a source to train on, and the measures of dictionaries against the truth.

        x = bias + Σ_i code_i · directions_i + noise

    `saelens_lite.train` draws new batches without end. `sample` returns activations with their true codes. The settings are in
    `config`, and all that decides the activations in `features`.
    """

    def measure(self, dictionary: Dictionary, n: int = 1 << 15, *, seed: int = 0, controls: bool = False) -> SyntheticReport:
        """Measure how well a dictionary recovers the planted features, on n new activations.

        Args:
            dictionary: an autoencoder of width d_in, for the activations as they are.
            seed: of the activations that are drawn, and of the bootstrap.
            controls: measure the three controls of `saelens_lite.synthesis.controls` on the same activations too.

        Raises:
            ConfigError: this is not a dictionary, n is too small or not an integer, or scipy is not installed.
            ShapeError: the dictionary does not fit the activations.
            NonFiniteError: the dictionary holds NaN or infinity.
        """
        if not isinstance(dictionary, Dictionary):
            raise not_a_dictionary(dictionary)
        if not dictionary.writes_what_it_reads or dictionary.d_in != self.config.d_in:
            raise ShapeError(
                f"the dictionary maps {dictionary.d_in} to {dictionary.d_out} numbers; expected an autoencoder of the "
                f"synthetic activations, of width {self.config.d_in}"
            )
        if not isinstance(n, int) or n < FEWEST:
            raise ConfigError(f"n = {n!r}; expected an integer, at least {FEWEST:,} activations")
        dictionary.check_finite()
        report = score(self, dictionary.W_dec, (decoded(dictionary, truth) for truth in self.pieces(n, seed)), seed)
        if not controls:
            return report
        return replace(report, controls=control_reports(self, dictionary.d_sae, report["l0"], n, seed))


def synthetic(
    n_features: int = 4096, d_in: int = 256, *, device: str | torch.device | None = None, **settings: Any
) -> Synthetic:
    """Return synthetic activations of planted features, to train on and to measure dictionaries with.

    Args:
        n_features: number of planted features.
        d_in: width of the activations.
        device: where activations are drawn; default: the CPU. Another kind of device draws others.
        settings: fields of `SyntheticConfig`: exponent, p_max, p_min or l0 (firing probabilities), roots, branching, depth,
            exclusive (hierarchy), rank, correlation (common causes), directions, magnitude, magnitude_std, noise, bias, seed.

    Raises:
        ConfigError: a setting is unknown or has a bad value.
    """
    return Synthetic(SyntheticConfig(n_features=n_features, d_in=d_in, **settings), device)
