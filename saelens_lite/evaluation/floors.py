"""Noise floors: the difference below which two rows of a table say nothing, and how it is computed.

A floor is one number for each column. Under chance alone, differences between rows exceed the floors in at most 5 % of tables,
all pairs of rows and all columns together. Two sources of chance count:

- **The text.** The values of a column are noisy because the text is a sample. Rows that were measured on the same text share
  most of that noise, so it is their covariance that matters. It comes from bootstrap replicates with the same weights for all
  rows (a paired bootstrap). A count of latents that fire is an exception, because a resample never finds a latent that the
  text lacks: its replicates weigh what each sequence adds to the count (a jackknife), and its variance is at least that of one
  latent. Less than 10 replicates give no floor. Reports without any give that of their intervals, as if they were unpaired.
- **The seed.** Dictionaries of one recipe that differ only in their seeds differ too, usually by more than the text explains.
  The variance over seeds is pooled over all recipes with several seeds, and applies to the others as well. It is assumed to be
  the same in all recipes. That of a share of latents is at least the variance of a Poisson count, because few seeds often
  agree by chance in a small number of dead latents.

The floor of a column is the quantile of max − min over the rows, in draws of both kinds of noise. Each variance is estimated,
so each draw divides it by a draw of χ² / df: with one source, this is the studentised range of Tukey's test; with both, the
Behrens–Fisher distribution. Columns share the 5 % equally (Bonferroni); those without noise take no share.

Part of the variance over seeds is an effect of this text on each dictionary. It counts once: it is taken from the covariance
of the rows, and the variance over seeds is at least that part. Floors say nothing about another training text, another
evaluation text of another kind, or a bad choice of settings.

Source: Tukey 1953 and Kramer 1956 (studentised range); Fisher 1935 (fiducial distribution of a difference); Dunn 1961 (shares
of the level); Efron and Stein 1981 (the jackknife); Agarwal et al. 2021, arXiv:2108.13264 (floors from few seeds need the
seeds' own spread).
"""

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL = 0.05
N_DRAWS = 50_000
MOST_NUMBERS = 1 << 24  # that are drawn at a time
N_ANGLES = 200_001  # at which the distribution of t is summed


class Noise(NamedTuple):
    """The noise of the values of one metric in the rows of a table.

    `covariance` is that of the rows' values over samples of the text, estimated with `df` degrees of freedom. `spread` is the
    variance over seeds, with `spread_df` degrees of freedom; 0 if it is not known. A row is a mean of `n_seeds` dictionaries.
    What the spread has of the effects of the text, the covariance lacks.
    """

    covariance: Float[np.ndarray, "rows rows"]
    df: float
    n_seeds: tuple[int, ...]
    spread: float = 0.0
    spread_df: float = 0.0

    @property
    def variances(self) -> Float[np.ndarray, "rows rows"]:
        """The variance of the difference between each pair of rows."""
        own = np.diag(self.covariance)
        over_seeds = self.spread / np.asarray(self.n_seeds, dtype=np.float64)
        pairs = own[:, None] + own[None] - 2 * self.covariance + over_seeds[:, None] + over_seeds[None]
        np.fill_diagonal(pairs, 0)
        return pairs.clip(min=0)


def noise_floors_of(columns: Mapping[str, Noise], level: float = LEVEL) -> dict[str, float]:
    """Return the floor of each column, such that chance exceeds any of them in at most `level` of tables.

    The floor of a column without noise is 0. That of a column with less than two rows is NaN.
    """
    noisy = [name for name, noise in columns.items() if len(noise.n_seeds) > 1 and noise.variances.max() > 0]
    return {name: floor_of(noise, level / max(1, len(noisy))) for name, noise in columns.items()}


def floor_of(noise: Noise, level: float = LEVEL) -> float:
    """Return the 1 − level quantile of the largest difference between rows that are equal but for noise."""
    n_rows = len(noise.n_seeds)
    if n_rows < 2:
        return float("nan")
    if not noise.variances.max() > 0:
        return 0.0
    if n_rows == 2 and not noise.spread:
        return float(noise.variances.max() ** 0.5) * t_quantile(1 - level / 2, noise.df)
    random = np.random.Generator(np.random.Philox(key=n_rows))
    centre = np.eye(n_rows) - 1 / n_rows  # noise that all rows share has no effect
    values, vectors = np.linalg.eigh(centre @ noise.covariance @ centre)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    over_seeds = np.sqrt(noise.spread / np.asarray(noise.n_seeds, dtype=np.float64))
    ranges, at_once = [], max(1, MOST_NUMBERS // n_rows)
    for first in range(0, N_DRAWS, at_once):
        n = min(at_once, N_DRAWS - first)
        drawn = random.standard_normal((n, n_rows)) @ root.T * _inflation(random, noise.df, n)
        if noise.spread:
            drawn += random.standard_normal((n, n_rows)) * over_seeds * _inflation(random, noise.spread_df, n)
        ranges.append(drawn.max(1) - drawn.min(1))
    return float(np.quantile(np.concatenate(ranges), 1 - level))


def _inflation(random: np.random.Generator, df: float, n: int) -> Float[np.ndarray, "n 1"]:
    """Return draws of sqrt(df / χ²), the factor by which the true deviation may exceed an estimated one."""
    return np.sqrt(df / random.chisquare(df, (n, 1))) if np.isfinite(df) else np.ones((n, 1))


@cache  # a table asks for the same one in each of its cells
def t_quantile(p: float, df: int | float) -> float:
    """Return the quantile of Student's t.

    With t = sqrt(df) tan θ, the density of θ is proportional to cos(θ)^(df − 1), which is summed on a grid.
    """
    widest = min(np.pi / 2, 40 / np.sqrt(df)) if np.isfinite(df) else 0.0
    if not widest:  # the normal distribution
        return t_quantile(p, 1e6)
    angle = np.linspace(-widest, widest, N_ANGLES)
    with np.errstate(divide="ignore"):
        density = np.exp((df - 1) * np.log(np.cos(angle).clip(min=0))) if df != 1 else np.ones(N_ANGLES)
    density = np.nan_to_num(density)
    steps = (density[1:] + density[:-1]) / 2
    total = np.concatenate([[0.0], np.cumsum(steps)]) / steps.sum()
    return float(np.sqrt(df) * np.tan(np.interp(p, total, angle)))


def joint_df(*dfs: float) -> float:
    """Return the degrees of freedom of a variance whose relative errors come from several sources."""
    inverse = sum(1 / df for df in dfs)
    return 1 / inverse if inverse else float("inf")
