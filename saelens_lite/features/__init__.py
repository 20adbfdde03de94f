"""Read features: collect what each latent responds to in one pass over a text, then query it or show it as a page.

```python
store = sl.FeatureStore.build(d, lm, "python-docs:held-out", n_tokens=50_000)
store.dashboard("page.html")  # every latent in one file, which needs no network
contexts = store.top_examples(7)  # where latent 7 fires most
promoted = store.promoted(7)  # the tokens that its direction makes likelier
store.label(7, "a guess")
print(store.search("return"))  # latents with the word in their label, promoted tokens or top contexts
print(store.latent(7))  # everything about one; in a notebook, the last line of a cell shows it
frame = store.latent(7).to_frame()  # its top contexts as a DataFrame, as every result has one
store.save("store")
```

```sh
saelens-lite features runs/topk/dictionary --html features.html --out store
saelens-lite search store "license"
saelens-lite latent store 7 138
saelens-lite label store 7 "licenses"       # written at once; "" removes it, --list shows all
saelens-lite label store --neuronpedia gpt2-small/8-res-jb      # labels of a public dictionary; your own stay
saelens-lite compare runs/topk/dictionary runs/other-seed/dictionary     # which latents another dictionary shares
```

`store.search` ranks latents by the share of their top contexts with the text on the firing token, then near it; those with the
text in their label come first. `store.latent(7)` sums up a latent. `quantile_examples` shows contexts of all strengths,
`partners` the latents that fire together with it, `position_profile` the positions in a row at which it fires, and `score`
how well a judge who reads a label predicts where it fires, beside controls. `sl.labels.from_neuronpedia(d)` reads the labels
of a public dictionary, and `store.label_all(labels)` adds them with their source and author.

labels.json in the folder of a store has the labels, and scores.json their scores (`store.label_scores`), which
`store.write_scores()` writes. A score belongs to one text: if the label changes, its score is no longer shown. The page, the
cards and `saelens-lite label store --list` show scores beside those of their controls, and mark those that are not better. So
does the model card, if `sl.push(d, repo, stores=["store"])` sends the labels. `store.export("neuronpedia", …)` writes them as
Neuronpedia's explanations.

`FeatureStore.build([d1, d2], lm, text, out="stores")` reads the text once for several dictionaries, whatever its length. Codes
go to disk as they are computed, 10 bytes each, with those that fire together on up to about 4 million tokens. Every number is
exact, except that beyond these 4 million, partners are counted on a sample of so many tokens (`store.info.partner_tokens`).
Time grows with the length of the text, and memory does not. Repeat the call to resume an interrupted pass.

Start the same script with `torchrun --nproc-per-node 4` and the processes share the work: each runs the model on a part of the
batches, then reduces a part of the latents. The folder must be on a file system that all of them see. The files are those that
one process writes. An interrupted pass can be resumed with another number of processes.
With `codes=True` (extra `sql`) the store keeps all codes as a Parquet table, for `store.sql("select latent, max(value) from
codes group by latent")`. `control=True` shows each latent beside its behaviour in a model with shuffled weights.

**Several models.** A dictionary whose ports name several models, such as a crosscoder of a base model and its fine-tuned
version or a dictionary of their difference, takes all of them: `FeatureStore.build(d, {"base": lm, "chat": lm2}, text)`. A
latent's pre-activation is the sum of what each model adds to it (`example.parts`) and a bias. `store.top_examples(7,
model="chat")` are the contexts in which chat adds most, `store.promoted(7, "base")` are the tokens that its direction in base
makes likelier by base's own unembedding, and `store.latent(7)` has all of that for each model. The page shows the models side
by side, and of two, the class of each latent. `store.dashboard("page.html", diff=sl.diff(d, models, text))` shows the classes
and numbers of a diff instead of those by norms alone. Norms are in units in which the activations of each model have the same
RMS norm, measured on the first 8,192 tokens of the text.

**Your own data.** Any activations do, such as embeddings of images, proteins or sounds. No model and no text is needed:

```python
import numpy as np

x, names = np.random.default_rng(0).normal(size=(500, 16)).astype("float32"), [f"cell {i}" for i in range(500)]
own = sl.fit(x, d_sae=32, options={"k": 4}, n_tokens=5_000)
cells = sl.FeatureStore.from_activations(own, x, names, groups=["left", "right"] * 250)
name, value, group, row = cells.top_examples(7)[0]  # one_per_group=True: the best row of each group
rates = cells.group_profile(7)  # in which groups latent 7 fires: the share of their rows, and the mean
cells.dashboard("rows.html")  # the same page, with rows by name in place of contexts
```

If names are paths of image files, the page shows thumbnails. They are part of the page, up to 20 MB in all, and nothing is
fetched from a network. Without Pillow, only files up to 32 KB are shown. For a store that was loaded from a folder, say where
the images are: `dashboard(images="photos")`. Groups are sorted by the evidence that the latent fires more often there than
elsewhere, so a large group does not come first by its size. What needs a model or its text, such as promoted tokens, is
refused.

text_rows.py keeps the rows of long texts on disk. collect.py runs the model, and code_log.py keeps the codes there. reduce.py
and cooccurrence.py turn them into numbers (tensors.py). activations.py and rows.py are for rows without a text, and
per_model.py for several models. store.py answers questions from these (summary.py) and from the weights alone (weights.py).
store_files.py reads and writes the files. search.py finds latents by text. compare.py matches the latents of two dictionaries.
"""

from saelens_lite.features.detection import DetectionTask, Scorer, token_baseline, words_of_label
from saelens_lite.features.explaining.scores import Judged, LabelScore, Scores, Skipped
from saelens_lite.features.explaining.scoring import ScoreConfig
from saelens_lite.features.info import StoreInfo, codes_hash, weights_hash
from saelens_lite.features.per_model import ModelTensors
from saelens_lite.features.rows import ExampleRow, GroupRate
from saelens_lite.features.search import Hit, SearchResult
from saelens_lite.features.store import FeatureStore
from saelens_lite.features.summary import About, Example, ExampleGroup, LatentSummary, ModelSummary, Partner, PositionBin
from saelens_lite.features.tensors import FeatureTensors
from saelens_lite.features.weights import LatentWeights, latent_weights

__all__ = [
    "About",
    "DetectionTask",
    "Example",
    "ExampleGroup",
    "ExampleRow",
    "FeatureStore",
    "FeatureTensors",
    "GroupRate",
    "Hit",
    "Judged",
    "LabelScore",
    "LatentSummary",
    "LatentWeights",
    "ModelSummary",
    "ModelTensors",
    "Partner",
    "PositionBin",
    "ScoreConfig",
    "Scorer",
    "Scores",
    "SearchResult",
    "Skipped",
    "StoreInfo",
    "codes_hash",
    "latent_weights",
    "token_baseline",
    "weights_hash",
    "words_of_label",
]
