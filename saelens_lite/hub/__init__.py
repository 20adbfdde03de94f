"""Use somebody else's dictionary: load it by its release name, with its model, its labels and a check of its hook.

```py
d = sl.load("gpt2-small-res-jb/blocks.8.hook_resid_pre")  # release/id; SAELens's names work unchanged
print(d, d.source, d.origin)  # its rule and hooks; where it comes from, with the commit; its model and the settings it wants
lm = sl.model_for(d)  # the model that it was trained on, with the weights processed as in training
print(sl.check_hook(d, lm, "python-docs:held-out"))  # FVU and L0 at its hook, beside those of neighbours
report = sl.evaluate(d, lm, "python-docs:held-out")  # a short form of the check comes first
labels = sl.labels.from_neuronpedia(d)  # labels[123], labels[123].author, labels.search("license")
```

```sh
saelens-lite inspect gpt2-small-res-jb/blocks.8.hook_resid_pre      # its model, hooks, rule and license
saelens-lite label store --neuronpedia gpt2-small/8-res-jb      # labels for a feature store; your own stay
```

`sl.find(model="gpt2", hook="resid")`, or `saelens-lite find gpt2 --hook resid`, searches an index that comes with the package,
so it needs no network; `online=True` also asks the Hub. A dictionary that is not in the index loads by its address,
hf://user/repo/folder@revision, or from a local folder or file. If one folder of a repository has many dictionaries, the address
hf://user/repo/layer_3.safetensors fetches that file and its settings.

**Fifteen families.** Each name below loads as it stands. `sl.find` lists the other layers, widths and sparsities.

| `sl.load(…)` | reads → writes, and what to mind |
| --- | --- |
| `gpt2-small-res-jb/blocks.8.hook_resid_pre` | residual stream; centred weights (1) |
| `gpt2-small-resid-post-v5-32k/blocks.8.hook_resid_post` | OpenAI's; normalises each token (2) |
| `gpt2-small-hook-z-kk/blocks.5.hook_z` | `attn.hook_z`, all heads (3); pickle (7) |
| `gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical` | residual stream; BOS (4) |
| `gemma-scope-2b-pt-mlp-canonical/layer_12/width_16k/canonical` | MLP output after its norm (5); BOS (4) |
| `gemma-scope-2b-pt-transcoders/layer_13/width_16k/average_l0_8` | MLP input → output after its norm (5) |
| `gemma-scope-2-1b-pt-res/layer_7_width_262k_l0_big` | residual stream of Gemma 3; BOS (4) |
| `llama_scope_lxr_8x/l15r_8x` | residual stream; threshold in scaled units (6) |
| `sae-llama-3-8b-32x/layers.15` | EleutherAI's TopK on the residual stream |
| `skip-transcoder-Llama-3.2-1B-131k/layers.8.mlp` | MLP input → MLP output, with a linear skip |
| `llama-3.1-8b-instruct-andyrdt/resid_post_layer_15_trainer_1` | residual stream; BatchTopK; pickle (7) |
| `saebench_gemma-2-2b_width-2pow16_date-0107/blocks.12.hook_resid_post__trainer_3` | SAEBench; pickle (7) |
| `goodfire-llama-3.1-8b-instruct/layer_19` | residual stream; pickle (7) |
| `qwen-scope-3-1.7b-base-w32k-l50/layer14` | residual stream; TopK; pickle (7) |
| `mntss-transcoder-Llama-3.2-1B/layer_8` | circuit-tracer: MLP input → MLP output |

1. Trained on a model whose writing weights are centred. `sl.model_for` centres them. On the plain model, x has another mean.
2. The file says so, and the dictionary does it: give it plain activations.
3. Heads side by side: the width is n_heads · d_head. `blocks.5.attn.hook_z.head_3` is one head, for dictionaries of one.
4. Trained on rows that begin with BOS. At BOS itself the residual stream is far larger, so leave that token out of averages.
5. Gemma 2 and 3 have a norm after the MLP and after attention. `hook_mlp_out` is the value after it, and `mlp.hook_out` the raw
   output of the module. The wrong one gives an FVU far above 1 without an error; `sl.check_hook` tells.
6. Activations are scaled to a mean norm of √d_in, and the file's threshold is in these units. The reader converts it.
7. A pickle is read with torch's `weights_only`, which runs no code, and only if the index or `format=` names its format.

Models such as Llama and Gemma are gated: ask for access on their page, then log in with `hf auth login`.

**Your own tensors.** No format is needed:

```py
d = sl.Dictionary.from_tensors(W_enc=…, W_dec=…, b_enc=…, b_dec=…, rule="topk", options={"k": 32}, hook=…)
d = sl.Dictionary.from_module(module, x)  # checks the dictionary against the module's own output on x
d = sl.load("weights.pt", format="state_dict", rule="topk", options={"k": 32})  # also .safetensors and .npz
```

Matrices may be transposed: their shapes decide. Where they do not, as in a square matrix, `axes=` is needed. If your encoder
does not subtract b_dec from its input, say `subtract_b_dec=False`.

**Labels.** `sl.labels.from_neuronpedia(d)` reads the public explanation files of the dictionary's Neuronpedia id. They were
written by a language model, whose name is `labels[123].author`; different layers of a release may have different authors. Give
`source=` for a file, a folder, a URL or another id. `labels.save("labels.json")` keeps them for `sl.labels.load`.
`store.label_all(labels)` adds them to a feature store, whose page then names source and author. Your own labels stay.
"""

from saelens_lite.hub.card import write_card
from saelens_lite.hub.describe import describe
from saelens_lite.hub.download import Fetched, copy_to, fetch, pull
from saelens_lite.hub.upload import Push, PushFile, model_card, push
from saelens_lite.hub_client.client import Address

__all__ = [
    "Address",
    "Fetched",
    "Push",
    "PushFile",
    "copy_to",
    "describe",
    "fetch",
    "model_card",
    "pull",
    "push",
    "write_card",
]
