"""The numbers of a feature store."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

NONE = -1  # stands for a missing place or latent


class FeatureTensors(NamedTuple):
    """The numbers of a store. Activations are codes above zero.

    A place is row · n_ctx + position, or NONE in entries without a context. `nearby` holds activations from window[0] tokens
    before the peak to window[1] tokens after it. Bin j of a histogram counts activations in
    [j · bin_width, (j + 1) · bin_width); the last bin also counts the largest activation.
    """

    tokens: Int[Tensor, "n_seq n_ctx"]
    length: Int[Tensor, " n_seq"]  # positions of a row up to the last one that counts
    band_low: Int[Tensor, " n_bands"]  # first and last position of each band, and the tokens that count in it
    band_high: Int[Tensor, " n_bands"]
    band_tokens: Int[Tensor, " n_bands"]

    count: Int[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    std: Float[Tensor, " d_sae"]
    skew: Float[Tensor, " d_sae"]
    kurtosis: Float[Tensor, " d_sae"]  # excess kurtosis: 0 for a normal distribution
    histogram: Int[Tensor, "d_sae n_bins"]
    bin_width: Float[Tensor, " d_sae"]
    band_count: Int[Tensor, "d_sae n_bands"]
    band_mean: Float[Tensor, "d_sae n_bands"]  # mean of the activations in the band

    top_value: Float[Tensor, "d_sae top_n"]  # largest first, at most one a row; 0 in entries without a context
    top_place: Int[Tensor, "d_sae top_n"]
    top_nearby: Float[Tensor, "d_sae top_n window"]
    group_count: Int[Tensor, "d_sae n_groups"]  # group 0 holds the largest activations
    group_low: Float[Tensor, "d_sae n_groups"]
    group_high: Float[Tensor, "d_sae n_groups"]
    group_place: Int[Tensor, "d_sae n_groups group_size"]  # largest activation first
    group_nearby: Float[Tensor, "d_sae n_groups group_size window"]
    random_place: Int[Tensor, "d_sae n_random"]  # in the order of the text
    random_nearby: Float[Tensor, "d_sae n_random window"]
    silent_place: Int[Tensor, "d_sae n_silent"]  # the latent fires nowhere in the window

    frequent_partner: Int[Tensor, "d_sae n_partners"]  # most frequent first
    frequent_count: Int[Tensor, "d_sae n_partners"]
    specific_partner: Int[Tensor, "d_sae n_partners"]  # largest pointwise mutual information first
    specific_count: Int[Tensor, "d_sae n_partners"]


OF_TEXT = ("tokens", "length", "band_low", "band_high", "band_tokens")  # fields that do not depend on the dictionary
