"""Hub ids of models that files call by a short name of transformer-lens or Neuronpedia."""

import os
from functools import cache

UNCHANGED = (
    "tiny",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "distilgpt2",
)  # the embedded model, and Hub ids without an owner
NICKNAMES = {  # beside transformer-lens's own
    "gpt2-small": "gpt2",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-8b-it": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-it": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.1-8b-it": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.3-70b-it": "meta-llama/Llama-3.3-70B-Instruct",
    "deepseek-r1-distill-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}


def hub_id(name: str) -> str:
    """Return the Hub id that a short name stands for, such as gpt2 for gpt2-small. Other names and folders stay unchanged."""
    if "/" in name or name in UNCHANGED or os.path.isdir(os.path.expanduser(name)):
        return name
    return NICKNAMES.get(name.lower()) or _of_transformer_lens().get(name.lower(), name)


@cache
def _of_transformer_lens() -> dict[str, str]:
    from transformer_lens.supported_models import MODEL_ALIASES

    return {alias.lower(): official for official, aliases in MODEL_ALIASES.items() for alias in aliases}
