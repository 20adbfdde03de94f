"""Compare dictionaries trained on the squared error alone with those whose last share of the same tokens also minimises KL.

    python scripts/comparisons/kl_finetune.py --out kl_finetune                       # the embedded model
    python scripts/comparisons/kl_finetune.py --out kl_finetune --rules topk --tokens 2000000 --share 0.1
    python scripts/comparisons/kl_finetune.py --out kl_finetune --model gpt2 --hook blocks.8.hook_resid_pre \\
        --text train.jsonl --eval-text held-out.jsonl

Four dictionaries of each rule: "plain"; "KL", of the same number of tokens and the same L0; "tuned", which starts from the
plain one and trains with KL on SHARE more tokens; and "longer", which trains on as many more without KL, at the same learning
rate. All are measured on the same held-out rows. The gap is CE with the reconstruction in place less CE of the model; "closed"
is the share of the plain gap that is gone, with a 95 % interval from 2,000 paired resamples of the rows. Writes
OUT/kl_finetune.json and kl_finetune.md.
"""

import argparse
import json
from pathlib import Path

import torch

import saelens_lite as sl
from saelens_lite.tokens import named_text, token_rows
from saelens_lite.training import Trainer

OPTIONS = {"jumprelu": "target_l0", "gated": "target_l0", "l1": "target_l0", "p_anneal": "target_l0"}
COLUMNS = ("l0", "fvu", "ce_sae", "kl_sae", "ce_loss_score")


def losses_by_row(lm, rows, dictionary=None) -> torch.Tensor:
    """Return the summed cross-entropy (nats) of each row's predictions from the positions that count."""
    sums = []
    for some in (rows[i : i + 16] for i in range(0, len(rows.tokens), 16)):
        if dictionary is None:
            logits = lm.logits(some)
        else:
            with lm.splice(dictionary, keep=some.keep):
                logits = lm.logits(some)
        n = some.tokens.shape[1]
        counts = some.keep[:, :-1] & (torch.arange(1, n) < some.lengths[:, None])
        log_p = logits[:, :-1].float().log_softmax(-1).gather(-1, some.tokens[:, 1:, None].to(logits.device)).squeeze(-1).cpu()
        sums.append(-(log_p * counts).sum(1).double())
    return torch.cat(sums)


def closed(clean: torch.Tensor, plain: torch.Tensor, other: torch.Tensor) -> tuple[float, float, float]:
    """Return the share of the plain gap that is closed, and the ends of its 95 % interval."""
    n = len(clean)
    draws = torch.randint(n, (2000, n), generator=torch.Generator().manual_seed(0))
    gap, gain = plain - clean, plain - other
    replicates = gain[draws].sum(1) / gap[draws].sum(1)
    low, high = replicates.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return (gain.sum() / gap.sum()).item(), low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables and the dictionaries")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--hook", default="blocks.2.hook_resid_pre")
    parser.add_argument("--text", default="python-docs:train")
    parser.add_argument("--eval-text", default="python-docs:held-out")
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    parser.add_argument("--n-ctx", type=int, default=64, help="tokens in a row; shorter rows make more varied batches")
    parser.add_argument("--rules", nargs="+", default=["topk", "batch_topk", "jumprelu"])
    parser.add_argument("--l0", type=int, default=8, help="k, or target_l0 of rules without one")
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--kl-coefficient", type=float, default=1.0)
    parser.add_argument("--kl-lr", type=float, default=None)
    args = parser.parse_args()

    lm = sl.load_model(args.model)
    rows_config = sl.TextConfig(n_ctx=args.n_ctx)
    rows = token_rows(lm, named_text(args.eval_text), n_ctx=args.n_ctx, n_tokens=args.eval_tokens)
    stream = sl.ActivationStream(lm, named_text(args.text), args.hook, text_config=rows_config, text_name=args.text)
    kl = {"kl_coefficient": args.kl_coefficient} | ({"kl_lr": args.kl_lr} if args.kl_lr else {})
    plain = [
        sl.TrainConfig(
            hook=args.hook, sparsity=rule, options={OPTIONS.get(rule, "k"): args.l0}, d_sae=args.d_sae, n_tokens=args.tokens,
            batch_size=args.batch_size,
        )
        for rule in args.rules
    ]  # fmt: skip
    with_kl = [config.replace(kl_share=args.share, **kl) for config in plain]
    runs = sl.train(stream, [*plain, *with_kl], args.out / "trained", exists="overwrite")
    begun = [run.dictionary for run in runs[: len(plain)]]
    more = {"kl_share": 1.0, "n_tokens": round(args.share * args.tokens), "decay": 1.0}
    tuning = [  # the default learning rate would be that of a short training
        config.replace(**more, lr=Trainer(config, stream).peak_lr, **kl) for config in plain
    ]
    runs += sl.train(stream, tuning, args.out / "tuned", exists="overwrite", start_from=begun)
    longer = [config.replace(kl_share=0.0, lr=config.kl_lr * config.lr) for config in tuning]
    runs += sl.train(stream, longer, args.out / "longer", exists="overwrite", start_from=begun)
    clean = losses_by_row(lm, rows)
    losses = [losses_by_row(lm, rows, run.dictionary) for run in runs]
    lines = []
    for i, run in enumerate(runs):
        report, name = sl.evaluate(run.dictionary, lm, rows), ("plain", "KL", "tuned", "longer")[i // len(plain)]
        line = {"rule": run.config.sparsity, "trained": name, **{key: report[key] for key in COLUMNS}}
        line["gap"] = report["ce_sae"] - report["ce_clean"]
        if name != "plain":
            line |= dict(zip(("closed", "low", "high"), closed(clean, losses[i % len(plain)], losses[i]), strict=True))
        lines.append(line)
    lines.sort(key=lambda line: args.rules.index(line["rule"]))
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    (args.out / "kl_finetune.json").write_text(json.dumps({"settings": settings, "dictionaries": lines}, indent=2) + "\n")
    table = ["| rule | trained | L0 | FVU | CE | KL | ce_loss_score | gap | closed |", "|" + " --- |" * 9]
    for line in lines:
        share = f"{line['closed']:.1%} ({line['low']:.1%} to {line['high']:.1%})" if "closed" in line else ""
        numbers = " | ".join(f"{line[key]:.4f}" for key in (*COLUMNS, "gap"))
        table.append(f"| {line['rule']} | {line['trained']} | {numbers} | {share} |")
    (args.out / "kl_finetune.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
