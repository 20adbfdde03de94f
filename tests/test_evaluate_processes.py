"""Evaluation by several processes: one report, to the byte that of a single process, and errors that all of them raise."""

import pytest
import torch
from together import in_processes

import saelens_lite as sl
from saelens_lite import registry
from saelens_lite.errors import ConfigError, NonFiniteError, PluginError, TextError
from saelens_lite.evaluation.sums import ROUND, PooledSums, run_in_rounds
from saelens_lite.processes import team
from saelens_lite.sparsity import register
from saelens_lite.tokens import TokenRows

HOOK = "blocks.1.hook_resid_pre"


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return 3 + torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * torch.arange(1.0, d + 1)


def dictionaries(d_in: int, hook: str = "") -> list[sl.Dictionary]:
    """Return a sparse dictionary and a dense one."""
    port = sl.Port(hook=hook, width=d_in)
    return [
        sl.Dictionary.create("topk", reads=port, d_sae=512, options={"k": 3}, seed=1),
        sl.Dictionary.create("l1", reads=port, d_sae=24, seed=2),
    ]


def shown(reports: list[sl.EvalReport]) -> list[tuple[str, list[float]]]:
    return [(report.to_json(), report.density.tolist()) for report in reports]


def on_rows() -> list[list[tuple[str, list[float]]]]:
    x = normal(400, 8)
    return [
        shown(sl.evaluate(dictionaries(8), x, n_bootstrap=50, batch_tokens=30, controls=True)),
        shown(sl.evaluate(dictionaries(8), x, groups=[i // 150 for i in range(400)], n_bootstrap=50, batch_tokens=30)),
        shown(sl.evaluate(dictionaries(8), x[:2], n_bootstrap=0)),
    ]


@pytest.mark.parametrize("n", [2, 4])
def test_rows_have_the_report_of_one_process(n):
    """Two dictionaries with controls; groups larger than a batch; two rows, which are one batch."""
    torch.set_num_threads(1)
    alone = on_rows()
    for found in in_processes(n, on_rows):
        assert found == alone


def on_texts(n_tokens: int | None) -> list[list[tuple[str, list[float]]]]:
    """Return reports on three sequences and on one; given n_tokens, also on a text, with everything."""
    torch.set_num_threads(1)
    lm = sl.load_model("tiny", device="cpu")
    both = dictionaries(lm.d_model, HOOK)
    settings = {"n_bootstrap": 20, "batch_tokens": 50}
    some = torch.randint(5, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    found = [
        shown(sl.evaluate(both, lm, TokenRows(some, some > 30), **settings)),
        shown([sl.evaluate(both[1], lm, some[:1], **settings)]),
    ]
    ports = [sl.Port(hook=HOOK, width=lm.d_model, model=name) for name in ("base", "chat")]
    crosscoder = sl.Dictionary.create("topk", reads=ports, d_sae=64, options={"k": 3}, seed=3)
    found.append(shown([sl.evaluate(crosscoder, {"base": lm, "chat": lm}, some, controls=True, **settings)]))
    if n_tokens:
        settings |= {"controls": True, "by_frequency": True, "by_position": True, "text_config": sl.TextConfig(n_ctx=24)}
        found.append(shown([sl.evaluate(both[0], lm, "python-docs:held-out", n_tokens=n_tokens, **settings)]))
        if team().world > 1:
            check_errors(lm, both[0], some)
    return found


def check_errors(lm: sl.LanguageModel, d: sl.Dictionary, tokens: torch.Tensor) -> None:
    """Check that a text that one process cannot measure is an error in all of them."""
    with pytest.raises(TextError, match="no text"):
        sl.evaluate(d, lm, [""])
    with pytest.raises(ConfigError, match="different evaluations: text is"):
        sl.evaluate(d, lm, tokens + team().rank)
    weight = lm.module.get_input_embeddings().weight.data
    weight[0] += team().rank
    with pytest.raises(ConfigError, match="different settings: weights is '"):
        sl.evaluate(d, lm, tokens)
    weight[0] = 0
    lm.module.get_input_embeddings().weight.data[501] = torch.nan
    tokens[2, 7] = 501
    with pytest.raises(NonFiniteError, match="hold NaN or infinity, so nothing can be measured"):
        sl.evaluate(d, lm, tokens, batch_tokens=20, n_bootstrap=0)


@pytest.mark.parametrize(("n", "n_tokens"), [(2, 150), (4, None)])
def test_texts_have_the_report_of_one_process(n, n_tokens):
    """A text with controls and bands; three sequences, and one, of which not every process gets one."""
    before = torch.get_num_threads()
    alone = on_texts(n_tokens)
    torch.set_num_threads(before)
    for found in in_processes(n, on_texts, n_tokens):
        assert found == alone


def rounds(n_steps: list[int], bad: int | None) -> int:
    """Return the number of steps that this process runs. Process 1 fails in step `bad`."""
    done = 0

    def steps():
        nonlocal done
        for i in range(n_steps[team().rank]):
            if team().rank and i == bad:
                raise NonFiniteError("bad step")
            done += 1
            yield

    if bad is None:
        run_in_rounds(steps(), team())
    else:
        with pytest.raises(NonFiniteError, match="bad step"):
            run_in_rounds(steps(), team())
    return done


def test_processes_meet_in_rounds():
    """One with few steps waits for the other; an error stops the other one in the same round."""
    assert in_processes(2, rounds, [3, 2 * ROUND], None) == [3, 2 * ROUND]
    assert in_processes(2, rounds, [9 * ROUND, 2 * ROUND], ROUND + 5) == [2 * ROUND, ROUND + 5]


def in_three_tables() -> float:
    """Return a sum whose terms, in three tables of different columns, cancel in one order only. The last process has one."""
    sums = PooledSums(0, 0, 3)
    for rank, (other, term) in enumerate([("a", 1.0), ("b", 1e30), ("c", -1e30)]):
        if team().world == 1 or min(rank, 1) == team().rank:
            sums.weigh(torch.tensor([rank]))
            sums.add(other, torch.ones(1))
            sums.add("x", torch.tensor([term]))
    sums.pool(team())
    return float(sums["x"][0])


def test_a_sum_in_several_tables_has_one_order():
    assert in_processes(2, in_three_tables) == [in_three_tables()] * 2


def raising() -> bool:
    """Check errors that all processes see, and one that only one would see by itself."""
    x, rank = normal(64, 8), team().rank
    (d,) = dictionaries(8)[:1]
    with pytest.raises(ConfigError, match=r"different evaluations: activations is '.*' in process 0 and '.*' in process 1"):
        sl.evaluate(d, x + rank)
    with pytest.raises(ConfigError, match="different evaluations: seed is 0 in process 0 and 1 in process 1"):
        sl.evaluate(d, x, seed=rank)
    d.W_dec.data[3].add_(rank)
    with pytest.raises(ConfigError, match=r"different settings: dictionaries\.0\.weights\.W_dec is '"):
        sl.evaluate(d, x)
    (d,) = dictionaries(8)[:1]
    with pytest.raises(NonFiniteError, match="row 5"):
        sl.evaluate(d, x.index_fill(0, torch.tensor(5), torch.nan))

    @register("signed_of_rows")
    class Signed(sl.Sparsity):
        def activation(self, pre):
            return torch.where(pre > 1000, -pre, pre.relu())

    signed = sl.Dictionary.create("signed_of_rows", reads=8, d_sae=8, seed=1)
    signed.W_enc.data.copy_(torch.eye(8))
    x[40, 3] = 2000
    with pytest.raises(PluginError, match="negative code") as raised:
        sl.evaluate(signed, x, batch_tokens=8, n_bootstrap=0)
    registry.unregister("signed_of_rows")
    return bool(getattr(raised.value, "__notes__", None))


def test_an_error_of_one_process_is_raised_in_all():
    assert sorted(in_processes(2, raising)) == [False, True]
