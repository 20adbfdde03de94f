"""Train dictionaries: one loop for all rules, and for many dictionaries in one pass over the data.

```python
configs = [
    sl.TrainConfig(sparsity="topk", options={"k": 32}, d_sae=4096, n_tokens=300_000),
    sl.TrainConfig(sparsity="gated", options={"target_l0": 32}, d_sae=4096, n_tokens=300_000),
]
runs = sl.train(cache, configs, out="runs", validation_tokens=8192)
d = runs[0].dictionary
```

```sh
saelens-lite train cache --sparsity topk --options.k 32 --d-sae 1536 --out runs/topk
saelens-lite train cache --config run.toml --out runs  # a [[dictionary]] table for each
saelens-lite train --text book.txt --hook blocks.2.hook_resid_pre --out runs/live  # no cache
saelens-lite train --config runs/topk/config.toml --out runs/again  # the settings of an earlier run: the same bytes
```

**Settings files.** All flags of `train` are keys of the file: `cache`, `text`, `model`, `out`, `data_seed`, … at the top, and
the settings of a dictionary at the top too, or in `[[dictionary]]` tables. Flags override the file.

Each dictionary has the same bytes as if it were trained alone. `validation_tokens` is the number of activations that are kept
out of training; the log reports `val_fvu` and `val_l0` on them.

**Sparsity.** Rules with a `k` keep that many latents per token. `l1`, `gated`, `p_anneal` and `jumprelu` take `target_l0`,
by default 32. The first three adjust the coefficient of their penalty while they train (`saelens_lite.training.control`);
`jumprelu` penalises the distance from the target. With `coefficient`, the penalty keeps that weight, and L0 follows from it.
A warning says when L0 misses the target by more than 10 %, or when more than a tenth of the latents fire.

**Learning rate and batch size** follow the width of the activations, the number of latents and the number of tokens. The rules
were fitted to trainings of 30,000 to a million tokens; for 10⁸ tokens they give about the rates of the literature, which is a
prediction. `lr` and `batch_size` override them.

**Activations of your own.** No language model is needed; x is [n d_in]. `fit` takes the fields of `TrainConfig` and the options
of the rule. Batches and steps follow the number of rows.

```python
d = sl.fit(x, sparsity="topk", d_sae=4096, k=32, n_tokens=1_000_000, validation_tokens=500)
print(d.history[-1]["val_fvu"])
```

`sl.SparseCoder(d_sae=4096, k=32)` is the same as an estimator of scikit-learn, for pipelines and grid searches; see
`saelens_lite.estimator`.

**Transcoders and crosscoders.** `TrainConfig(hook="blocks.2.ln2.hook_out", writes=("blocks.2.hook_mlp_out",), skip=True)`
predicts the output of an MLP from its input. `reads=(hook_1, hook_2)` trains one dictionary over several hooks. Every rule
except `matching_pursuit` can predict hooks other than those it reads. Evaluation and `splice` then act at the predicted hooks.

**Two models.** A cache of two models has keys such as base:blocks.2.hook_resid_pre and chat:blocks.2.hook_resid_pre. With
`reads=(base_key, chat_key)`, or without a hook if the cache holds one hook in both, a crosscoder is trained: its latents have a
direction in each model. `hook="chat-base:blocks.2.hook_resid_pre"` trains a dictionary of the difference, which training makes
from the two. A sweep may hold both kinds. Rounding of stored activations can be a large part of a small difference; training
warns of more than 1 %, and `capture(…, dtype="float32")` avoids it.

```sh
saelens-lite train cache --sparsity batch_topk --port base:blocks.2.hook_resid_pre --port chat:blocks.2.hook_resid_pre
saelens-lite train cache --sparsity batch_topk --k 100 --hook chat-base:blocks.2.hook_resid_pre --out runs/difference
```

Prefer `batch_topk` for crosscoders: L1 shrinks the weaker of two directions to nothing, so that shared latents look as if they
were of one model. Each port is scaled to the same RMS norm, and the size of a latent is its code times the sum of its
norms at all ports (see `saelens_lite.sparsity`).

**Resuming.** Ctrl-C and SIGTERM finish the step and save a checkpoint. `sl.resume("runs")` or `saelens-lite train --resume
runs` continues, and the result has the same bytes as without the interruption. Resuming with another text, cache or model
is refused, even if it has the same size.

**Several devices.** `--devices` starts a process for each GPU of a computer, and on a CPU as many as it says. torchrun does so
on several computers that share a file system. `capture`, `train`, `eval` and `features` can be started in both ways, and so can
a script that calls the functions of the library.

```sh
saelens-lite train cache --config run.toml --out runs --devices 4
torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m saelens_lite train cache --out runs
```

`--parallel` or `parallel=` chooses how a training is distributed: "sweep" (each process trains some of the dictionaries, to the
bytes of one process), "latents" (each holds some latents of every dictionary) or "data" (each has some rows of the batch). The
default is a sweep if there are at least as many dictionaries as processes, else latents. Split dictionaries choose the same
latents as those of one process, and differ from them by rounding. Any number of processes can resume a run.

Only the first process prints. If one process fails or is killed, all of them end, and one message says which it was and how to
resume. Ctrl-C saves a checkpoint of all. Versions, settings and data of the processes are compared at the start.

**After training.** `sl.Run.load` reads the folder of a run, finished or not, and `sl.Run.load_all` all runs in a folder. The
folder of a run stands for its dictionary: `sl.load("runs/0-topk")`, `saelens-lite eval runs`.

```python
runs = sl.Run.load_all("runs")
runs[0].to_frame()  # the log as a DataFrame
runs[0].plot("curves.png", beside=runs[1:])  # or .svg; without a file, shown in a notebook and printed in a terminal
```

```sh
saelens-lite plot runs
saelens-lite plot runs/topk runs/live --out curves.svg
```

**Training on.** `sl.resume("runs/0-topk", n_tokens=1_000_000)` or `saelens-lite train --resume runs/0-topk --n-tokens 1000000`
extends a run to a new total. An interrupted run keeps its whole state, and its schedule is stretched to that total. A
finished run keeps no moments of Adam, and its learning rate has fallen to 0: so training continues from its dictionary, with
new moments and a new schedule (warm-up, plateau, decay) over the additional tokens. It reads the data after those it has read.
The result is not that of one longer run; the dictionary's record has `extended_after`.

`sl.train(cache, config, start_from=d)` or `train --start-from runs/0-topk` begins a new run with the parameters of a
dictionary, ours or another tool's. What the config leaves unset (rule, options, hooks) is taken from it. Another rule may be
chosen if the parameters fit; it begins with its own thresholds.

**The model's predictions.** A small squared error can still change what the model predicts. With `kl_share=0.1`, the last tenth
of the tokens also minimises the KL divergence from the model's next-token distributions to those with the reconstruction in
place; the log then has `kl`, in nats. That needs a text and its model, because a cache holds no token rows. `kl_share=1.0`
tunes a finished dictionary, ours or another tool's, and `saelens_lite.training.kl` has the equations.

```python
stream = sl.ActivationStream(lm, "python-docs:train", hook)
(run,) = sl.train(stream, sl.TrainConfig(options={"k": 32}, d_sae=512, n_tokens=20_000, kl_share=0.1))
(tuned,) = sl.train(stream, sl.TrainConfig(n_tokens=5000, kl_share=1.0), start_from=run.dictionary)
```

```sh
saelens-lite train --text book.txt --hook blocks.2.hook_resid_pre --kl-share 0.1 --out runs/kl
saelens-lite train --text book.txt --start-from runs/topk --kl-share 1 --n-tokens 100000 --out runs/tuned
```

**Several objectives.** With codes f, the classic objective min ‖x − x̂‖² + λ‖f‖₀ is `jumprelu` with the penalty `l0`. `l1` is
its relaxation, with ‖f‖₁ in place of ‖f‖₀. `p_anneal` moves from ‖f‖₁ towards ‖f‖₀. The rules with a `k` fix ‖f‖₀.

**Numbers in the log.** `l0` is the mean number of latents that fire on a token, and `fvu` the fraction of variance unexplained.
Losses are those of scaled activations. After training, the scale is folded into the weights, so a dictionary takes raw
activations.

**Loggers.** Choose them with `loggers=("jsonl", "tensorboard")` or `--loggers jsonl,tensorboard`. No number depends on them. A
logger that fails during training is dropped with a warning.

`saelens_lite.training.step` follows one batch through a step, with the equations.
"""

from saelens_lite.training.curves import Curves
from saelens_lite.training.resuming import resume
from saelens_lite.training.run import Run
from saelens_lite.training.start import train
from saelens_lite.training.trainer import Trainer

__all__ = ["Curves", "Run", "Trainer", "resume", "train"]
