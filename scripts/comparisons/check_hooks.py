"""Check dictionaries that name the right hook and a wrong one, on models with random weights of three families.

    python scripts/comparisons/check_hooks.py

Dictionaries are trained on activations at a place: the MLP's or the attention's output before or after its norm, the residual
stream, the stream without its mean over d_model or with a mean norm of √d, and an MLP as a transcoder. `check_hook` then checks
each with the hook it was trained on and with wrong ones. Prints, for each claim, fvu at the place of training and at the
claimed one, and the place that fits clearly better, if any; then how many wrong claims were warned of. The exit code is 1 if a
right claim is warned of, if the place of training does not have the lowest error, or if a warning names another place.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import saelens_lite as sl
from saelens_lite.evaluation import HookCheck
from saelens_lite.tokens import TokenRows

N_VOCAB, WIDTH, N_CTX = 400, 48, 32
SIZES = {"vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
LARGE = SIZES | {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES = {
    "Gemma2": LARGE | {"num_key_value_heads": 2, "head_dim": 12},
    "Olmo2": LARGE,
    "GPT2": SIZES | {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "n_positions": N_CTX},
}
AT = "blocks.1"
STREAM, MIDDLE = f"{AT}.hook_resid_post", f"{AT}.hook_resid_mid"
AFTER_NORM = {f"{AT}.mlp.hook_out": f"{AT}.hook_mlp_out", f"{AT}.attn.hook_out": f"{AT}.hook_attn_out"}


class Case(NamedTuple):
    """A place to train at, and a claim: hooks that are read and written, and a change of the activation."""

    trained: str
    change: str
    claimed: str
    reads: str | None = None  # of a transcoder

    @property
    def right(self) -> str:
        """The place of training as `check_hook` names it."""
        spot = f"{self.trained}, {self.change}" if self.change else self.trained
        return spot if self.reads is None else f"{self.reads} → {spot}"

    @property
    def is_right(self) -> bool:
        """True if the claim is the place of training."""
        return self.claimed == self.trained and not self.change


def model(family: str) -> sl.LanguageModel:
    """Return a model with random weights. Its residual stream has a mean over d_model that differs between tokens."""
    import transformers

    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**FAMILIES[family]))
    for parameter in module.parameters():
        mean = float(parameter.detach().mean()) if parameter.ndim == 1 else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.3)
    embedding = module.get_input_embeddings().weight
    embedding.data = 0.4 * embedding + 0.6 * torch.randn(len(embedding), 1)  # the blocks contribute most of the stream
    return sl.LanguageModel(module, None, name=f"random {family}")


def token_rows(n_rows: int, seed: int = 0) -> TokenRows:
    """Return rows of random tokens with the frequencies of a text."""
    weights = 1 / torch.arange(1, N_VOCAB).float()
    tokens = 1 + torch.multinomial(weights, n_rows * N_CTX, True, generator=torch.Generator().manual_seed(seed))
    return TokenRows(tokens.reshape(n_rows, N_CTX), torch.ones(n_rows, N_CTX, dtype=torch.bool))


def cases(lm: sl.LanguageModel) -> Iterator[Case]:
    """Yield right and wrong claims for each place of a model."""
    rows = token_rows(2)
    for raw, normed in AFTER_NORM.items():
        acts = lm.run(rows, [raw, normed])
        yield Case(raw, "", raw)
        if not torch.equal(acts[raw], acts[normed]):
            yield from (Case(raw, "", normed), Case(normed, "", normed), Case(normed, "", raw))
    for claimed in (STREAM, MIDDLE, "blocks.0.hook_resid_post"):
        yield Case(STREAM, "", claimed)
    yield from (Case(STREAM, "centred", STREAM), Case(STREAM, "scaled", STREAM))
    raw, normed = next(iter(AFTER_NORM.items()))
    for claimed in (raw, normed, MIDDLE):
        if claimed == raw or not torch.equal(acts_at(lm, rows, raw), acts_at(lm, rows, claimed)):
            yield Case(raw, "", claimed, reads=f"{AT}.mlp.hook_in")


def acts_at(lm: sl.LanguageModel, rows: TokenRows, hook: str) -> torch.Tensor:
    """Return the activations at a hook, a row for each token."""
    return lm.run(rows, hook)[hook].flatten(0, 1)


def dictionary(lm: sl.LanguageModel, case: Case, rows: TokenRows, n_tokens: int = 100_000) -> sl.Dictionary:
    """Return a dictionary trained at a place, with the hooks of the claim."""
    settings = {"sparsity": "topk", "options": {"k": 8}, "d_sae": 256, "n_tokens": n_tokens, "batch_size": 1024, "lr": 3e-3}
    written = sl.Port(hook=case.claimed, width=WIDTH)
    if case.reads is not None:
        with tempfile.TemporaryDirectory() as folder:
            cache = sl.capture(lm, rows, [case.reads, case.trained], Path(folder) / "cache", dtype="float32")
            (run,) = sl.train(cache, sl.TrainConfig(hook=case.reads, writes=(case.trained,), **settings))
        run.dictionary.writes = (written,)
        return run.dictionary
    x = acts_at(lm, rows, case.trained)
    if case.change == "centred":
        x = x - x.mean(-1, keepdim=True)
    if case.change == "scaled":
        x = x * WIDTH**0.5 / x.norm(dim=-1).mean()
    d = sl.fit(x, **settings)
    d.reads = d.writes = (written,)
    return d


def fault(case: Case, check: HookCheck) -> str:
    """Return the fault of a check; "" if it has none."""
    if str(check.places[0]) != case.right:
        return f"the lowest error is at {check.places[0]}"
    if check.better and (case.is_right or str(check.better) != case.right):
        return "the warning is wrong"
    return ""


def main() -> None:
    claims = {True: 0, False: 0}
    warned, wrong = dict(claims), 0
    print(f"{'model':7} {'trained at':52} {'claimed':26} {'fvu there':>9} {'claimed':>9}  better")
    for family in FAMILIES:
        lm = model(family)
        rows, others = token_rows(2000), token_rows(60, seed=1)
        for case in cases(lm):
            check = sl.check_hook(dictionary(lm, case, rows), lm, others, n_tokens=1500)
            there = next(place for place in check.places if str(place) == case.right)
            wrong += bool(said := fault(case, check))
            claims[case.is_right] += 1
            warned[case.is_right] += check.better is not None
            print(
                f"{family:7} {case.right:52} {'right' if case.is_right else case.claimed:26} {there.fvu:9.3g} "
                f"{check.claimed.fvu:9.3g}  {check.better or '–'}{'   FAULT: ' + said if said else ''}"
            )
    print(f"right claims: {claims[True]}, warned of {warned[True]}; wrong claims: {claims[False]}, warned of {warned[False]}")
    print(f"{wrong} faults")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
