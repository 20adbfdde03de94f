"""The numbers of each latent in two models, from one pass over the activations.

In a crosscoder, latent j has the codes f and a direction d_m in each model m. In units in which the activations of every key
have the same RMS norm, with x̂_m = Σ_i f_i d_m,i + b_m:

    reconstruction   Y_m = Σ_i f_i d_m,i                    with the latent's own part f d_m
    error            Y_m = x_m − x̂_m + f d_m                the latent's own part is added back in each model
    β_m              dᵀ(Y_mᵀ f) / (‖d‖² ‖f‖²)               d is d_tuned, in both models
    ν                β_base / β_tuned;  mirror: β_tuned / β_base with d = d_base in both

Source: Minder et al. 2025, arXiv:2504.02922, section 3 and the authors' code. They scale latents that the decoder norms call
specific to the tuned model, and only by d_tuned; the mirror is ours. They leave the bias in the reconstruction; it says nothing
about a latent, so we subtract it.

In a dictionary of differences a latent has one direction d, and

    activation       Y_m = x_m − mean of x_m                in raw units, as the differences are
    ν                β_base / β_tuned;  mirror: β_tuned / β_base
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from saelens_lite.cache import Statistics
from saelens_lite.codes.products import pair_products
from saelens_lite.dictionary import Dictionary
from saelens_lite.diffing.reads import MIN_UNITS, Reads, check_widths, statistics_of
from saelens_lite.diffing.report import CROSSCODER, DIFFERENCE, DiffReport
from saelens_lite.diffing.sides import Sides, input_of
from saelens_lite.diffing.sums import PairSums
from saelens_lite.features.info import codes_hash
from saelens_lite.features.per_model import delta_norm
from saelens_lite.ports import apart

Values = dict[str, Float[Tensor, " d_sae"]]
MODELS = ("base", "tuned")


@torch.no_grad()
def report_of(dictionary: Dictionary, sides: Sides, reads: Reads) -> DiffReport:
    """Return the report of a dictionary without controls; see `diff`."""
    facts = {name: getattr(reads, name) for name in ("source", "n_tokens", "n_units", "units")}
    values = _values(dictionary, sides, reads)
    facts |= {"place": dictionary.place, "dictionary_sha256": codes_hash(dictionary)}
    return DiffReport(base=sides.base, tuned=sides.tuned, values=values, **facts)


def _values(dictionary: Dictionary, sides: Sides, reads: Reads) -> Values:
    """Return the numbers of each latent: CROSSCODER of report.py, or DIFFERENCE for a dictionary of differences."""
    statistics = statistics_of(reads, sides.all_keys)
    check_widths(dictionary, {key: len(one.mean) for key, one in statistics.items()})
    if sides.is_of_differences:
        return _of_differences(dictionary, sides, reads, statistics)
    scales = {key: len(one.mean) ** 0.5 / one.rms_norm for key, one in statistics.items()}  # as in training
    return _of_crosscoder(dictionary, sides, reads, scales)


def _of_crosscoder(dictionary: Dictionary, sides: Sides, reads: Reads, scales: dict[str, float]) -> Values:
    """Return the numbers of a dictionary with a direction in each model; a pass over the activations."""
    W_dec, names = dictionary.W_dec.detach(), dict(zip(MODELS, (sides.base, sides.tuned), strict=True))
    d = {side: sides.directions(W_dec, dictionary.writes, name, scales) for side, name in names.items()}
    wide_d = {side: x.double() for side, x in d.items()}
    other = {"base": "tuned", "tuned": "base"}
    # the names of sums are part, model of the activations, and model of the direction
    crossed = [(f"{part} {other[of]} {of}", f"{part} {of} {of}") for part in ("error", "reconstruction") for of in MODELS]
    sums = PairSums(dictionary.d_sae, tuple(crossed))
    own = {(m, of): (wide_d[m] * wide_d[of]).sum(1) for m in MODELS for of in MODELS}
    for some in reads.with_progress("diff"):
        x = input_of(dictionary, some.acts).to(W_dec.device)
        codes = dictionary.encode(x)
        x_hat = dictionary.decode(codes, x)
        by_latents = x_hat - dictionary.base(x)  # without b_dec and a skip connection
        written = [port.key for port in dictionary.writes]
        parts, made_of = (dict(zip(written, apart(y, dictionary.writes), strict=True)) for y in (x_hat, by_latents))
        value, latent = codes.value, codes.latent
        added = {"square": value.double().square()}
        for m, name in names.items():
            keys = sides.keys(name)
            error = torch.cat([(some.acts[key].to(x_hat) - parts[key]) * scales[key] for key in keys], -1)
            made = torch.cat([made_of[key] * scales[key] for key in keys], -1)
            for of in MODELS:
                products = pair_products(codes.support, error, d[of]).double() * value
                added[f"error {m} {of}"] = products + own[m, of].to(value.device)[latent] * added["square"]
                added[f"reconstruction {m} {of}"] = pair_products(codes.support, made, d[of]).double() * value
        sums.add(codes, some.unit, added)
    norm = {m: own[m, m].sqrt().cpu() for m in MODELS}
    values = {
        "frequency": torch.from_numpy(sums.n_fires / reads.n_tokens),
        "norm_base": norm["base"],
        "norm_tuned": norm["tuned"],
        "delta_norm": delta_norm(norm["base"], norm["tuned"]),
        "cosine": own["base", "tuned"].cpu() / (norm["base"] * norm["tuned"]),
        "encoder_cosine": _encoder_cosine(dictionary, sides, scales),
    }
    for part in ("error", "reconstruction"):
        for m in MODELS:
            values[f"beta_{part}_{m}"] = _beta(sums, f"{part} {m} tuned", norm["tuned"])
        for name, of in (("nu", "tuned"), ("mirror", "base")):
            ratio = sums.ratio(f"{part} {other[of]} {of}", f"{part} {of} {of}", MIN_UNITS)
            values |= {f"{name}_{part}{end}": x for end, x in zip(("", "_low", "_high"), ratio, strict=True)}
    return {name: values[name].float() for name in CROSSCODER}


def _of_differences(dictionary: Dictionary, sides: Sides, reads: Reads, statistics: dict[str, Statistics]) -> Values:
    """Return the numbers of a dictionary whose latents have a direction in the difference of the models."""
    d = dictionary.W_dec.detach()
    names = dict(zip(MODELS, (sides.base, sides.tuned), strict=True))
    sums = PairSums(dictionary.d_sae, (("base", "tuned"), ("tuned", "base")))
    for some in reads.with_progress("diff"):
        x = input_of(dictionary, some.acts).to(d.device)
        codes = dictionary.encode(x)
        added = {"square": codes.value.double().square()}
        for m, name in names.items():
            centred = torch.cat([some.acts[key].to(d) - statistics[key].mean.to(d) for key in sides.keys(name)], -1)
            added[m] = pair_products(codes.support, centred, d).double() * codes.value
        sums.add(codes, some.unit, added)
    norm = torch.linalg.vector_norm(d.double(), dim=1).cpu()
    values = {"frequency": torch.from_numpy(sums.n_fires / reads.n_tokens), "norm": norm}
    values |= {f"beta_activation_{m}": _beta(sums, m, norm) for m in MODELS}
    for name, ratio in (("nu", ("base", "tuned")), ("mirror", ("tuned", "base"))):
        ends = zip(("", "_low", "_high"), sums.ratio(*ratio, MIN_UNITS), strict=True)
        values |= {f"{name}_activation{end}": x for end, x in ends}
    return {name: values[name].float() for name in DIFFERENCE}


def _beta(sums: PairSums, name: str, norm: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    """Return a numerator divided by ‖d‖² ‖f‖²; NaN where the latent never fires or has no direction."""
    below = norm.square() * torch.from_numpy(sums.total["square"])
    return torch.where(below > 0, torch.from_numpy(sums.total[name]) / below, torch.nan)


def _encoder_cosine(dictionary: Dictionary, sides: Sides, scales: dict[str, float]) -> Float[Tensor, " d_sae"]:
    """Return the cosine of the encoder's weights for both models; NaN if the dictionary does not read both at the same hooks.

    The encoder takes x, so its weights are in units of 1 / x.
    """
    keys = {port.key for port in dictionary.reads}
    if not keys.issuperset(sides.all_keys):
        return torch.full((dictionary.d_sae,), torch.nan)
    inverse = {key: 1 / scale for key, scale in scales.items()}
    rows = dictionary.W_enc.detach().T.double()
    halves = (sides.directions(rows, dictionary.reads, name, inverse) for name in (sides.base, sides.tuned))
    return F.cosine_similarity(*halves, dim=1).cpu()
