"""Evaluate a dictionary with SAELens and SAEBench; compare_metrics.py runs this in an environment that has them.

    python scripts/comparisons/judge_metrics.py FOLDER DICTIONARY --batch-rows 16

FOLDER holds model/ (transformers) and tokens.safetensors ("tokens": [n_seq n_ctx]). Prints one line of JSON:
{judge: {metric: value}}. Each judge reads the dictionary as `sl.judge("saebench").sae(d)`. SAELens also reads it as the SAE
that it loads from the folder itself, if it knows the architecture.
"""

import argparse
import contextlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import sae_lens.evals as lens
import torch
from datasets import Dataset
from sae_bench.evals.core import main as bench
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_lens import SAE, ActivationsStore
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file

import saelens_lite as sl


def store_of(model: Any, sae: Any, tokens: torch.Tensor, batch_rows: int) -> ActivationsStore:
    """SAELens's reader of token rows, from their beginning."""
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    n_ctx = tokens.shape[1]
    return ActivationsStore.from_sae(model, sae, data, context_size=n_ctx, store_batch_size_prompts=batch_rows)


def flat(metrics: dict[str, dict[str, float]], features: dict[str, list[float]]) -> dict[str, float]:
    """Return the metrics of all groups by name, with the share of latents that fired and of those that fire on over 10 % of
    tokens.
    """
    density = torch.tensor(features["feature_density"])
    values = {name: value for group in metrics.values() for name, value in group.items()}
    return values | {"frac_alive": (density > 0).double().mean().item(), "frac_dense": (density > 0.1).double().mean().item()}


def by_saelens(sae: Any, model: Any, tokens: torch.Tensor, batch_rows: int) -> dict[str, float]:
    """SAELens's metrics, over all rows."""
    n_batches = len(tokens) // batch_rows
    config = lens.get_eval_everything_config(batch_rows, n_batches, n_batches)
    return flat(*lens.run_evals(sae, store_of(model, sae, tokens, batch_rows), model, ActivationScaler(), config))


def by_saebench(sae: Any, model: Any, tokens: torch.Tensor, batch_rows: int) -> dict[str, float]:
    """SAEBench's core metrics, over all rows, special tokens left out as its command line does."""
    n_batches = len(tokens) // batch_rows
    every = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics",
             "featurewise_weight_based_metrics")  # fmt: skip
    config = CoreEvalConfig(
        batch_size_prompts=batch_rows,
        n_eval_reconstruction_batches=n_batches,
        n_eval_sparsity_variance_batches=n_batches,
        exclude_special_tokens_from_reconstruction=True,
        **{f"compute_{name}": True for name in every},
    )
    special = {model.tokenizer.pad_token_id, model.tokenizer.eos_token_id, model.tokenizer.bos_token_id}
    metrics, features = bench.run_evals(
        sae, store_of(model, sae, tokens, batch_rows), model, eval_config=config, ignore_tokens=special
    )
    return flat(metrics, features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dictionary", type=Path)
    parser.add_argument("--batch-rows", type=int, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    tokens = load_file(args.folder / "tokens.safetensors")["tokens"]
    with contextlib.redirect_stdout(sys.stderr):
        model = sl.load_model(args.folder / "model").bridge()
        adapted = sl.judge("saebench").sae(sl.load(args.dictionary))
        found = {
            "SAELens": by_saelens(adapted, model, tokens, args.batch_rows),
            "SAEBench": by_saebench(adapted, model, tokens, args.batch_rows),
        }
        try:
            own = SAE.load_from_disk(str(args.dictionary))
        except (KeyError, ValueError):
            print("SAELens does not know this architecture", file=sys.stderr)
        else:
            found["SAELens, its own SAE"] = by_saelens(own, model, tokens, args.batch_rows)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
