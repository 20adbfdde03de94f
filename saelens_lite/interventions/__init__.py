"""Steer and attribute: change latents and see what the model does, or find the latents behind what it does.

```python
with lm.splice(d):  # the model reads the reconstruction
    print(lm.generate("The old man looked at", 20))
with lm.splice(d, [sl.Clamp(7, 8.0), sl.Ablate(3, positions=2)]):  # its own stream, with two codes edited; also Scale, Add
    print(lm.generate("The old man looked at", 20))
response = sl.dose_response(d, lm, 7, [2.0, 4.0], ["The old man"])
found = sl.attribute(d, lm, "The old man said that", (" he", " she"))  # the effect of each active latent on a logit difference
print(found.agreement)
frame = found.to_frame()  # every entry, as a DataFrame
```

```sh
saelens-lite steer runs/topk/dictionary --prompt "The old man" --clamp 7=8.0
saelens-lite doses runs/topk/dictionary 7 --prompt "The old man" --doses 2 4 8
saelens-lite attribute runs/topk/dictionary --prompt "The old man said that" --token " he" --against " she"
saelens-lite steer runs/topk/dictionary --store store --prompt "The old man" --clamp 7=2max    # twice its largest activation
```

An edit adds Σ (new code − old code) · direction to the activation. The part that the dictionary does not reconstruct stays, so
an edit that changes no code changes nothing.

With a feature store (`store=`, --store), results show the label, the promoted token and the largest activation of each latent.
`store.strength(7, 2)` is twice the largest activation, for edits and doses of natural size.

`dose_response` shows the effect of doses of a latent, and the cost in KL, beside random live latents that push with the same
norm. `attribute` gives the effect of each active latent by exact ablation, by gradient and by direct effect on the logits, and
how well the three agree. For latents that fire on many tokens, the gradient is a poor guide.

A dictionary of several ports acts at all of them; `ports=` (--port) chooses some, by hook or, with several models, by key,
such as "chat:blocks.3.hook_resid_pre". With several models, given as {"base": lm, "chat": lm2}, codes come from all of them,
and effects are measured in one: `in_model="chat"` (--in-model). The effect of a latent at one port, and at all ports of a
model, are two calls of `attribute`. `Add` needs no codes, so the model that is steered may be given alone, with its ports.

```sh
saelens-lite steer runs/crosscoder --model base=gpt2 --model chat=me/chat --in-model chat --prompt "The old man" --ablate 7
saelens-lite steer runs/crosscoder --model chat=me/chat --port chat:blocks.3.hook_resid_pre --prompt "The old man" --add 7=4
```

edits.py has the edits, doses.py the dose–response curves, attribution.py the attributions, and steering.py generates text with
and without edits.
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
