"""Compare attribution by gradient with exact ablation, and doses of one latent with random directions of equal norm.

    python scripts/steering.py --out steering                                    # trains a small top-k dictionary first
    python scripts/steering.py --out steering --dictionary runs/topk/dictionary --texts 8 --tokens 32

The texts are the beginnings of held-out pages of Python's documentation. Each has two metrics: its mean loss, and the logit of
the model's most likely next token minus the logit of the second. Correlations are computed over all active latents of a text;
the table shows their median over texts. "without dense" leaves out latents that fire on more than a tenth of the tokens. The
dose–response curve is that of the latent, dense ones excluded, whose ablation changes the loss most. Writes steering.json and
doses.png.
"""

import argparse
from pathlib import Path
from statistics import median

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import saelens_lite as sl
from saelens_lite.files import write_json
from saelens_lite.interventions import Attribution
from saelens_lite.tokens import is_held_out

DENSE = 0.1
METRICS = ("loss", "logit difference")


def trained(lm: sl.LanguageModel, out: Path) -> sl.Dictionary:
    """Return a top-k dictionary of the middle of the model, as in the demonstration but smaller."""
    text = [page.text for page in sl.python_docs() if not is_held_out(page.name)]
    hook = f"blocks.{lm.n_layers // 2}.hook_resid_pre"
    cache = sl.capture(lm, text, hook, out / "cache", n_tokens=200_000, exists="overwrite")
    config = sl.TrainConfig(options={"k": 32}, d_sae=1536, n_tokens=400_000, batch_size=1024, lr=2e-3)
    return sl.train(cache, config, out / "run", exists="overwrite")[0].dictionary


def density(lm: sl.LanguageModel, d: sl.Dictionary, rows: torch.Tensor) -> torch.Tensor:
    """Return the share of the tokens on which each latent fires, position 0 left out."""
    codes = d.encode(lm.run(rows, d.hook)[d.hook][:, 1:])
    return torch.bincount(codes.latent, minlength=d.d_sae) / codes.n_rows


def attributions(lm: sl.LanguageModel, d: sl.Dictionary, rows: torch.Tensor) -> dict[str, list[Attribution]]:
    """Return each metric's attribution in each row."""
    found = {metric: [] for metric in METRICS}
    for tokens in rows:
        likeliest = tuple(lm.logits(tokens)[0, -1].topk(2).indices.tolist())
        for name, metric in zip(METRICS, ("loss", likeliest), strict=True):
            found[name].append(sl.attribute(d, lm, tokens, metric))
    return found


def correlations(found: list[Attribution], keep: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return the medians over rows of the correlations of exact ablation with the other ways, of the latents to keep."""
    chosen = [one.only(keep[one.latent]).agreement for one in found]
    return {
        f"{a}, {b}": {key: median(getattr(agreement[a, b], key) for agreement in chosen) for key in ("spearman", "pearson")}
        for a, b in (("ablation", "gradient"), ("ablation", "direct"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dictionary", type=Path)
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--doses", type=float, nargs="+", default=[-8, -4, -2, 0, 2, 4, 8, 16])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lm, console = sl.load_model("tiny"), Console()
    d = sl.load(args.dictionary, device=lm.device) if args.dictionary else trained(lm, args.out)

    pages = [page.text for page in sl.python_docs() if is_held_out(page.name)]
    rows = torch.stack([row[: args.tokens] for row in lm.to_tokens(pages).tokens[: args.texts]])
    rare = density(lm, d, lm.to_tokens(pages).tokens) <= DENSE
    found = attributions(lm, d, rows)
    figures = {
        metric: {"all": correlations(each, torch.ones_like(rare)), "without dense": correlations(each, rare)}
        for metric, each in found.items()
    }
    grid = Table("metric", "latents", "ways", "Spearman", "Pearson", box=SIMPLE_HEAD)
    for metric, by_latents in figures.items():
        for latents, by_ways in by_latents.items():
            for ways, both in by_ways.items():
                grid.add_row(metric, latents, ways, *(f"{x:.3f}" for x in both.values()))
    console.print(grid)
    console.print(found["loss"][0].table(5))

    total = torch.zeros(d.d_sae)
    for one in found["loss"]:
        total += torch.zeros(d.d_sae).index_add_(0, one.latent, one.ablation)
    latent = int(torch.where(rare, total.abs(), 0).argmax())
    response = sl.dose_response(d, lm, latent, args.doses, rows)
    console.print(response.table())
    response.plot().savefig(args.out / "doses.png", dpi=120)
    write_json(args.out / "steering.json", {"agreement": figures, "dose_response": response.to_dict()})


if __name__ == "__main__":
    main()
