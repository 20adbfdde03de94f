"""The command line: each command calls functions of the library.

```sh
saelens-lite capture book.txt --model tiny --hooks blocks.2.hook_resid_pre --out cache
saelens-lite train cache --sparsity topk --options.k 32 --d-sae 1536 --out runs/topk
saelens-lite eval runs/topk/dictionary
saelens-lite features runs/topk/dictionary --html features.html --out store
saelens-lite search store "license"
saelens-lite latent store 7
saelens-lite label store 7 "licenses"
saelens-lite compare runs/topk/dictionary runs/other-seed/dictionary
saelens-lite probe runs/topk/dictionary --data labelled.csv
saelens-lite steer runs/topk/dictionary --prompt "The old man" --clamp 7=8.0
saelens-lite doses runs/topk/dictionary 7 --prompt "The old man" --doses 2 4 8
saelens-lite attribute runs/topk/dictionary --prompt "The old man said that" --token " he" --against " she"
saelens-lite prompt runs/topk/dictionary --prompt "The old man said" --by attribution
saelens-lite inspect runs/topk/dictionary
saelens-lite convert runs/topk/dictionary out --format sparsify
saelens-lite push runs/topk user/repo --dry-run
saelens-lite pull user/repo blocks.2.hook_resid_pre --out pulled
saelens-lite plugins
```

`saelens-lite COMMAND --help` explains each setting of a command, and `train --config run.toml` reads settings from a file. A
command that runs a dictionary's model loads the commit that the dictionary was trained on.

Nothing of yours is deleted: `--exists overwrite` replaces a folder only if it holds an output of the same kind and nothing
else. Only one process at a time can write to a folder.
"""

# their commands register with the app
from saelens_lite.cli import demo, evaluation, features, files, hub, interventions, latents, plugins, training  # noqa: F401
from saelens_lite.cli.base import main

__all__ = ["main"]
