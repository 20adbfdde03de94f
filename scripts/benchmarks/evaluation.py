"""Measure speed and memory of evaluation: `sl.evaluate` and SAELens's `run_evals`, each in its own process, in turn.

    python scripts/benchmarks/evaluation.py --peer-python /path/to/venv-with-sae-lens/bin/python --rows 16 64 256

Both read the same rows of random tokens with the same model (a GPT-2 with random weights) and the same dictionary (top-k,
random), and compute everything they compute by default: this library every metric with its confidence interval, SAELens every
metric of `get_eval_everything_config` over as many tokens. Loading is not timed. Prints one line of JSON for each number of
rows: medians of tokens per second, or with --memory the rise of each process's memory during evaluation. With --memory, freed
memory is returned to the system at once, which makes both slower.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from shared import FREE_AT_ONCE, Peer, forget_peak, high_water, hooked_transformer, parser, random_gpt2, source, write_report

import saelens_lite as sl

SHARED = source(high_water, forget_peak, hooked_transformer)

START = """
import sys, time, json, warnings, logging
import torch
from safetensors.torch import load_file
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
folder, batch_rows, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
tokens = load_file(folder + "/tokens.safetensors")["tokens"]
"""

OURS = """
import saelens_lite as sl
from saelens_lite.tokens import TokenRows
lm = sl.load_model(folder + "/model", device="cpu")
d = sl.load(folder + "/dictionary")

def evaluate(tokens):
    report = sl.evaluate(d, lm, TokenRows(tokens, tokens != 0), n_tokens=None, batch_tokens=batch_rows * tokens.shape[1])
    return report["ce_loss_score"]
"""

SAELENS = """
from datasets import Dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
model = hooked_transformer(folder + "/model")
sae = SAE.load_from_disk(folder + "/dictionary")

def evaluate(tokens):
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    store = ActivationsStore.from_sae(model, sae, data, context_size=tokens.shape[1], store_batch_size_prompts=batch_rows)
    n = len(tokens) // batch_rows
    metrics, _ = run_evals(sae, store, model, ActivationScaler(), get_eval_everything_config(batch_rows, n, n),
                           exclude_special_tokens=[0])
    return metrics["model_performance_preservation"]["ce_loss_score"]
"""

SERVE = """
evaluate(tokens[:batch_rows])
print("ready", flush=True)
for line in sys.stdin:
    rows = tokens[:int(line)]
    forget_peak()
    before = high_water()[1]
    start = time.perf_counter()
    score = evaluate(rows)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "extra_bytes": high_water()[0] - before, "ce_loss_score": score}), flush=True)
"""


def prepare(folder: Path, args: argparse.Namespace) -> None:
    """Write model/, dictionary/ and tokens.safetensors."""
    tiny = sl.load_model("tiny", device="cpu")
    model = random_gpt2(
        vocab_size=args.d_vocab, n_positions=args.n_ctx, n_embd=args.d_model, n_layer=args.layers, n_head=args.d_model // 64
    )
    model.save_pretrained(folder / "model")
    tiny.tokenizer.save_pretrained(folder / "model")
    origin = sl.Origin(model="model", n_ctx=args.n_ctx, prepend_bos=True)
    reads = sl.Port(hook=f"blocks.{args.layers // 2}.hook_resid_pre", width=args.d_model)
    d = sl.Dictionary.create("topk", reads=reads, d_sae=args.d_sae, options={"k": args.k}, origin=origin)
    d.save(folder / "dictionary")
    tokens = torch.randint(1, args.d_vocab, (max(args.rows), args.n_ctx))
    tokens[:, 0] = 0
    save_file({"tokens": tokens}, folder / "tokens.safetensors")


def main() -> None:
    options = parser(__doc__, rounds=3, required=True)
    options.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256], help="rows of text, whole batches each")
    options.add_argument("--batch-rows", type=int, default=8)
    options.add_argument("--n-ctx", type=int, default=128)
    options.add_argument("--d-model", type=int, default=768)
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--d-vocab", type=int, default=50257)
    options.add_argument("--d-sae", type=int, default=8192)
    options.add_argument("--k", type=int, default=32)
    options.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    args = options.parse_args()
    if any(n % args.batch_rows for n in args.rows):
        options.error(f"--rows must be multiples of --batch-rows {args.batch_rows}")
    if args.memory:
        os.environ |= FREE_AT_ONCE
    with tempfile.TemporaryDirectory() as where:
        prepare(Path(where), args)
        contestants = {
            "ours": Peer(sys.executable, SHARED + START + OURS + SERVE, where, args.batch_rows, args.threads),
            "SAELens": Peer(args.peer_python, SHARED + START + SAELENS + SERVE, where, args.batch_rows, args.threads),
        }
        rows = []
        for n in args.rows:
            answers = {name: [] for name in contestants}
            for _ in range(args.rounds):
                for name, contestant in contestants.items():
                    answers[name].append(contestant.ask(n))
            row = {"tokens": n * args.n_ctx, "ce_loss_score": {name: a[0]["ce_loss_score"] for name, a in answers.items()}}
            if args.memory:
                extra = {name: max(a["extra_bytes"] for a in found) for name, found in answers.items()}
                row["extra MiB"] = {name: round(n_bytes / 2**20) for name, n_bytes in extra.items()}
            else:
                seconds = {name: statistics.median(a["seconds"] for a in found) for name, found in answers.items()}
                row["tokens/s"] = {name: round(n * args.n_ctx / s) for name, s in seconds.items()}
                row["ours / SAELens"] = round(seconds["SAELens"] / seconds["ours"], 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
        for contestant in contestants.values():
            contestant.close()
    write_report(args, {"rows": rows})


if __name__ == "__main__":
    main()
