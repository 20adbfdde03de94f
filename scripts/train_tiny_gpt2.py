"""Train `tiny`, the GPT-2 that ships inside saelens_lite, from text to package data.

    python scripts/train_tiny_gpt2.py --books books.txt.xz --out saelens_lite/data/tiny

Text: public-domain books (one file, documents separated by <|endoftext|>) and Python's own documentation. Whole books
and whole documentation pages are held out. The tokenizer is a byte-level BPE trained on the same text. The model is
transformers' GPT2LMHeadModel; every training row begins with <|endoftext|>, so position 0 always holds it.

Matrices inside the blocks are updated with Muon (Jordan et al. 2024), everything else with Adam. The learning rate
warms up, stays, and falls linearly to zero over the last 40 % of the steps.

Repeat the command to resume an interrupted run from its last saved state (`--work`). The same settings give the same
weights on the same machine and thread count.
"""

import argparse
import hashlib
import json
import logging
import lzma
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from saelens_lite.tokens.python_docs import is_held_out, python_docs

EOT = "<|endoftext|>"
log = logging.getLogger("train_tiny_gpt2")

SETTINGS = {
    "seed": 0,
    "vocab_size": 4096,
    "n_ctx": 256,
    "d_model": 192,
    "n_layer": 4,
    "n_head": 6,
    "n_steps": 2000,
    "rows_per_step": 32,
    "rows_per_microbatch": 16,
    "docs_repeats": 10,
    "held_out_books": 9,
    "held_out_docs_percent": 10,
    "bpe_book_bytes": 16_000_000,
    "bpe_docs_repeats": 4,
    "lr_matrix": 0.02,
    "lr_other": 3e-3,
    "warmup_steps": 100,
    "decay_share": 0.4,
    "muon_momentum": 0.95,
    "muon_weight_decay": 0.01,
    "eval_rows_books": 1024,
    "eval_rows_docs": 256,
    "eval_every": 100,
    "save_every": 50,
}


def read_books(path: Path) -> list[str]:
    """Return the books of the file, each stripped of surrounding white space."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [book.strip() for book in file.read().split(EOT) if book.strip()]


def split_books(books: list[str], held_out: int) -> tuple[list[str], list[str]]:
    """Split whole books into training and held-out ones. Held-out books have the smallest SHA-256 of their text."""
    ranked = sorted(books, key=lambda book: hashlib.sha256(book.encode()).hexdigest())
    chosen = set(ranked[:held_out])
    return [b for b in books if b not in chosen], ranked[:held_out]


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """GPT-2's byte-level BPE with `vocab_size` entries; id 0 is <|endoftext|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_rows(tokenizer: Tokenizer, texts: list[str], n_ctx: int) -> torch.Tensor:
    """Return token rows [n n_ctx]: <|endoftext|>, then n_ctx − 1 consecutive tokens of one document; remainders dropped."""
    rows = []
    for encoding in tokenizer.encode_batch(texts):
        ids = np.asarray(encoding.ids, dtype=np.int32)
        n = len(ids) // (n_ctx - 1)
        rows.append(ids[: n * (n_ctx - 1)].reshape(n, n_ctx - 1))
    body = np.concatenate(rows)
    return torch.from_numpy(np.pad(body, ((0, 0), (1, 0)))).long()


def orthogonalise(update: torch.Tensor) -> torch.Tensor:
    """Return the nearest semi-orthogonal matrix, by five Newton–Schulz steps in fp32 (Muon's quintic)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon:
    """Momentum, orthogonalised; a fused query-key-value matrix counts as three."""

    def __init__(self, params: dict[str, torch.Tensor], momentum: float, weight_decay: float):
        self.params, self.momentum, self.weight_decay = params, momentum, weight_decay
        self.buffers = {name: torch.zeros_like(p) for name, p in params.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for name, p in self.params.items():
            buffer = self.buffers[name].lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(buffer, self.momentum)  # Nesterov
            p.mul_(1 - lr * self.weight_decay)
            for piece, target in zip(
                update.chunk(3, dim=1) if "c_attn" in name else [update],
                p.chunk(3, dim=1) if "c_attn" in name else [p],
                strict=True,
            ):
                d_in, d_out = piece.shape  # Conv1D stores [in, out]
                target.sub_(orthogonalise(piece), alpha=lr * math.sqrt(max(1.0, d_out / d_in)))


def schedule(step: int, settings: dict) -> float:
    """Return the share of the peak learning rate at `step`: linear warm-up, plateau, linear decay to zero."""
    n, decay = settings["n_steps"], settings["decay_share"]
    return min(1.0, (step + 1) / settings["warmup_steps"], (n - step) / (n * decay))


@torch.no_grad()
def bits_per_byte(model: GPT2LMHeadModel, rows: torch.Tensor, byte_length: torch.Tensor) -> float:
    """Return the mean bits per byte over rows: Σ −log2 p(token | row so far) ÷ Σ bytes of those tokens."""
    nats, n_bytes = 0.0, 0
    for batch in rows.split(16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        target = batch[:, 1:]
        nats += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
        n_bytes += byte_length[target].sum().item()
    return nats / math.log(2) / n_bytes


def every_nth(rows: torch.Tensor, n: int) -> torch.Tensor:
    """At most `n` rows, evenly spaced over all documents."""
    return rows[torch.linspace(0, len(rows) - 1, min(n, len(rows))).long()]


def row_order(n_rows: int, n_needed: int, seed: int) -> torch.Tensor:
    """Row numbers for the whole run: one random permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(n_needed / n_rows)
    return torch.cat([torch.randperm(n_rows, generator=generator) for _ in range(epochs)])[:n_needed]


def replace_with(path: Path, write) -> None:
    """Write to a neighbour file, then rename: `path` is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="text file, .txt or .txt.xz; books end with <|endoftext|>")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives model, tokenizer, card and log")
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="folder for the state of an interrupted run")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    settings = {name: getattr(args, name) for name in SETTINGS}
    torch.set_num_threads(args.threads)
    torch.manual_seed(settings["seed"])
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    books = read_books(args.books)
    train_books, held_books = split_books(books, settings["held_out_books"])
    docs = python_docs()
    percent = settings["held_out_docs_percent"]
    train_docs = [d.text for d in docs if not is_held_out(d.name, percent)]
    held_docs = [d.text for d in docs if is_held_out(d.name, percent)]
    data = {
        "books_sha256": hashlib.sha256("\0".join(books).encode()).hexdigest(),
        "docs_sha256": hashlib.sha256("\0".join(d.text for d in docs).encode()).hexdigest(),
        "python": platform.python_version(),
        "train_books": len(train_books),
        "held_out_books": [f"{book.splitlines()[0][:60]} … ({len(book):,} characters)" for book in held_books],
        "held_out_docs": len(held_docs),
    }

    def bpe_texts() -> Iterator[str]:
        yield from train_docs * settings["bpe_docs_repeats"]
        share = settings["bpe_book_bytes"] // len(train_books)
        for book in train_books:
            yield from book[:share].splitlines(keepends=True)

    tokenizer_file = args.work / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(bpe_texts(), settings["vocab_size"])
        replace_with(tokenizer_file, lambda path: tokenizer.save(str(path)))
    n_ctx = settings["n_ctx"]
    byte_length = torch.tensor(
        [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]  # one symbol a byte in byte-level BPE
    )
    byte_length[0] = 0
    book_rows = encode_rows(tokenizer, train_books, n_ctx)
    doc_rows = encode_rows(tokenizer, train_docs, n_ctx)
    rows = torch.cat([book_rows] + [doc_rows] * settings["docs_repeats"])
    eval_rows = {
        "books": every_nth(encode_rows(tokenizer, held_books, n_ctx), settings["eval_rows_books"]),
        "docs": every_nth(encode_rows(tokenizer, held_docs, n_ctx), settings["eval_rows_docs"]),
    }
    bytes_per_token = {k: byte_length[v[:, 1:]].float().mean().item() for k, v in eval_rows.items()}
    log.info("rows: %d books, %d docs; bytes per token %s", len(book_rows), len(doc_rows), bytes_per_token)

    shape = {
        "vocab_size": tokenizer.get_vocab_size(),
        "n_positions": n_ctx,
        "n_embd": settings["d_model"],
        "n_layer": settings["n_layer"],
        "n_head": settings["n_head"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    # The same function as the shipped "gelu_new", in one kernel.
    model = GPT2LMHeadModel(GPT2Config(**shape, activation_function="gelu_pytorch_tanh"))
    named = dict(model.named_parameters())
    matrices = {k: p for k, p in named.items() if ".h." in k and p.ndim == 2}
    others = {k: p for k, p in named.items() if k not in matrices}
    muon = Muon(matrices, settings["muon_momentum"], settings["muon_weight_decay"])
    adam = torch.optim.Adam(others.values(), lr=settings["lr_other"], betas=(0.9, 0.95), fused=True)
    n_params = sum(p.numel() for p in named.values())

    per_step = settings["rows_per_step"]
    order = row_order(len(rows), settings["n_steps"] * per_step, settings["seed"])
    history: list[dict] = []
    start, since = 0, 0.0  # since: sum of the losses after the last line of the history
    state_file, history_file = args.work / "state.safetensors", args.work / "history.json"
    if state_file.exists():
        state = load_file(state_file)
        start, since = int(state["step"]), float(state["since"])
        for k, p in named.items():
            p.data.copy_(state[f"model.{k}"])
        for k, b in muon.buffers.items():
            b.copy_(state[f"muon.{k}"])
        for k, p in others.items():
            adam.state[p] = {s: state[f"adam.{k}.{s}"].clone() for s in ("step", "exp_avg", "exp_avg_sq")}
        history = [h for h in json.loads(history_file.read_text()) if h["step"] <= start]
        log.info("going on from step %d", start)

    def save_state(step: int) -> None:
        state = {"step": torch.tensor(step), "since": torch.tensor(since, dtype=torch.float64)}
        state |= {f"model.{k}": p.detach().clone() for k, p in named.items()}
        state |= {f"muon.{k}": b for k, b in muon.buffers.items()}
        state |= {f"adam.{k}.{s}": v for k, p in others.items() for s, v in adam.state[p].items()}
        replace_with(history_file, lambda path: path.write_text(json.dumps(history)))
        replace_with(state_file, lambda path: save_file(state, path))

    @torch.compile
    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    n_micro = per_step // settings["rows_per_microbatch"]
    began = time.perf_counter()
    for step in range(start, settings["n_steps"]):
        batch = rows[order[step * per_step : (step + 1) * per_step]]
        total = 0.0
        for micro in batch.chunk(n_micro):
            loss = loss_of(micro) / n_micro
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise SystemExit(f"loss is {total} at step {step}; the last good state is in {args.work}")
        rate = schedule(step, settings)
        for group in adam.param_groups:
            group["lr"] = settings["lr_other"] * rate
        muon.step(settings["lr_matrix"] * rate)
        adam.step()
        model.zero_grad(set_to_none=True)
        since += total
        done = step + 1
        if done % 10 == 0:
            speed = (done - start) * per_step * n_ctx / (time.perf_counter() - began)
            left = (settings["n_steps"] - done) * per_step * n_ctx / speed / 60
            log.info("step %d loss %.4f  %.0f tok/s  %.0f min left", done, total, speed, left)
        if done % settings["eval_every"] == 0 or done == settings["n_steps"]:
            few = {k: bits_per_byte(model, every_nth(v, 128), byte_length) for k, v in eval_rows.items()}
            history.append(
                {
                    "step": done,
                    "tokens": done * per_step * n_ctx,
                    "train_loss_nats": round(since / (done - (history[-1]["step"] if history else 0)), 4),
                    **{f"{k}_bits_per_byte": round(v, 4) for k, v in few.items()},
                }
            )
            since = 0.0
            log.info("%s", history[-1])
        if done % settings["save_every"] == 0 or done == settings["n_steps"]:
            save_state(done)

    model.half().float()  # what is measured below is what the fp16 file holds
    held_out = {k: round(bits_per_byte(model, v, byte_length), 4) for k, v in eval_rows.items()}
    model.config.activation_function = "gelu_new"
    model.config.prepend_bos = True
    model.half().save_pretrained(args.out)
    GPT2TokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, unk_token=EOT, model_max_length=n_ctx
    ).save_pretrained(args.out)
    model.float()
    torch.manual_seed(settings["seed"])
    prompt = torch.tensor([[0, *tokenizer.encode("The old man looked at").ids]])
    sample = model.generate(prompt, max_new_tokens=60, do_sample=True, temperature=0.8, top_k=50, pad_token_id=0)
    report = {
        "parameters": n_params,
        "tokens_trained": settings["n_steps"] * per_step * n_ctx,
        "held_out_bits_per_byte": held_out,
        "bytes_per_token": {k: round(v, 3) for k, v in bytes_per_token.items()},
        "sample": tokenizer.decode(sample[0].tolist()[1:]),
        "settings": settings,
        "data": data,
        "torch": torch.__version__,
        "loss_curve": history,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (args.out / "README.md").write_text(card(report))
    log.info("held out: %s", held_out)


def card(report: dict) -> str:
    """Return the model card, from the figures of the run."""
    s, d = report["settings"], report["data"]
    curve = "\n".join(
        f"| {h['tokens']:,} | {h['train_loss_nats']:.3f} | {h['books_bits_per_byte']:.3f} | {h['docs_bits_per_byte']:.3f} |"
        for h in report["loss_curve"]
        if h["step"] % (5 * s["eval_every"]) == 0 or h["step"] == s["n_steps"]
    )
    books = "\n".join(f"- {b}" for b in d["held_out_books"])
    return f"""---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tiny: the GPT-2 inside saelens_lite

A GPT2LMHeadModel small enough to ship in a wheel and good enough to be worth looking into: {report["parameters"]:,}
parameters, {s["n_layer"]} layers, d_model {s["d_model"]}, context {s["n_ctx"]}, byte-level BPE of {s["vocab_size"]:,}
entries, weights in fp16. Every row it was trained on begins with `<|endoftext|>`; prepend it.

| held-out text | bits per byte | bytes per token |
| --- | --- | --- |
| books ({s["held_out_books"]} whole books) | {report["held_out_bits_per_byte"]["books"]:.3f} | {report["bytes_per_token"]["books"]:.2f} |
| Python documentation ({d["held_out_docs"]} whole pages and modules) | {report["held_out_bits_per_byte"]["docs"]:.3f} | {report["bytes_per_token"]["docs"]:.2f} |

Measured in rows of {s["n_ctx"]} tokens without overlap, so the first words of each row have no context.

## Training
{report["tokens_trained"]:,} tokens of {d["train_books"]} public-domain books and of Python {d["python"]}'s own documentation
(repeated {s["docs_repeats"]} times), seed {s["seed"]}, torch {report["torch"]}; `scripts/train_tiny_gpt2.py` reproduces it. All
settings, data hashes and the full curve: `training.json`.

| tokens | training loss (nats) | books, bits per byte | docs, bits per byte |
| --- | --- | --- | --- |
{curve}

Held-out books, by their opening line:
{books}

## A sample (temperature 0.8, top-k 50)
> {report["sample"].replace(chr(10), chr(10) + "> ")}

## Limits
It writes plausible sentences and no sense. It is an object of study, not a source of facts, and carries the prejudices of
the old books it was trained on.
"""


if __name__ == "__main__":
    main()
