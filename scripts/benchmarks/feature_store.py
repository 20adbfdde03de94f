"""Measure time, memory and disk of a feature store and its dashboard, beside the bare pass of the model and SAEDashboard.

    python scripts/benchmarks/feature_store.py --saedashboard /path/to/venv-with-sae-dashboard/bin/python
    python scripts/benchmarks/feature_store.py --d-model 768 --layers 12 --d-vocab 50257 --d-sae 24576 --train-tokens 0

By default the model is `tiny`, the text is Python's documentation, and the dictionary is a batch-top-k one trained on
--train-tokens tokens of it. With --d-model, the model is a GPT-2 with random weights and the tokens are random. Each tool runs
in its own process, in turn, on the same rows with the same weights. Loading is not timed. SAEDashboard runs SaeVisRunner and
save_feature_centric_vis as its README shows, for the first --peer-latents latents.

Prints one line of JSON for each tool: medians over the rounds. "extra MiB" is the rise of the process's memory. With --memory,
freed memory is returned to the system at once, which makes all slower: take the speed from a run without it. The bare passes
run before and after the store, on the first --bare-tokens tokens: to the hook, to the hook with the encoder, and through the
whole model.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shared import FREE_AT_ONCE, Peer, forget_peak, high_water, hooked_transformer, parser, random_gpt2, source, write_report

import saelens_lite as sl
from saelens_lite.tokens import named_text, token_rows

SHARED = source(high_water, forget_peak, hooked_transformer)

START = """
import contextlib, sys, time, json, warnings, logging
from pathlib import Path
import torch
from safetensors.torch import load_file
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
folder, hook, threads, n_latents, bare_tokens = sys.argv[1], sys.argv[2], *(int(x) for x in sys.argv[3:])
torch.set_num_threads(threads)
tokens = load_file(folder + "/tokens.safetensors")["tokens"].long()

def size(path):
    path = Path(path)
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
"""

OURS = """
import shutil
import saelens_lite as sl
from saelens_lite.model.passes import batches, default_batch_tokens
from saelens_lite.tokens import TokenRows
lm = sl.load_model(folder + "/model", device="cpu")
d = sl.load(folder + "/dictionary")
lm.hook_point(hook)

@torch.no_grad()
def bare(rows):
    # seconds of all the text by each kind of pass, from what the first rows take
    part = rows[: -(-bare_tokens // rows.tokens.shape[1])] if bare_tokens else rows
    def to_hook(batch):
        return lm.run(batch.rows.tokens, hook)[hook][batch.rows.keep]
    kinds = {"to_hook": to_hook, "to_hook_and_encode": lambda batch: d.encode(to_hook(batch)),
             "whole": lambda batch: lm.logits(batch.rows.tokens)}
    seconds = {}
    for name, visit in kinds.items():
        start = time.perf_counter()
        for batch in batches(lm, part, default_batch_tokens(lm, with_logits=True)):
            visit(batch)
        seconds[name] = (time.perf_counter() - start) * rows.n_kept / part.n_kept
    return seconds

def measure(codes):
    rows = TokenRows(tokens, tokens != 0)
    out, html = folder + "/store", folder + "/ours.html"
    before = bare(rows)
    forget_peak()
    start_memory = high_water()[1]
    start = time.perf_counter()
    store = sl.FeatureStore.build(d, lm, rows, out=out, codes=codes, exists="overwrite")
    facts = {"store_seconds": time.perf_counter() - start}
    start = time.perf_counter()
    store.dashboard(html, exists="overwrite")
    facts["dashboard_seconds"] = time.perf_counter() - start
    facts["extra_bytes"] = high_water()[0] - start_memory
    after = bare(rows)
    facts |= {f"{name}_seconds": (before[name] + after[name]) / 2 for name in before}
    facts |= {"latents": d.d_sae, "store_bytes": size(out), "dashboard_bytes": size(html),
              "entries": int(store.tensors.count.sum()), "fire": int((store.tensors.count > 0).sum())}
    if codes:
        facts["codes_bytes"] = size(out + "/codes.parquet")
    return facts
"""

SAEDASHBOARD = """
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE
from transformers import PreTrainedTokenizerFast
model = hooked_transformer(folder + "/model", model_name="gpt2")
model.tokenizer = PreTrainedTokenizerFast(tokenizer_file=folder + "/model/tokenizer.json", bos_token="<|endoftext|>",
                                          eos_token="<|endoftext|>", pad_token="<|endoftext|>")

def measure(_):
    sae = SAE.load_from_disk(folder + "/dictionary")
    settings = SaeVisConfig(hook_point=hook, features=list(range(n_latents)), minibatch_size_features=256,
                            minibatch_size_tokens=64, device="cpu", dtype="float32")
    forget_peak()
    start_memory = high_water()[1]
    start = time.perf_counter()
    data = SaeVisRunner(settings).run(encoder=sae, model=model, tokens=tokens)
    facts = {"store_seconds": time.perf_counter() - start}
    html = folder + "/theirs.html"
    data.model = model
    start = time.perf_counter()
    save_feature_centric_vis(sae_vis_data=data, filename=html)
    facts["dashboard_seconds"] = time.perf_counter() - start
    facts["extra_bytes"] = high_water()[0] - start_memory
    return facts | {"latents": n_latents, "dashboard_bytes": size(html)}
"""

SERVE = """
print("ready", flush=True)
for line in sys.stdin:
    with contextlib.redirect_stdout(sys.stderr):
        facts = measure(json.loads(line))
    print(json.dumps(facts), flush=True)
"""


def prepare(folder: Path, args: argparse.Namespace) -> str:
    """Write model/, dictionary/ and tokens.safetensors; the hook."""
    lm = sl.load_model("tiny", device="cpu")
    if args.d_model:
        model = random_gpt2(
            vocab_size=args.d_vocab, n_positions=args.n_ctx, n_embd=args.d_model, n_layer=args.layers,
            n_head=args.d_model // 64,
        )  # fmt: skip
        lm = sl.LanguageModel(model, lm.tokenizer, name="random")
        tokens = torch.randint(1, args.d_vocab, (-(-args.tokens // (args.n_ctx - 1)), args.n_ctx))
        tokens[:, 0] = 0
    else:
        rows = token_rows(lm, named_text("python-docs:train"), n_ctx=args.n_ctx, n_tokens=2 * args.tokens)
        full = rows.tokens[rows.keep.sum(1) == args.n_ctx - 1]
        tokens = full[: -(-args.tokens // (args.n_ctx - 1))]
    hook = f"blocks.{lm.n_layers // 2}.hook_resid_pre"
    lm.module.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    save_file({"tokens": tokens.int().contiguous()}, folder / "tokens.safetensors")
    origin = sl.Origin(model="model", n_ctx=args.n_ctx, prepend_bos=True)
    reads = sl.Port(hook=hook, width=lm.d_model)
    if args.train_tokens:
        x = torch.cat([lm.run(part, hook)[hook][:, 1:].flatten(0, 1) for part in tokens.split(16)])
        # published as JumpReLU, which SAEDashboard can rescale; top-k it cannot
        d = sl.fit(x, sparsity="batch_topk", d_sae=args.d_sae, n_tokens=args.train_tokens, options={"k": args.k})
        d.origin, d.reads, d.writes = origin, (reads,), (reads,)
    else:
        d = sl.Dictionary.create("topk", reads=reads, d_sae=args.d_sae, options={"k": args.k}, origin=origin)
    d.save(folder / "dictionary")
    return hook


def summary(name: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the rounds, by latent."""
    middle = {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}
    n, line = middle["latents"], {"tool": name, "latents": middle["latents"]}
    for what in ("store", "dashboard"):
        line[f"{what} ms a latent"] = round(1000 * middle[f"{what}_seconds"] / n, 2)
        if f"{what}_bytes" in middle:
            line[f"{what} bytes a latent"] = round(middle[f"{what}_bytes"] / n)
    if "whole_seconds" in middle:
        line["seconds"] = {key.removesuffix("_seconds"): round(middle[key], 2) for key in middle if key.endswith("_seconds")}
        for kind, title in (("whole", "pass"), ("to_hook", "pass to the hook"), ("to_hook_and_encode", "that and the encoder")):
            line[f"store over {title}"] = round(middle["store_seconds"] / middle[f"{kind}_seconds"], 3)
        line |= {"entries": middle["entries"], "latents that fire": middle["fire"]}
    if "codes_bytes" in middle:
        line["codes bytes an entry"] = round(middle["codes_bytes"] / middle["entries"], 2)
    line["extra MiB"] = round(max(answer["extra_bytes"] for answer in answers) / 2**20)
    return line


def main() -> None:
    options = parser(__doc__, rounds=3, peers=None)
    options.add_argument("--saedashboard", help="Python of an environment with sae-dashboard 0.8.0")
    options.add_argument("--peer-latents", type=int, default=256, help="latents that SAEDashboard shows")
    options.add_argument("--tokens", type=int, default=65_536)
    options.add_argument("--n-ctx", type=int, default=128)
    options.add_argument("--d-sae", type=int, default=2048)
    options.add_argument("--k", type=int, default=32)
    options.add_argument("--train-tokens", type=int, default=500_000, help="0: a random top-k dictionary")
    options.add_argument("--d-model", type=int, help="of a random GPT-2; default: the embedded model")
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--d-vocab", type=int, default=4096)
    options.add_argument("--codes", action="store_true", help="keep all codes as Parquet as well")
    options.add_argument("--bare-tokens", type=int, default=0, help="of the bare passes; default: all")
    options.add_argument("--keep", type=Path, help="a folder for what is made, the page among it; default: none is kept")
    options.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    args = options.parse_args()
    if args.memory:
        os.environ |= FREE_AT_ONCE
    with tempfile.TemporaryDirectory() if args.keep is None else nullcontext(args.keep) as where:
        hook = prepare(Path(where), args)
        programs = {"ours": (sys.executable, OURS)}
        if args.saedashboard:
            programs["SAEDashboard"] = (args.saedashboard, SAEDASHBOARD)
        contestants = {
            name: Peer(python, SHARED + START + program + SERVE, where, hook, args.threads, args.peer_latents, args.bare_tokens)
            for name, (python, program) in programs.items()
        }
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
        for _ in range(args.rounds):
            for name, contestant in contestants.items():
                answers[name].append(contestant.ask(json.dumps(args.codes)))
        rows = [summary(name, found) for name, found in answers.items()]
        for row in rows:
            print(json.dumps(row), flush=True)
        for contestant in contestants.values():
            contestant.close()
    write_report(args, {"rows": rows})


if __name__ == "__main__":
    main()
