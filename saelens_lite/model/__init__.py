"""Hook a model: read and write the activations of a frozen language model by transformer-lens hook names.

```python
lm = sl.load_model("tiny")  # the embedded GPT-2; or "gpt2", any Hub id, a local folder
hook = "blocks.2.hook_resid_pre"  # lm.hook_names lists the usual ones
acts = lm.run(["some text"], hooks=[hook])  # {hook: [batch pos d_model]}; stops right after the deepest hook
probability = lm.logits("The old man looked at")[0, -1].softmax(-1)  # [d_vocab], of the next token
print(lm.generate("The old man looked at", 30))
```

Activations are those of the Hugging Face model, without LayerNorm folding. `center_writing_weights=True` subtracts the mean
from everything that is written to the residual stream. Caches and dictionaries record this setting and refuse a model that
was loaded with a different one. `run`, `capture` and `evaluate` put BOS at position 0 if the tokenizer has one.

One attention head is a hook too: `blocks.2.attn.hook_z.head_3` is that head's part of `blocks.2.attn.hook_z`.

On CUDA, a model keeps the number type of its checkpoint, and a float32 checkpoint has TF32 products in its forward passes.
`load_model(…, dtype="float32")` avoids both. Elsewhere models are float32. Caches and dictionaries record a type other than
float32, and evaluations on a model of another type log a warning.

For models larger than a device, `load_model(…, device_map="auto")` fills the GPUs, then memory, and leaves the rest of the
weights on the disk (`pip install 'saelens-lite[large]'`). Under torchrun, `device_map="tp"` cuts each weight into a part for
each process; all of them then make the same calls. Both keep the number type of the checkpoint. Activations at hooks are
whole, and on the device that token ids go to.

`splice` replaces an activation by a dictionary's reconstruction, or edits some of its codes; see `saelens_lite.interventions`.

Caches and dictionaries record the commit of a model from the Hub, and later commands load that commit. Python code that comes
with a model runs only with `load_model(…, trust_remote_code=True)` or, in a command, `--model NAME --trust-remote-code`.
"""

from saelens_lite.model.in_turn import Loadable, ModelsInTurn
from saelens_lite.model.language_model import LanguageModel
from saelens_lite.model.loading import EMBEDDED, load_model, mention_folder, model_for
from saelens_lite.model.models import AnyModel, Models, as_model, facts_of

__all__ = [
    "EMBEDDED",
    "AnyModel",
    "LanguageModel",
    "Loadable",
    "Models",
    "ModelsInTurn",
    "as_model",
    "facts_of",
    "load_model",
    "mention_folder",
    "model_for",
]
