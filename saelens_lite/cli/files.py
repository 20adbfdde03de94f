"""Commands that read and write the files of dictionaries and caches."""

import json
from pathlib import Path
from typing import Any

from saelens_lite.cli.base import app, console, say
from saelens_lite.cli.options import DictionaryPath, Exists, ReadAs
from saelens_lite.errors import PluginError


@app.command
def inspect(path: Path, *, format: ReadAs = None) -> None:
    """Show the settings and shapes of a dictionary or cache, ours or another tool's, without loading its tensors.

    Parameters
    ----------
    path
        Folder that `train` or `capture` wrote, file or folder of another tool, or dictionary on the Hub
        (hf://user/repo/folder@revision, or the name of a public one). Weights on the Hub are not downloaded.
    """
    from saelens_lite import formats
    from saelens_lite.addresses import dictionary_folder
    from saelens_lite.cache.stored import MANIFEST, ActivationCache
    from saelens_lite.dictionary.folder import CONFIG_FILE, OWN
    from saelens_lite.files import read_json
    from saelens_lite.names import is_on_hub, no_such
    from saelens_lite.paths import check_input

    if is_on_hub(path):
        from saelens_lite.hub import describe

        facts = describe(str(path))
    elif not check_input(path).exists():
        raise no_such(path)
    elif (path / MANIFEST).exists():
        cache = ActivationCache.open(path)
        facts = {"activations": cache.n_tokens, **cache.manifest, "hooks": {h: cache.d_in(h) for h in cache.hooks}}
        facts["shards"] = len(cache.manifest["shards"])
    else:
        path = Path(dictionary_folder(path))
        config = path / CONFIG_FILE
        facts = read_json(config) if format in (None, OWN) and config.exists() else {}
        if not _is_ours(facts):
            facts = formats.inspect(path, format)
        if (path / "eval.json").exists():
            facts["eval"] = read_json(path / "eval.json").get("metrics")
    say(json.dumps(facts, indent=2, ensure_ascii=False))
    _say_if_rule_is_missing(facts)


@app.command
def convert(source: DictionaryPath, out: Path, *, format: str, source_format: ReadAs = None, exists: Exists = "error") -> None:
    """Convert a dictionary, ours or another tool's, to another format.

    Parameters
    ----------
    out
        Folder to write.
    format
        saelens_lite (our own format) or the name of a format plugin: saelens, sparsify, dictionary_learning, circuit_tracer.
    """
    import saelens_lite as sl

    console().print(str(sl.convert(source, out, format, source_format=source_format, exists=exists)), markup=False)


def _is_ours(facts: dict[str, Any]) -> bool:
    """Return whether a cfg.json or manifest is one of ours."""
    metadata = facts.get("metadata")
    return isinstance(metadata, dict) and "saelens_lite" in metadata


def _say_if_rule_is_missing(facts: dict[str, Any]) -> None:
    """Warn on standard error when the dictionary's sparsity rule cannot be loaded."""
    from saelens_lite import registry

    metadata = facts.get("metadata")
    ours = metadata.get("saelens_lite") if isinstance(metadata, dict) else None
    if isinstance(ours, dict) and "sparsity" in ours:
        try:
            registry.find(ours["sparsity"], written_by=ours.get("distribution"), from_file=True)
        except PluginError as error:
            say(f"saelens-lite: this dictionary cannot be loaded here: {error}", error=True)
