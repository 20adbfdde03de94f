"""Publish: push dictionaries with a card to the Hugging Face Hub, and pull them by folder and revision.

```python
from saelens_lite.hub import write_card

folder = d.save("my-dictionary", exists="overwrite")
write_card("my-dictionary", d, report)  # README.md, the evaluation, two figures
```

```sh
saelens-lite card runs/topk                         # the model card; --out README.md writes it
saelens-lite push runs/topk user/repo --dry-run     # what would be sent, also without a network
saelens-lite push runs/topk user/repo               # send it, in one commit
saelens-lite pull user/repo blocks.2.hook_resid_pre --out pulled
saelens-lite inspect hf://user/repo
```

`sl.push("runs", "user/repo")` sends every dictionary of a run in one commit: either all of them arrive, or the repository stays
as it was. Pushing the same again sends nothing. `sl.pull("user/repo", "blocks.2.hook_resid_pre", revision=…)` and the address
hf://user/repo/folder@revision fetch one dictionary, or take it from the local cache if it was fetched before. SAELens loads
published dictionaries from the same address if it has an architecture for the rule.

A repository with many dictionaries in one folder has addresses of single files: `hf://user/repo/layer_3.safetensors` fetches
that file and its settings. The dictionaries of public releases load by name, and `sl.model_for` loads their model with the
weights processed as in training: `d = sl.load("gpt2-small-res-jb/blocks.8.hook_resid_pre")`, `lm = sl.model_for(d)`.

Log in with `hf auth login`. The token goes to the Hub and nowhere else. The Hub's answers are checked before they are used,
and every request is limited in size and time.
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
