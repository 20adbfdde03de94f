"""Capture activations: store them once in a folder, or compute them during training. Both give shuffled batches.

```python
cache = sl.capture(lm, "python-docs:train", hooks=[hook], out="cache", n_tokens=300_000)
cache = sl.ActivationCache.open("cache")  # later
stream = sl.ActivationStream(lm, "python-docs:train", hook)  # no disk: the model runs during training
```

```sh
saelens-lite capture book.txt --model tiny --hook blocks.2.hook_resid_pre --out cache
```

The model runs once over the text, up to the deepest hook. Several hooks cost little more than one. The seed alone decides the
order of the batches, so training can resume at any batch.

To resume an interrupted capture, repeat the call: it continues after the last complete shard and writes the same bytes.

```sh
torchrun --nproc-per-node 4 -m saelens_lite capture book.txt --model tiny --hook blocks.2.hook_resid_pre --out cache
```

Several processes, on one machine or on several that share a file system, write one cache together. Each runs the model over
its own sections of the text, and the cache has the same bytes as that of one process. An interrupted capture may be resumed
with another number of processes.

Several models read the same token ids, and one cache holds the activations of all:

```python
both = sl.capture({"base": lm, "chat": sl.load_model("tiny")}, "python-docs:train", hook, "both", n_tokens=2000)
both.hooks  # ("base:blocks.2.hook_resid_pre", "chat:blocks.2.hook_resid_pre")
```

```sh
saelens-lite capture book.txt --model base=gpt2 --model chat=org/gpt2-chat --hook blocks.2.hook_resid_pre --one-at-a-time
```

Given names or folders in place of loaded models, or with `--one-at-a-time`, one model at a time is in memory. The cache has the
same bytes. Models whose token ids do not mean the same are refused.

A cache folder holds manifest.json and shard-00000.safetensors …, each with a checksum. The folder appears only when it is
complete. `exists="overwrite"` replaces an earlier cache, but refuses a folder that holds other files.
"""

from saelens_lite.cache.capture import capture
from saelens_lite.cache.difference import with_differences
from saelens_lite.cache.live import ActivationStream
from saelens_lite.cache.reopen import open_source
from saelens_lite.cache.source import Batch, Source, Statistics, TensorSource
from saelens_lite.cache.stored import ActivationCache

__all__ = [
    "ActivationCache",
    "ActivationStream",
    "Batch",
    "Source",
    "Statistics",
    "TensorSource",
    "capture",
    "open_source",
    "with_differences",
]
