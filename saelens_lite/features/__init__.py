"""What the latents of a dictionary stand for: collected in one pass over a text, asked for one by one, shown as a page.

collect.py runs the model and spill.py keeps the codes on disk; reduce.py and cooccurrence.py make numbers of them (tensors.py),
which store.py answers questions from (summary.py) together with weights.py, what the weights alone say; stored.py has the
files.
"""

from saelens_lite.features.detection import Detection, DetectionTask, Score, Scorer, token_baseline, words_of_label
from saelens_lite.features.info import StoreInfo, weights_hash
from saelens_lite.features.store import FeatureStore
from saelens_lite.features.summary import Example, ExampleGroup, LatentSummary, Partner, PositionBin
from saelens_lite.features.tensors import FeatureTensors
from saelens_lite.features.weights import LatentWeights, latent_weights

__all__ = [
    "Detection",
    "DetectionTask",
    "Example",
    "ExampleGroup",
    "FeatureStore",
    "FeatureTensors",
    "LatentSummary",
    "LatentWeights",
    "Partner",
    "PositionBin",
    "Score",
    "Scorer",
    "StoreInfo",
    "latent_weights",
    "token_baseline",
    "weights_hash",
    "words_of_label",
]
