"""Interventions: change latents and measure the effect, or find the latents that cause an output.

edits.py has the edits that `LanguageModel.splice` applies. doses.py measures the effect of growing amounts of a latent, beside
random latents. attribution.py measures the contribution of each active latent to a metric. steering.py shows text with and
without edits.
"""

from saelens_lite.interventions.attribution import Attribution, attribute
from saelens_lite.interventions.doses import DoseResponse, dose_response
from saelens_lite.interventions.edits import Ablate, Add, Clamp, Edit, Scale
from saelens_lite.interventions.metrics import LogitDifference, LogProb, Metric
from saelens_lite.interventions.steering import Steered, kl_cost, steer

__all__ = [
    "Ablate",
    "Add",
    "Attribution",
    "Clamp",
    "DoseResponse",
    "Edit",
    "LogProb",
    "LogitDifference",
    "Metric",
    "Scale",
    "Steered",
    "attribute",
    "dose_response",
    "kl_cost",
    "steer",
]
