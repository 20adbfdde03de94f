"""What the latents of a dictionary stand for: collected in one pass over a text, asked for one by one, shown as a page.

collect.py runs the model and code_log.py keeps the codes on disk. reduce.py and cooccurrence.py turn them into numbers
(tensors.py). store.py answers questions from these (summary.py) and from the weights alone (weights.py). store_files.py reads
and writes the files.
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
