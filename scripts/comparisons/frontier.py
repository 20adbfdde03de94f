"""Compare all sparsity rules: L0 against FVU and ce_loss_score, trained on the same activations in one pass.

    python scripts/comparisons/frontier.py --out frontier                     # the embedded model
    python scripts/comparisons/frontier.py --out frontier --model gpt2 --hook blocks.8.hook_resid_pre \\
        --text train.jsonl --eval-text held-out.jsonl

Activations are captured once into OUT/cache, or taken from --cache. Each rule is trained at three levels of sparsity, all in
one sweep; the held-out text is read once for all. Writes OUT/frontier.json, frontier.md and frontier.png.
"""

import argparse
import json
from pathlib import Path

import saelens_lite as sl
from saelens_lite.evaluation import EvalReport
from saelens_lite.registry import names
from saelens_lite.tokens import is_held_out, named_text

PENALTIES = {"l1": (0.03, 0.06, 0.12), "gated": (0.045, 0.09, 0.18), "p_anneal": (0.015, 0.03, 0.06)}  # λ / sqrt(d_in)


def levels(rule: str, ks: list[int], d_in: int) -> list[dict]:
    """Return options of a rule at several levels of sparsity, whatever the rule calls them."""
    if rule in PENALTIES:
        return [{"coefficient": round(c * d_in**0.5, 3)} for c in PENALTIES[rule]]
    if rule == "matching_pursuit":  # reaches the same FVU with half the latents, and its steps cost the more of them
        return [{"k": k // 2} for k in ks]
    return [{"penalty": "target_l0", "target_l0": k} if rule == "jumprelu" else {"k": k} for k in ks]


def texts(train: str, held_out: str | None) -> tuple[object, object]:
    """Return text to train on and to evaluate on: the parts of the embedded corpus, or files or datasets."""
    if train == "python-docs":
        pages = list(sl.python_docs())
        return [p.text for p in pages if not is_held_out(p.name)], [p.text for p in pages if is_held_out(p.name)]
    if held_out is None:
        raise SystemExit("--text needs --eval-text beside it: numbers on the training text are too good")
    return named_text(train), named_text(held_out)


def plot(rows: list[dict], file: Path) -> None:
    """Plot FVU and ce_loss_score over L0 in two panels, with one line per rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for rule in dict.fromkeys(row["rule"] for row in rows):
        points = sorted((row["l0"], row["fvu"], row["ce_loss_score"]) for row in rows if row["rule"] == rule)
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot([p[0] for p in points], [p[column] for p in points], "o-", label=rule, markersize=4)
    for axis, title in zip(axes, ("fvu", "ce_loss_score"), strict=True):
        axis.set(xlabel="L0", ylabel=title)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[1].legend(fontsize="small")
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--hook", default="blocks.2.hook_resid_pre")
    parser.add_argument("--text", default="python-docs", help="python-docs, a text file, or hf:org/name")
    parser.add_argument("--eval-text", help="a text file, or hf:org/name, with other text")
    parser.add_argument("--cache", type=Path, help="activations captured before")
    parser.add_argument("--n-ctx", type=int, default=128)
    parser.add_argument("--n-tokens", type=int, default=2_000_000, help="activations each dictionary is trained on")
    parser.add_argument("--capture-tokens", type=int, help="activations captured; default: n-tokens")
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rules", nargs="+", default=None, help="default: all that are installed")
    parser.add_argument("--ks", type=int, nargs="+", default=[16, 32, 64])
    args = parser.parse_args()
    lm = sl.load_model(args.model)
    train_text, eval_text = texts(args.text, args.eval_text)
    cache = (
        sl.ActivationCache.open(args.cache)
        if args.cache
        else sl.capture(
            lm, train_text, args.hook, args.out / "cache", n_tokens=args.capture_tokens or args.n_tokens, n_ctx=args.n_ctx
        )
    )
    configs = [
        sl.TrainConfig(hook=args.hook, sparsity=rule, options=options, d_sae=args.d_sae, n_tokens=args.n_tokens, lr=args.lr)
        for rule in args.rules or names("sparsity")
        for options in levels(rule, args.ks, cache.d_in(args.hook))
    ]
    runs = sl.train(cache, configs, args.out / "runs", exists="overwrite")
    reports = sl.evaluate([run.dictionary for run in runs], lm, eval_text, n_tokens=args.eval_tokens)
    rows = [row(run.config, report) for run, report in zip(runs, reports, strict=True)]
    (args.out / "frontier.json").write_text(json.dumps(rows, indent=1))
    lines = ["| rule | options | l0 | fvu | ce_loss_score | frac_alive |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r['rule']} | {r['options']} | {r['l0']:.1f} | {r['fvu']:.4f} | {r['ce_loss_score']:.4f} | {r['alive']:.1%} |"
        for r in rows
    ]
    (args.out / "frontier.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(rows, args.out / "frontier.png")


def row(config: sl.TrainConfig, report: EvalReport) -> dict:
    """Return one point of the frontier."""
    found = {name: report[name] for name in ("l0", "fvu", "ce_loss_score")}
    return {"rule": config.sparsity, "options": config.options, **found, "alive": report.frac_alive}


if __name__ == "__main__":
    main()
