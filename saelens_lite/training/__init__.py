"""Train dictionaries: one loop for all rules, and for many dictionaries in one pass over the data.

```python
configs = [
    sl.TrainConfig(sparsity="topk", options={"k": 32}, d_sae=4096, n_tokens=300_000, lr=1e-3),
    sl.TrainConfig(sparsity="gated", options={"coefficient": 2.0}, d_sae=4096, n_tokens=300_000, lr=2e-3),
]
runs = sl.train(cache, configs, out="runs", validation_tokens=8192)
d = runs[0].dictionary
```

```sh
saelens-lite train cache --sparsity topk --options.k 32 --d-sae 1536 --out runs/topk
saelens-lite train cache --config run.toml --out runs  # a [[dictionary]] table for each
saelens-lite train --text book.txt --hook blocks.2.hook_resid_pre --out runs/live  # no cache
```

Each dictionary has the same bytes as if it were trained alone. `validation_tokens` is the number of activations that are kept
out of training; the log reports `val_fvu` and `val_l0` on them.

**Activations of your own.** No language model is needed; x is [n d_in].

```python
d = sl.fit(x, sparsity="topk", d_sae=4096, options={"k": 32}, n_tokens=1_000_000, batch_size=2048)
```

**Transcoders and crosscoders.** `TrainConfig(hook="blocks.2.ln2.hook_out", writes=("blocks.2.hook_mlp_out",), skip=True)`
predicts the output of an MLP from its input. `reads=(hook_1, hook_2)` trains one dictionary over several hooks. Every rule
except `matching_pursuit` can predict hooks other than those it reads. Evaluation and `splice` then act at the predicted hooks.

**Resuming.** Ctrl-C and SIGTERM finish the step and save a checkpoint. `sl.resume("runs")` or `saelens-lite train --resume
runs` continues, and the result has the same bytes as without the interruption. Resuming with another text, cache or model
is refused, even if it has the same size.

**Several objectives.** With codes f, the classic objective min ‖x − x̂‖² + λ‖f‖₀ is `jumprelu` with the penalty `l0`. `l1` is
its relaxation, with ‖f‖₁ in place of ‖f‖₀. `p_anneal` moves from ‖f‖₁ towards ‖f‖₀. The rules with a `k` fix ‖f‖₀.

**Numbers in the log.** `l0` is the mean number of latents that fire on a token, and `fvu` the fraction of variance unexplained.
Losses are those of scaled activations. After training, the scale is folded into the weights, so a dictionary takes raw
activations.

**Loggers.** Choose them with `loggers=("jsonl", "tensorboard")` or `--loggers jsonl,tensorboard`. No number depends on them. A
logger that fails during training is dropped with a warning.

`saelens_lite.training.step` follows one batch through a step, with the equations.
"""

from saelens_lite.training.resuming import resume
from saelens_lite.training.run import Run
from saelens_lite.training.start import train
from saelens_lite.training.trainer import Trainer

__all__ = ["Run", "Trainer", "resume", "train"]
