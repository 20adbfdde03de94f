"""Compare `sl.evaluate` with SAELens's `run_evals` and SAEBench's core, on the same dictionaries, model and tokens.

    python scripts/comparisons/compare_metrics.py runs/topk/dictionary --peer-python /path/to/venv-with-sae-bench/bin/python

The peer environment needs this package with the extra `saebench`. Rows are held-out pages of Python's documentation, packed;
all sides leave out special tokens. Prints a table for each dictionary. The exit code is 1 when a metric differs by more than
1e-4 of its size (or of 1, if its size is below 1). Where a judge uses another formula for a known reason (*), its value is
compared with what that formula gives here.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from shared import run_peer

import saelens_lite as sl
from saelens_lite.model import model_for
from saelens_lite.tokens import TokenRows, is_held_out, token_rows

TOLERANCE = 1e-4
THEIR_NAME = {
    "ce_clean": "ce_loss_without_sae",
    "ce_sae": "ce_loss_with_sae",
    "ce_zero": "ce_loss_with_ablation",
    "kl_sae": "kl_div_with_sae",
    "kl_zero": "kl_div_with_ablation",
}
OF_EACH_BATCH = "the judges take the mean activation of each batch for the mean of the text; with one batch it is the same"
REASONS = {
    ("SAEBench", "explained_variance"): "from E‖x‖² SAEBench takes the squared mean of all x², where ‖E x‖² belongs",
    ("SAEBench", "mse"): "SAEBench divides the mean error of a token by the number of tokens in its batch",
    ("SAELens", "explained_variance_legacy"): OF_EACH_BATCH,
    ("SAEBench", "explained_variance_legacy"): OF_EACH_BATCH,
}


def packed_rows(lm: sl.LanguageModel, n_rows: int) -> TokenRows:
    """Return rows of held-out text, one document after another with a special token between; everything but those counts."""
    pages = [page.text for page in sl.python_docs() if is_held_out(page.name)]
    tokens = token_rows(lm, pages, text_config=sl.TextConfig(pack=True)).tokens[:n_rows]
    special = {lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id} - {None}
    return TokenRows(tokens, ~torch.isin(tokens, torch.tensor(sorted(special))))


def ours(d: sl.Dictionary, lm: sl.LanguageModel, rows: TokenRows, batch_rows: int) -> dict[str, float]:
    """Return our metrics."""
    report = sl.evaluate(d, lm, rows, n_tokens=None, batch_tokens=batch_rows * rows.tokens.shape[1])
    values = {name: metric.value for name, metric in report.metrics.items()}
    return values | {"frac_alive": report.frac_alive, "frac_dense": report.frac_dense}


def theirs(folder: Path, dictionary: Path, batch_rows: int, peer_python: str) -> dict[str, dict[str, float]]:
    """Return the judges' metrics, under our names."""
    script = Path(__file__).with_name("judge_metrics.py")
    printed = run_peer(peer_python, script, folder, dictionary, "--batch-rows", batch_rows, doing="evaluating the dictionary")
    found = json.loads(printed.splitlines()[-1])
    our_name = {theirs: ours for ours, theirs in THEIR_NAME.items()}
    return {judge: {our_name.get(name, name): value for name, value in values.items()} for judge, values in found.items()}


@torch.no_grad()
def by_their_formulas(d: sl.Dictionary, lm: sl.LanguageModel, rows: TokenRows, batch_rows: int) -> dict[tuple[str, str], float]:
    """Return the values of the formulas in REASONS, computed over the same batches."""
    errors, variances, squares, mse = [], [], [], []
    for start in range(0, len(rows.tokens), batch_rows):
        batch = rows[start : start + batch_rows]
        x = lm.run(batch, d.hook)[d.hook][batch.keep].double()
        errors.append((x - d(x.float()).double()).square().sum(1))
        variances.append((x - x.mean(0)).square().sum(1))
        squares.append(x.square().mean(0))
        mse.append(errors[-1] / len(x))
    legacy = float((1 - torch.cat(errors) / torch.cat(variances)).mean())
    each_square = torch.stack(squares)  # [batch d]
    variance = each_square.sum(1).mean() - each_square.mean() ** 2
    return {
        ("SAEBench", "explained_variance"): float(1 - torch.stack([error.mean() for error in errors]).mean() / variance),
        ("SAEBench", "mse"): float(torch.cat(mse).mean()),
        ("SAELens", "explained_variance_legacy"): legacy,
        ("SAEBench", "explained_variance_legacy"): legacy,
    }


def near(value: float, expected: float) -> bool:
    """Return whether two numbers agree; NaN agrees with nothing."""
    return abs(value - expected) <= TOLERANCE * max(1, abs(expected))


def compare(
    title: str, own: dict[str, float], judges: dict[str, dict[str, float]], formulas: dict[tuple[str, str], float]
) -> bool:
    """Print the table of one dictionary; whether all agree, where there is a reason with the judge's formula computed here."""
    print(f"\n{title}\n{'metric':28}{'ours':>14}" + "".join(f"{judge:>24}" for judge in judges))
    agree, notes = True, {}
    for name in [name for name in own if any(name in values for values in judges.values())]:
        cells = []
        for judge, values in judges.items():
            if name not in values:
                cells.append(f"{'–':>24}")
                continue
            key, mark = (judge.split(",")[0], name), " "
            if not near(values[name], own[name]):
                mark = "*" if key in REASONS and near(values[name], formulas[key]) else "!"
            if mark == "*":
                notes[name] = REASONS[key]
            agree &= mark != "!"
            cells.append(f"{values[name]:>15.6g} ({abs(values[name] - own[name]):.0e}){mark}")
        print(f"{name:28}{own[name]:>14.6g}" + "".join(cells))
    print("\n".join(f"* {name}: {reason}" for name, reason in notes.items()))
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionaries", type=Path, nargs="+", help="dictionary folders, all of one model")
    parser.add_argument("--peer-python", required=True, help="Python of an environment with sae-bench and this package")
    parser.add_argument("--rows", type=int, default=32, help="rows of text")
    parser.add_argument("--batch-rows", type=int, default=32, help="rows in a batch, on every side")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dictionaries = [sl.load(folder) for folder in args.dictionaries]
    lm = model_for(dictionaries[0], device="cpu")
    rows = packed_rows(lm, args.rows)
    if len(rows.tokens) % args.batch_rows:
        raise SystemExit(f"{len(rows.tokens)} rows are no whole number of batches of {args.batch_rows}")
    agree = True
    with tempfile.TemporaryDirectory() as where:
        lm.module.save_pretrained(f"{where}/model")
        lm.tokenizer.save_pretrained(f"{where}/model")
        save_file({"tokens": rows.tokens}, f"{where}/tokens.safetensors")
        for folder, d in zip(args.dictionaries, dictionaries, strict=True):
            judges = theirs(Path(where), folder, args.batch_rows, args.peer_python)
            formulas = by_their_formulas(d, lm, rows, args.batch_rows)
            agree &= compare(f"{folder}, {rows.n_kept} tokens", ours(d, lm, rows, args.batch_rows), judges, formulas)
    sys.exit(not agree)


if __name__ == "__main__":
    main()
