"""The numbers of a feature store."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

NONE = -1  # in place of a place or a latent: there is none


class FeatureTensors(NamedTuple):
    """The numbers of a store; those of a latent are of its activations, the codes above zero.

    A place is row · n_ctx + position, and NONE where there are fewer contexts than room for them. `nearby` are activations
    from window[0] tokens before the peak to window[1] after it. Bin j of a histogram counts activations in
    [j · bin_width, (j + 1) · bin_width), the last bin also the largest of all.
    """

    tokens: Int[Tensor, "n_seq n_ctx"]
    length: Int[Tensor, " n_seq"]  # positions of a row up to the last that counts
    band_low: Int[Tensor, " n_bands"]  # first and last position of each band of positions, and tokens that count there
    band_high: Int[Tensor, " n_bands"]
    band_tokens: Int[Tensor, " n_bands"]

    count: Int[Tensor, " d_sae"]
    mean: Float[Tensor, " d_sae"]
    std: Float[Tensor, " d_sae"]
    skew: Float[Tensor, " d_sae"]
    kurtosis: Float[Tensor, " d_sae"]  # in excess of the normal distribution's
    histogram: Int[Tensor, "d_sae n_bins"]
    bin_width: Float[Tensor, " d_sae"]
    band_count: Int[Tensor, "d_sae n_bands"]
    band_mean: Float[Tensor, "d_sae n_bands"]  # of the activations in the band

    top_value: Float[Tensor, "d_sae top_n"]  # best first, each from another row; 0 where there is none
    top_place: Int[Tensor, "d_sae top_n"]
    top_nearby: Float[Tensor, "d_sae top_n window"]
    group_count: Int[Tensor, "d_sae n_groups"]  # group 0 holds the largest activations
    group_low: Float[Tensor, "d_sae n_groups"]
    group_high: Float[Tensor, "d_sae n_groups"]
    group_place: Int[Tensor, "d_sae n_groups group_size"]  # largest activation first
    group_nearby: Float[Tensor, "d_sae n_groups group_size window"]
    random_place: Int[Tensor, "d_sae n_random"]  # in the order of the text
    random_nearby: Float[Tensor, "d_sae n_random window"]
    silent_place: Int[Tensor, "d_sae n_silent"]  # nowhere in the window does the latent fire

    frequent_partner: Int[Tensor, "d_sae n_partners"]  # most frequent first
    frequent_count: Int[Tensor, "d_sae n_partners"]
    specific_partner: Int[Tensor, "d_sae n_partners"]  # largest pointwise mutual information first
    specific_count: Int[Tensor, "d_sae n_partners"]


OF_TEXT = ("tokens", "length", "band_low", "band_high", "band_tokens")  # fields that are the same for every dictionary
