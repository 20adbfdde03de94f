"""The command line: each command calls functions of the library.

```sh
saelens-lite hooks tiny
saelens-lite capture book.txt --model tiny --hook blocks.2.hook_resid_pre --out cache
saelens-lite train cache --sparsity topk --options.k 32 --d-sae 1536 --out runs/topk
saelens-lite plot runs/topk
saelens-lite eval runs/topk
saelens-lite features runs/topk --html features.html --out store
saelens-lite search store "license"
saelens-lite latent store 7
saelens-lite label store 7 "licenses"
saelens-lite explain store --model gpt-4o-mini --top 100
saelens-lite compare runs/topk runs/other-seed
saelens-lite diff runs/crosscoder cache
saelens-lite probe runs/topk --data labelled.csv
saelens-lite steer runs/topk --prompt "The old man" --clamp 7=8.0
saelens-lite doses runs/topk 7 --prompt "The old man" --doses 2 4 8
saelens-lite attribute runs/topk --prompt "The old man said that" --token " he" --against " she"
saelens-lite prompt runs/topk --prompt "The old man said" --by attribution
saelens-lite inspect runs/topk
saelens-lite convert runs/topk out --format sparsify
saelens-lite find gpt2 --hook resid --l0 50
saelens-lite push runs/topk user/repo --dry-run
saelens-lite pull user/repo blocks.2.hook_resid_pre --out pulled
saelens-lite plugins
```

`saelens-lite COMMAND --help` explains each setting of a command, and `saelens-lite plugins RULE` the options of a rule.
`train --config run.toml` reads settings from a file, which has the names of the flags as keys; the config.toml in the folder of
a run is such a file. `--import my_rule.py`, with any command, runs a file that registers plugins. A command that runs a
dictionary's model loads the commit that the dictionary was trained on.

Nothing of yours is deleted: `--exists overwrite` replaces a folder only if it holds an output of the same kind and nothing
else. Only one process at a time can write to a folder.
"""

# their commands register with the app
from saelens_lite.cli import (  # noqa: F401
    demo,
    diffing,
    evaluation,
    explaining,
    features,
    files,
    hub,
    interventions,
    latents,
    models,
    plot,
    plugins,
    scoring,
    training,
)
from saelens_lite.cli.base import main

__all__ = ["main"]
