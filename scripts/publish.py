"""Publish dictionaries: evaluate them, write their cards, push them to the Hugging Face Hub in one commit.

    python scripts/publish.py user/repo runs/                               # the dictionaries of a run
    python scripts/publish.py user/repo runs/topk --text held-out.jsonl --license mit
    python scripts/publish.py user/repo --train                             # a small one, of the embedded model
    python scripts/publish.py user/repo runs/ --dry-run                     # everything except the push

Log in first: run `hf auth login`, or set HF_TOKEN.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import saelens_lite as sl
from saelens_lite.hub import write_card
from saelens_lite.model import model_for
from saelens_lite.tokens import named_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", help="user/name; created if it is missing")
    parser.add_argument("folder", type=Path, nargs="?", help="dictionary folder, or the folder of a run with several")
    parser.add_argument("--train", action="store_true", help="train a top-k dictionary of the embedded model first")
    parser.add_argument("--text", default="python-docs:held-out", help="what to evaluate on, as for `saelens-lite eval`")
    parser.add_argument("--n-tokens", type=int, default=100_000, help="tokens to evaluate on")
    parser.add_argument("--model", help="default: the one the dictionary was trained on")
    parser.add_argument("--license", help="licence of the repository, e.g. mit")
    parser.add_argument("--tags", nargs="*", default=[], help="further tags")
    parser.add_argument("--private", action="store_true", help="let nobody else see a new repository")
    parser.add_argument("--dry-run", action="store_true", help="send nothing, show what would be sent")
    arguments = parser.parse_args()
    if arguments.train == bool(arguments.folder):
        parser.error("give the folder of a run, or --train")
    with tempfile.TemporaryDirectory() as scratch:
        folder = train(Path(scratch)) if arguments.train else arguments.folder
        for path in dictionary_folders(folder):
            describe(path, arguments)
        pushed = sl.push(
            folder,
            arguments.repo,
            private=arguments.private,
            license=arguments.license,
            tags=arguments.tags,
            dry_run=arguments.dry_run,
        )
    print(pushed)
    return 0


def train(out: Path) -> Path:
    """Return the run folder of a small dictionary of the embedded model."""
    lm = sl.load_model("tiny")
    cache = sl.capture(
        lm, named_text("python-docs:train"), "blocks.2.hook_resid_pre", out / "cache", text_name="python-docs:train"
    )
    config = sl.TrainConfig(sparsity="topk", options={"k": 32}, d_sae=1536, n_tokens=600_000, lr=1e-3)
    sl.train(cache, config, out / "run")
    return out / "run"


def dictionary_folders(folder: Path) -> list[Path]:
    """Return the dictionaries in a folder, where `push` looks for them."""
    return sorted({path.parent for pattern in ("", "*/", "*/dictionary/") for path in folder.glob(f"{pattern}cfg.json")})


def describe(path: Path, arguments: argparse.Namespace) -> None:
    """Evaluate a dictionary and write its card."""
    d = sl.load(path)
    lm = model_for(d, name=arguments.model)
    report = sl.evaluate(d, lm, named_text(arguments.text), n_tokens=arguments.n_tokens)
    print(f"{path}\n{report}\n")
    write_card(path, d, report, text=arguments.text, license=arguments.license, tags=arguments.tags)


if __name__ == "__main__":
    sys.exit(main())
