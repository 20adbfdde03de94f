"""Interventions: what the model does when latents are changed, and which latents make it do what it does.

edits.py has the edits that `LanguageModel.splice` applies, doses.py measures what more and more of a latent does beside random
ones, attribution.py says how much each active latent contributes to a metric, steering.py shows text with and without edits.
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
