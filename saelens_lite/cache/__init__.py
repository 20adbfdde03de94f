"""Activations as training data: captured once into a folder, or straight from the model, as shuffled batches.

A cache folder holds manifest.json and shard-00000.safetensors …; it appears when it is complete.
"""

from saelens_lite.cache.capture import capture
from saelens_lite.cache.live import ActivationStream
from saelens_lite.cache.reopen import open_source
from saelens_lite.cache.source import Batch, Source, Statistics, TensorSource
from saelens_lite.cache.stored import ActivationCache

__all__ = ["ActivationCache", "ActivationStream", "Batch", "Source", "Statistics", "TensorSource", "capture", "open_source"]
