"""Measure training from text to dictionary: this library and SAELens, each in its own process, in turn.

    python scripts/benchmarks/train.py --peer-python /path/to/venv-with-sae-lens/bin/python
    python scripts/benchmarks/train.py --device cuda --dtype bfloat16 --batch 8192 --buffer 131072 --lm-batch 16384 --steps 100

A model with the shape of GPT-2 small and random weights runs over random tokens; top-k dictionaries are trained on the
activations that enter block 8, straight from the model, through a buffer of the same size. Both tools also train four
dictionaries of different k in one pass: this library by one call of `train`, SAELens by its MultiSAETrainingRunner. The time
runs from the end of the second optimiser step to the end of the last: language model, buffer and dictionary, without start-up.
On a GPU, the end of a step is when the GPU is done with it, the time starts with a tenth of the steps, and SAELens runs both
the model and its dictionaries in bfloat16 autocast if the model is bfloat16 (--dtype).
Prints tokens per second and ratios of medians.
"""

import json
import statistics
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import save_file
from shared import HOOK, N_CTX, hooked_transformer, now, parser, random_gpt2, source, write_report

import saelens_lite as sl

CLOCK = """
import json, sys, torch
a = json.loads(sys.argv[1])
torch.set_num_threads(a["threads"])
n = len(a["ks"])
first, last = a["first"] * n, a["steps"] * n  # of the steps of all dictionaries
ends, n_ended = {}, 0
def timed(step):
    def timed_step(self, *args, **kwargs):
        global n_ended
        out = step(self, *args, **kwargs)
        n_ended += 1
        if n_ended in (first, last):
            ends[n_ended] = now(a["device"])
        return out
    return timed_step
from safetensors.torch import load_file
tokens = load_file(a["folder"] + "/tokens.safetensors")["tokens"]
"""

OURS = """
import saelens_lite as sl
from saelens_lite.tokens import TokenRows
from saelens_lite.training import Trainer
Trainer.step = timed(Trainer.step)
lm = sl.load_model(a["folder"], device=a["device"], dtype=getattr(torch, a["dtype"]))
stream = sl.ActivationStream(lm, TokenRows(tokens, torch.ones_like(tokens, dtype=torch.bool)), a["hook"],
                             buffer_tokens=a["buffer"], batch_tokens=a["lm_batch"])
configs = [sl.TrainConfig(d_sae=a["d_sae"], options={"k": k}, batch_size=a["batch"], n_tokens=a["steps"] * a["batch"])
           for k in a["ks"]]
sl.train(stream, configs, device=a["device"])
"""

SAELENS = """
import tempfile
from datasets import Dataset
from sae_lens import (LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, MultiSAETrainingRunner,
                      MultiSAETrainingRunnerConfig, TopKTrainingSAEConfig)
torch.optim.Adam.step = timed(torch.optim.Adam.step)
model = hooked_transformer(a["folder"]).to(a["device"])
halves = a["dtype"] == "bfloat16"
data = Dataset.from_dict({"tokens": tokens.tolist()})
n_ctx = tokens.shape[1]
rows = a["lm_batch"] // n_ctx
common = dict(
    model_name="random", streaming=False, context_size=n_ctx, n_batches_in_buffer=a["buffer"] // n_ctx,
    store_batch_size_prompts=rows, training_tokens=a["steps"] * a["batch"], train_batch_size_tokens=a["batch"],
    prepend_bos=False, device=a["device"], n_eval_batches=0, logger=LoggingConfig(log_to_wandb=False), output_path=None,
    checkpoint_path=None, autocast=halves, autocast_lm=halves)
def sae(k):
    return TopKTrainingSAEConfig(d_in=768, d_sae=a["d_sae"], k=k, device=a["device"])
if len(a["ks"]) == 1:
    runner = LanguageModelSAETrainingRunner(
        LanguageModelSAERunnerConfig(sae=sae(a["ks"][0]), hook_name=a["hook"], dataset_path="", **common), data, model)
else:
    runner = MultiSAETrainingRunner(
        MultiSAETrainingRunnerConfig(saes={f"k{k}": sae(k) for k in a["ks"]}, hook_names=a["hook"], **common), data, model)
runner.run()
"""

REPORT = """
print("RESULT", json.dumps({"seconds": ends[last] - ends[first], "steps": a["steps"] - a["first"]}), flush=True)
"""


def tokens_per_second(python: str, code: str, settings: dict) -> float:
    """Return tokens a second of one contestant, run to its end in a process of its own."""
    command = [python, "-c", source(now, hooked_transformer) + CLOCK + code + REPORT, json.dumps(settings)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    if process.returncode or not lines:
        raise SystemExit(f"{python} failed:\n{process.stderr[-4000:]}")
    found = json.loads(lines[-1].removeprefix("RESULT "))
    return found["steps"] * settings["batch"] / found["seconds"]


def main() -> None:
    options = parser(__doc__, rounds=2, device=True)
    options.add_argument("--d-sae", type=int, default=24_576)
    options.add_argument("--batch", type=int, default=4096)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument(
        "--ks", type=int, nargs="+", default=[16, 32, 64, 128], help="of each dictionary; the second alone, too"
    )
    options.add_argument("--buffer", type=int, default=16_384)
    options.add_argument("--lm-batch", type=int, default=4096, help="tokens in a forward pass")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    args = options.parse_args()
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        random_gpt2().save_pretrained(folder)
        sl.load_model("tiny").tokenizer.save_pretrained(folder)
        n_rows = ((args.steps + 2) * args.batch + 4 * args.buffer) // N_CTX
        tokens = torch.randint(50_257, (n_rows, N_CTX), generator=torch.Generator().manual_seed(0))
        save_file({"tokens": tokens}, f"{folder}/tokens.safetensors")
        settings = {
            "folder": folder, "hook": HOOK, "d_sae": args.d_sae, "batch": args.batch, "steps": args.steps,
            "buffer": args.buffer, "lm_batch": args.lm_batch, "threads": args.threads, "device": args.device,
            "dtype": args.dtype, "first": 2 if args.device == "cpu" else max(2, args.steps // 10),
        }  # fmt: skip
        contestants = {"ours": (sys.executable, OURS)}
        if args.peer_python:
            contestants["SAELens"] = (args.peer_python, SAELENS)
        for _ in range(args.rounds):
            for name, (python, code) in contestants.items():
                for ks in (args.ks[1:2], args.ks):
                    label = name if len(ks) == 1 else f"{name}, {len(ks)} at once"
                    speeds.setdefault(label, []).append(tokens_per_second(python, code, settings | {"ks": ks}))
                    print(f"{label:24} {speeds[label][-1]:10,.0f} tokens/s", flush=True)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    n = len(args.ks)
    ratios = {f"one pass for {n} / {n} runs of ours": n * median[f"ours, {n} at once"] / median["ours"]}
    if args.peer_python:
        ratios["ours / SAELens"] = median["ours"] / median["SAELens"]
        ratios[f"ours / SAELens, {n} at once"] = median[f"ours, {n} at once"] / median[f"SAELens, {n} at once"]
    for name, value in ratios.items():
        print(f"{name:42} {value:6.2f}")
    write_report(args, {"tokens per second": speeds, "ratios": ratios})


if __name__ == "__main__":
    main()
