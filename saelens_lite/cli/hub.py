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
    out: Path | None = None,
    stores: list[Path] | None = None,
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
        Show the files that would be sent and their sizes, but send nothing. Works without a network, unless --parent-commit
        is given.
    out
        With --dry-run: new folder for the cards and figures, as they would be in the repository.
    stores
        Feature stores of the dictionaries, whose labels and scores are published too.
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
        out=out,
        stores=stores or (),
    )
    facts = vars(pushed) | {"files": [file._asdict() for file in pushed.files]}
    say(json.dumps(facts, indent=2, ensure_ascii=False) if as_json else pushed)
    if dry_run and not as_json:
        say(f"{out}: the cards and figures" if out else "Add --out FOLDER to read the cards before they are sent.")


@app.command
def card(
    path: Path,
    *,
    repo: str = "user/repo",
    license: str | None = None,
    tags: list[str] | None = None,
    out: Path | None = None,
    stores: list[Path] | None = None,
    exists: Exists = "error",
) -> None:
    """Print the model card of a dictionary or a run, or write it to a file.

    Parameters
    ----------
    path
        The folder or address of a dictionary, or the folder of a run.
    repo
        The repository that the card names, user/name.
    license
        Licence, e.g. mit.
    tags
        More tags.
    out
        File to write, e.g. README.md; default: none, the card is printed.
    stores
        Feature stores of the dictionaries, whose labels and scores the card describes.
    """
    from saelens_lite.files import write_text
    from saelens_lite.hub import model_card
    from saelens_lite.outputs import new_file

    if out is not None and (out.parent / "cfg.json").exists():
        raise ConfigError(f"{out} would be in the folder of a dictionary, where `push` writes the card; choose another file")
    text = model_card(path, repo=repo, license=license, tags=tags or (), stores=stores or ())
    if out is None:
        say(text)
        return
    with new_file(out, "model card", exists):
        write_text(out, text)
    console().print(f"{out}: the model card", markup=False)


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
        The repository, user/name, or a public release; or an address, hf://user/name/folder@revision; or the name of a public
        dictionary.
    folder
        The dictionary's folder or file in the repository. May be left out if the repository holds only one dictionary.
    revision
        Branch, tag or commit; default: main.
    out
        Folder for a copy; default: none, the dictionary stays in huggingface_hub's cache. If the index knows more than the
        files of another tool say, the copy has these facts too, in saelens_lite's own format.
    max_bytes
        Largest download to accept, in bytes; default: 32 GiB.
    """
    from saelens_lite.hub import copy_to, fetch
    from saelens_lite.hub.download import named_place
    from saelens_lite.outputs import refuse_existing

    if out:
        refuse_existing(out, exists)
    fetched = fetch(named_place(repo, folder, revision), **given(max_bytes=max_bytes))
    loaded = fetched.load(format=format)
    place = copy_to(fetched, out, exists, loaded) if out else fetched.folder
    console().print(f"{place}: {loaded.rule.plugin_name}, {loaded.d_sae} latents, {fetched.address}", markup=False)


@app.command
def find(
    *text: str,
    model: str | None = None,
    hook: str | None = None,
    width: str | None = None,
    l0: str | None = None,
    release: str | None = None,
    online: Flag = False,
    as_json: PrintJson = False,
) -> None:
    """Find public dictionaries that meet all conditions. `inspect` and all other commands take the names that it lists.

    A dictionary of which the index does not know a fact does not meet a condition on it.

    Parameters
    ----------
    text
        Words; each must occur in the name of the dictionary or of its model.
    model
        Part of the model's name.
    hook
        Part of the hook that is read or written, e.g. resid.
    width
        Number of latents: 24576, 16k, or the smallest and the largest, 16k-65k.
    l0
        Active latents per token, as published: 50 stands for 25 to 100, the nearest first; or the smallest and the largest,
        40-60.
    release
        Part of the release's name; a complete name stands for this release only.
    online
        Also ask the Hub for repositories tagged saelens, saelens_lite or sparsify.
    """
    from saelens_lite.find_releases import find as find_releases

    matches = find_releases(
        " ".join(text),
        **{"model": model, "hook": hook, "release": release, "online": online},
        width=width,
        l0=l0,
    )
    if as_json:
        facts = [{"name": one.name} | one._asdict() for one in matches]
        say(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        console().print(matches)
