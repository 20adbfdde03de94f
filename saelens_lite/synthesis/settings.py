"""Settings of synthetic activations. The defaults are those of SynthSAEBench-16k (arXiv:2602.14687), except for the sizes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from saelens_lite.config import MOST, FrozenConfig

MOST_FEATURES = 1 << 20
FEATURES_PER_ROOT = 128  # 128 trees for 16,384 features


class SyntheticConfig(FrozenConfig):
    """Settings of synthetic activations: the features, when they fire, how strongly, and in which directions."""

    n_features: int = Field(4096, gt=0, le=MOST_FEATURES, description="Number of planted features.")
    d_in: int = Field(256, gt=0, le=MOST, description="Width of the activations.")
    exponent: float = Field(0.5, gt=0, description="Firing probabilities fall as rank^−exponent.")
    p_max: float = Field(0.4, gt=0, lt=1, description="Firing probability of the most frequent feature.")
    p_min: float = Field(5e-4, gt=0, lt=1, description="Firing probability of the rarest feature; unused if l0 is given.")
    l0: float | None = Field(
        None,
        gt=0,
        description="Sum of the firing probabilities that are aimed at. Default: it follows from p_max and p_min. With it, a "
        "probability is min(p_max, c · rank^−exponent).",
    )
    roots: int | None = Field(
        None,
        ge=0,
        description="Number of trees of features; default: one for every 128 features. 0: no hierarchy.",
    )
    branching: int = Field(4, ge=1, description="Children of a feature in a tree.")
    depth: int = Field(3, ge=1, description="Generations below a root.")
    exclusive: bool = Field(True, description="At most one child of a feature fires.")
    compensate: bool = Field(True, description="Raise the probabilities of children for what the hierarchy takes from them.")
    scale_children: bool = Field(True, description="Multiply the code of a child by the code of its parent over its mean.")
    rank: int = Field(25, ge=1, le=4096, description="Number of common causes that make features fire together.")
    correlation: float = Field(
        0.1, ge=0, le=1, description="Standard deviation of the weight of a common cause. 0: independent features."
    )
    directions: Literal["spread", "random"] = Field(
        "spread", description="Unit directions: moved apart until they overlap as little as they can on average, or random."
    )
    magnitude: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (5.0, 4.0), description="Mean code of the most frequent feature and of the rarest; linear in between."
    )
    magnitude_std: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = Field(
        (0.5, 0.5),
        description="Mean and standard deviation of a normal distribution; each feature has the absolute value of a draw from "
        "it as the standard deviation of its codes.",
    )
    noise: float = Field(0.0, ge=0, description="Standard deviation of normal noise in each coordinate.")
    bias: float = Field(0.5, ge=0, description="Norm of a constant vector that is added.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the features and of their activations.")

    @model_validator(mode="after")
    def _has_possible_probabilities(self) -> "SyntheticConfig":
        if self.l0 is None and self.p_min >= self.p_max:
            raise ValueError(f"p_min = {self.p_min:g} must be smaller than p_max = {self.p_max:g}")
        if self.l0 is not None and self.l0 > self.n_features * self.p_max:
            raise ValueError(f"l0 = {self.l0:g} needs firing probabilities above p_max = {self.p_max:g}; raise p_max")
        if self.roots is not None and self.roots > self.n_features:
            raise ValueError(f"roots = {self.roots} is more than n_features = {self.n_features}")
        return self

    @property
    def n_roots(self) -> int:
        """The number of trees."""
        return self.n_features // FEATURES_PER_ROOT if self.roots is None else self.roots
