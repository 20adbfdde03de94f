"""Score explanations whose truth is known: of 64 latents, half fire on a class of tokens, and half at random.

    python scripts/comparisons/planted_explanations.py --json planted_explanations.json

The embeddings of a model are built so that 32 latents read from them whether a token belongs to a class, such as those with a
digit or the word "return", and 32 fire by position, whatever the token. The label of a planted latent is its class; that of a
random one is a class drawn at random. A judge with a rule for each class answers through a server on this computer: it is right
about what each label says, and knows nothing else. Latents come in pairs with near directions, so that each has contexts of a
nearest latent that it must be told from.

Scores of planted latents should be near 1, and those of random ones near 0.5 on average, as those of another latent's
explanation. No planted latent is better than the token baseline, because its class is one of tokens.
"""

import argparse
import json
import math
import random
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import saelens_lite as sl
from saelens_lite.features import Scores
from saelens_lite.features.explaining.quoting import read_quoted
from saelens_lite.tokens import named_text, token_rows

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from chat_server import Reply, running_chat

CLASSES = {  # labels, and patterns that match what is in a token of the class and in nothing else
    "text with a digit": r"[0-9]",
    "capital letters": r"[A-Z]",
    "the end of a sentence: a full stop": r"\.",
    "commas": r",",
    "colons": r":",
    "semicolons": r";",
    "opening parentheses": r"\(",
    "closing parentheses": r"\)",
    "opening square brackets": r"\[",
    "single quotation marks": r"'",
    "double quotation marks": r'"',
    "hyphens and minus signs": r"-",
    "underscores": r"_",
    "equals signs": r"=",
    "asterisks": r"\*",
    "line ends": r"\n",
    "backquotes": r"`",
    "slashes": r"/",
}
WORDS = (
    *("the", "of", "and", "to", "is", "in", "for", "that", "with", "or", "be", "by", "are", "as", "not", "this", "it", "from"),
    *(
        "function",
        "method",
        "value",
        "object",
        "class",
        "type",
        "string",
        "return",
        "returns",
        "statement",
        "attribute",
        "name",
    ),
)
CLASSES |= {f'the word "{word}"': rf"(?<![A-Za-z]){word}(?![A-Za-z])" for word in WORDS}
N_PLANTED, N_RANDOM = 32, 32
DENSITY = 0.02  # of random latents
FEWEST, MOST = 60, 0.1  # tokens of a class, and their share of the text
NEAR = 0.5  # cosine of a pair is 2 NEAR / (1 + NEAR²)


def fits(label: str, text: str) -> bool:
    """Return whether a text has what a label says; the words of a label may come in any order."""
    words = sorted(label.split())
    pattern = next((CLASSES[known] for known in CLASSES if sorted(known.split()) == words), None)
    return pattern is not None and re.search(pattern, text) is not None


def rule_judge(messages: list[dict[str, str]], body: dict[str, object]) -> Reply:
    """Answer a question about an explanation by the rule of its class, with log-probabilities."""
    system, user = (next(one["content"] for one in messages if one["role"] == role) for role in ("system", "user"))
    label = "".join(segment.text for segment in read_quoted(re.search(r"^Explanation: (.*)$", user, re.MULTILINE)[1]))
    lines = user.split("```jsonl\n")[1].split("\n```")[0].splitlines()
    answers = []
    for line in lines:
        segments = read_quoted(line)
        marked = [segment.text for segment in segments if segment.is_marked]
        if "whether the marked tokens" in system:
            answers.append(bool(marked) and sum(fits(label, text) for text in marked) > len(marked) / 2)
        else:
            answers.append(fits(label, "".join(segment.text for segment in segments)))
    tokens = [('{"answers": [', {'{"answers": [': 0.0})]
    for i, answer in enumerate(answers):
        tokens += [(", ", {", ": 0.0})] * (i > 0)
        digit, other = ("1", "0") if answer else ("0", "1")
        tokens.append((digit, {digit: math.log(0.8), other: math.log(0.2)}))
    tokens.append(("]}", {"]}": 0.0}))
    return Reply("".join(text for text, _ in tokens), tokens=tokens)


def planted_store(text: str, n_tokens: int, out: Path, *, n_planted: int, n_random: int, seed: int) -> sl.FeatureStore:
    """Return a labelled store of latents that fire on classes of tokens, then of as many that fire at random."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = sl.load_model("tiny").tokenizer
    d_in, generator = n_planted + n_random, torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of the weights that are not read
    module = GPT2LMHeadModel(
        GPT2Config(vocab_size=4096, n_positions=256, n_embd=d_in, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    )
    lm = sl.LanguageModel(module, tokenizer, name="planted")
    rows = token_rows(lm, named_text(text), n_ctx=256, n_tokens=n_tokens)
    labels = _frequent(lm, rows.tokens[rows.keep], n_planted)
    token, position = torch.zeros(4096, d_in), torch.zeros(256, d_in)
    for i, label in enumerate(labels):
        member = _members(lm, label)
        token[member, i] = 1 + torch.rand(int(member.sum()), generator=generator)
    token[:, n_planted:] = 0.3 * torch.randn(4096, n_random, generator=generator)
    position[:, n_planted:] = torch.randn(256, n_random, generator=generator)
    with torch.no_grad():
        module.transformer.wte.weight.copy_(token)
        module.transformer.wpe.weight.copy_(position)
    d = sl.Dictionary.create(
        "l1", reads=sl.Port(hook="blocks.0.hook_resid_pre", width=d_in), d_sae=d_in, options={}, origin=sl.Origin(n_ctx=256)
    )
    with torch.no_grad():
        d.W_enc.copy_(torch.eye(d_in))
        d.W_dec.copy_(torch.eye(d_in) + NEAR * torch.eye(d_in)[[i ^ 1 for i in range(d_in)]])
        d.b_enc.fill_(-0.5)
        d.b_enc[n_planted:] = -math.sqrt(1 + 0.3**2) * float(torch.special.ndtri(torch.tensor(1 - DENSITY)))
    settings = {"window": (5, 4), "codes": True, "group_size": 8, "n_silent": 40, "seed": seed}
    store = sl.FeatureStore.build(d, lm, rows, out=out, **settings)
    draw = random.Random(seed)
    for latent in range(d_in):
        store.label(latent, labels[latent] if latent < n_planted else draw.choice(labels))
    return store


def _members(lm: sl.LanguageModel, label: str) -> torch.Tensor:
    """Return the mask of the tokens that belong to a class."""
    return torch.tensor([re.search(CLASSES[label], word) is not None for word in lm.vocabulary])


def _frequent(lm: sl.LanguageModel, tokens: torch.Tensor, n: int) -> list[str]:
    """Return n classes that have enough tokens in a text, and are missing in enough contexts."""
    count = torch.bincount(tokens, minlength=4096)
    usable = [label for label in CLASSES if FEWEST <= int(count[_members(lm, label)].sum()) < MOST * len(tokens)]
    if len(usable) < n:
        raise SystemExit(f"only {len(usable)} classes are frequent enough in {len(tokens):,} tokens; give more text")
    return usable[:n]


def table(scores: Scores, latents: Sequence[int], title: str) -> dict[str, dict[str, float]]:
    """Print the results of some latents beside their controls, and return the means."""
    of = Scores(tuple(one for one in scores if one.latent in latents), (), scores.judge, scores.seed)
    print(f"{title}: {len(of)} scores, {sum(bool(one.not_better_than) for one in of)} not better than a control")
    means: dict[str, dict[str, float]] = {}
    for one in of.summary():
        print(f"  {one.kind:9} {one.result:30} AUROC {one.auroc!s:24} accuracy {one.balanced_accuracy!s:24} n {one.n}")
        means.setdefault(one.kind, {})[one.result] = one.auroc.value
    return means


def main() -> None:
    """Build the store, score its labels through the server, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="python-docs")
    parser.add_argument("--n-tokens", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_chat(rule_judge) as server:
        out = Path(folder)
        store = planted_store(args.text, args.n_tokens, out / "store", n_planted=N_PLANTED, n_random=N_RANDOM, seed=args.seed)
        model = sl.chat_model("rules", base_url=server.url, folder=str(out / "answers"))
        scores = store.score(model=model, seed=args.seed)
        print(scores)
        means = {
            "planted": table(scores, range(N_PLANTED), "planted"),
            "random": table(scores, range(N_PLANTED, N_PLANTED + N_RANDOM), "random"),
        }
        print(f"{server.paid.total():,} questions were asked")
    if args.json:
        args.json.write_text(json.dumps(means, indent=1))


if __name__ == "__main__":
    main()
