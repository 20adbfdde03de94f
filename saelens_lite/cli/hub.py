"""Commands for the Hugging Face Hub."""

import json
from pathlib import Path

from saelens_lite.cli.base import app, console, say
from saelens_lite.cli.options import Exists, Flag, PrintJson, ReadAs, given
from saelens_lite.errors import ConfigError


@app.command
def push(
    path: Path,
    repo: str,
    *,
    folder: str | None = None,
    revision: str | None = None,
    private: Flag = False,
    license: str | None = None,
    tags: list[str] | None = None,
    message: str | None = None,
    parent_commit: str | None = None,
    dry_run: Flag = False,
    as_json: PrintJson = False,
) -> None:
    """Publish dictionaries on the Hugging Face Hub, in one commit. Log in first: `hf auth login`, or set HF_TOKEN.

    Parameters
    ----------
    path
        The folder of a dictionary, or of a run with one or several.
    repo
        The repository, user/name. It is created if it does not exist.
    folder
        Name of the dictionary's folder in the repository; default: its hook.
    revision
        Branch to push to; default: main.
    private
        Make the repository private, if this push creates it.
    license
        Licence of the repository, e.g. mit.
    tags
        More tags for the model card.
    message
        Commit message.
    parent_commit
        Push only if this is the latest commit on the branch.
    dry_run
        Show the files that would be sent, but send nothing.
    """
    import saelens_lite as sl

    pushed = sl.push(
        {folder: path} if folder else path,
        repo,
        revision=revision,
        private=private,
        license=license,
        tags=tags or (),
        message=message,
        parent_commit=parent_commit,
        dry_run=dry_run,
    )
    facts = vars(pushed) | {"files": [file._asdict() for file in pushed.files]}
    say(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else pushed)


@app.command
def pull(
    repo: str,
    folder: str | None = None,
    *,
    revision: str | None = None,
    out: Path | None = None,
    max_bytes: int | None = None,
    format: ReadAs = None,
    exists: Exists = "error",
) -> None:
    """Fetch a dictionary from the Hugging Face Hub.

    Parameters
    ----------
    repo
        The repository, user/name; or an address, hf://user/name/folder@revision.
    folder
        The dictionary's folder in the repository. May be left out if the repository holds only one dictionary.
    revision
        Branch, tag or commit; default: main.
    out
        Folder for a copy; default: none, the dictionary stays in huggingface_hub's cache.
    max_bytes
        Largest download to accept, in bytes; default: 32 GiB.
    """
    import saelens_lite as sl
    from saelens_lite.hub import Address, copy_to, fetch
    from saelens_lite.outputs import refuse_existing

    if out:
        refuse_existing(out, exists)
    if repo.startswith("hf://") and (folder or revision):
        raise ConfigError(f"{repo} is a complete address; leave out the folder and --revision")
    address = Address.parse(repo) if repo.startswith("hf://") else Address.of(repo, folder, revision)
    fetched = fetch(address, **given(max_bytes=max_bytes))
    loaded = sl.load(fetched.folder, format=format)
    place = copy_to(fetched, out, exists) if out else fetched.folder
    console().print(f"{place}: {loaded.rule.plugin_name}, {loaded.d_sae} latents, {fetched.address}", markup=False)
