"""A stream that several processes share gives the batches, statistics and records of one process, with a share of the work."""

import itertools

import pytest
import torch
from together import in_processes

import saelens_lite as sl
from saelens_lite.cache.dealt import dealt_activations
from saelens_lite.cache.resumed import tensor_hash
from saelens_lite.errors import ConfigError
from saelens_lite.processes import team
from saelens_lite.tokens import RowHash, TokenRows

HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.mlp.hook_post"]


def _facts(dtype: str, words: str = "") -> dict:
    """Return the batches of a stream of two short epochs and more, and how many positions the model was run on."""
    lm, n_run = sl.load_model("tiny", device="cpu", dtype=dtype), [0]
    whole = lm.run

    def run(rows, hooks):
        n_run[0] += rows.n_kept
        return whole(rows, hooks)

    lm.run = run
    text = ["a b c d e f g h i j k l m n o p q r s t u v w x y z " * 6, "It was the best of times. " * 40, words]
    config = sl.TextConfig(n_ctx=24)
    stream = sl.ActivationStream(lm, [t for t in text if t], HOOKS, text_config=config, buffer_tokens=200, batch_tokens=48)
    held, rest = stream.hold_out(30)
    facts = {"held out": held.record(), "mean": rest.statistics(HOOKS[0]).mean.tolist()}
    for start in (0, 7):
        batches = list(itertools.islice(rest.batches(HOOKS, 64, seed=2, start=start), 24))
        facts[f"from {start}"] = [tensor_hash(batch[hook]) for batch in batches for hook in HOOKS]
    parts = [next(iter(rest.batches(HOOKS, 64, seed=2, rank=rank, world=2))) for rank in range(2)]
    facts["halves"] = tensor_hash(torch.cat([part[HOOKS[0]] for part in parts]))
    facts["whole"] = facts["from 0"][0]
    facts["record"] = rest.record()
    return {"facts": facts, "n_run": n_run[0]}


@pytest.mark.parametrize(("n", "dtype"), [(2, "float32"), (3, "bfloat16")])
def test_several_processes_give_the_batches_of_one(n, dtype):
    alone, *others = (_facts(dtype), *in_processes(n, _facts, dtype))
    assert alone["facts"]["halves"] == alone["facts"]["whole"]
    for found in others:
        assert found["facts"] == alone["facts"]
        assert found["n_run"] < alone["n_run"] * (1 / n + 0.15)  # the last batches of an epoch are run by all


def _differ() -> None:
    with pytest.raises(ConfigError, match=r"different texts: SHA-256 of the token rows is '\w+' in process 0 and '\w+' in"):
        _facts("float32", "It was the worst of times. " * 40 * (1 + team().rank))


def test_processes_that_read_different_texts_are_refused():
    assert in_processes(2, _differ) == [None, None]


def _longer(n_extra: int) -> None:
    lm = sl.load_model("tiny", device="cpu", dtype="float32")
    tokens = torch.arange(48).reshape(8, 6)
    rows = TokenRows(tokens, torch.ones_like(tokens, dtype=torch.bool))
    blocks = [rows, rows] + [rows[:n_extra]] * team().rank
    with pytest.raises(ConfigError, match="different texts: "):
        list(dealt_activations(lm, blocks, HOOKS, 6, 0, RowHash(), team()))


@pytest.mark.parametrize("n_extra", [1, 2, 3])
def test_processes_whose_texts_differ_in_length_are_refused(n_extra):
    """Only at the end, and also where one has a batch for each process and the other has none."""
    assert in_processes(2, _longer, n_extra) == [None, None]
