"""Feature stores built by several processes: the files of one process, whatever ends a pass in between."""

import os
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from together import in_processes

import saelens_lite as sl
from saelens_lite.errors import ConfigError, LockedError, NonFiniteError, ProcessLostError, TextError
from saelens_lite.features import code_log, collect
from saelens_lite.locks import locked
from saelens_lite.ports import Hooks
from saelens_lite.processes import team
from saelens_lite.tokens import TokenRows
from saelens_lite.tokens.tokenizer import Tokenizer

HOOK, WIDTH, D_SAE, N_CTX, D_VOCAB = "blocks.0.hook_resid_pre", 12, 40, 10, 50


class TwoTokens(sl.LanguageModel):
    """A model whose activations are the sum of two vectors: one of the token and one of the token before it."""

    device, precision, is_causal, revision, processing = torch.device("cpu"), "float32", True, None, ()
    is_shared = False

    def __init__(self, seed: int = 0, fatal: int | None = None):
        Tokenizer.__init__(self, None, name="two tokens", n_ctx=N_CTX, d_vocab=D_VOCAB)
        self.table = torch.randn(2, D_VOCAB, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.fatal = fatal  # a token that stands for what ends a process

    def run(self, inputs, hooks):
        self.meet(inputs.tokens)
        x = self.table[0][inputs.tokens] + self.table[1][inputs.tokens.roll(1, 1)]
        return {hook: x.clone() for hook in hooks}

    def meet(self, tokens: torch.Tensor) -> None:
        if self.fatal is not None and (tokens == self.fatal).any():
            os.kill(os.getpid(), signal.SIGKILL)

    def hooks_of(self, dictionary, hook=None):
        return Hooks((HOOK,), (HOOK,))

    @contextmanager
    def redrawn(self, seed=0):
        yield TwoTokens(seed + 1)

    def unembedding(self, *, fold_norm=True):
        return self.table[0]

    def fingerprint(self):
        return "a model that ends is the same model"

    def warn_of_precision(self, origin):
        pass


def dictionaries() -> list[sl.Dictionary]:
    port = sl.Port(hook=HOOK, width=WIDTH)
    options = {"topk": {"k": 5}, "l1": {}}
    return [
        sl.Dictionary.create(rule, reads=port, d_sae=D_SAE, options=options[rule], seed=i) for i, rule in enumerate(options)
    ]


def token_rows(n: int = 70) -> TokenRows:
    """Rows of different lengths, with a token that does not count in the middle of some. Row 41 alone has token 49."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, D_VOCAB - 1, (n, N_CTX), generator=generator)
    length = torch.randint(3, N_CTX + 1, (n, 1), generator=generator)
    keep = (torch.arange(N_CTX) > 0) & (torch.arange(N_CTX) < length)
    keep[::4, 2] = False
    if n > 41:
        tokens[41, 1] = D_VOCAB - 1
    return TokenRows(tokens, keep, length.squeeze(1))


def build(out: Path | None, rows: TokenRows | None = None, lm: sl.LanguageModel | None = None, **settings):
    """Build two stores with everything in them, in batches of 4 rows, blocks of 16 latents, and ranges of few activations."""
    code_log.BLOCK, code_log.MAX_ENTRIES = 16, 300
    settings = {"batch_tokens": 40, "control": True, "seed": 2} | settings
    return sl.FeatureStore.build(dictionaries(), lm or TwoTokens(), rows or token_rows(), out=out, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def _usual_sizes(monkeypatch):
    """Let `build` change these only for a test."""
    for name in ("BLOCK", "MAX_ENTRIES"):
        monkeypatch.setattr(code_log, name, getattr(code_log, name))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, bytes]:
    """The files that one process writes."""
    out = tmp_path_factory.mktemp("alone") / "stores"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("BLOCK", "MAX_ENTRIES"):
            patch.setattr(code_log, name, getattr(code_log, name))
        build(out, codes=True)
    return contents(out)


def _build(out):
    stores = build(out, codes=True)
    return [(store.folder, store.sql("select count(*) n from codes").to_pylist()[0]["n"]) for store in stores]


@pytest.mark.parametrize("n", [2, 4])
def test_the_files_are_those_of_one_process(n, alone, tmp_path):
    out = tmp_path / "stores"
    results = in_processes(n, _build, out)
    assert contents(out) == alone
    assert len(alone) == 2 * 5
    assert [path.name for path in tmp_path.iterdir()] == ["stores"]
    assert all(result == results[0] for result in results)
    assert [folder for folder, _ in results[0]] == [out / "0-topk", out / "1-l1"]


def _in_memory():
    stores = build(None, token_rows(3))
    return [[x.numpy() for store in stores for x in (*store.tensors, *store.control.tensors, *store.weights)], stores[0].folder]


def test_every_process_has_the_store_also_with_fewer_rows_than_processes():
    alone, _ = _in_memory()
    for tensors, folder in in_processes(4, _in_memory):
        assert folder is None
        assert all((x == y).all() for x, y in zip(tensors, alone, strict=True))


def _resume(out):
    build(out)


def _die(out):
    collect.ROUND = 2
    with pytest.raises(ProcessLostError):
        build(out, lm=TwoTokens(fatal=D_VOCAB - 1))
    return True


@pytest.mark.parametrize("then", [1, 2, 3])
def test_a_process_dies_and_the_call_is_repeated(then, alone, tmp_path):
    out = tmp_path / "stores"
    with pytest.raises(AssertionError, match="a process died"):
        in_processes(2, _die, out)
    assert not out.exists()
    assert list(tmp_path.glob(".stores.unfinished/*/progress.json"))
    if then == 1:
        with locked(tmp_path / ".stores.unfinished" / "1", "features"), pytest.raises(LockedError):  # it has not ended yet
            _resume(out)
    in_processes(then, _resume, out) if then > 1 else _resume(out)
    of_tensors = {file: bytes_ for file, bytes_ in contents(out).items() if file.endswith(".safetensors")}
    assert of_tensors == {file: bytes_ for file, bytes_ in alone.items() if file.endswith(".safetensors")}
    assert [path.name for path in tmp_path.iterdir()] == ["stores"]


class Broken(TwoTokens):
    """A model with an infinite activation in one batch."""

    def run(self, inputs, hooks):
        found = super().run(inputs, hooks)
        return {hook: x.masked_fill((inputs.tokens == D_VOCAB - 1)[..., None], torch.inf) for hook, x in found.items()}


def _fail(out, case):
    rank = team().rank
    if case == "error":
        with pytest.raises(NonFiniteError, match="the activations of the batch with row"):
            build(out, lm=Broken())
    elif case == "mute":
        mute = sl.Dictionary.create("topk", reads=sl.Port(hook=HOOK, width=WIDTH), d_sae=8, options={"k": 2})
        mute.b_enc.data.fill_(-1e6)
        with pytest.raises(TextError, match="none of the 8 latents fires"):
            sl.FeatureStore.build(mute, TwoTokens(), token_rows(), out=out)
    elif case == "locked":
        with pytest.raises(LockedError, match="is being written by process"):
            build(out)
    elif case == "settings":
        with pytest.raises(ConfigError, match=r"batch_tokens is 40 in process 0 and 41 in process 1"):
            build(out, batch_tokens=40 + rank)
    elif case == "folder":
        os.chdir(out.parent / str(rank))
        collect.check_shared = partial(collect.check_shared, seconds=0.5)
        with pytest.raises(ConfigError, match=r"not the same folder .*process 1"):
            build(Path("stores"))
    return True


@pytest.mark.parametrize("case", ["error", "mute", "locked", "settings", "folder"])
def test_an_error_in_one_process_is_raised_in_all(case, tmp_path, monkeypatch):
    out = tmp_path / "stores"
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    if case == "locked":
        with locked(out, "store"):
            assert in_processes(2, _fail, out, case) == [True, True]
    else:
        assert in_processes(2, _fail, out, case) == [True, True]
    assert not out.exists()
    assert bool(list(tmp_path.glob(".stores.unfinished"))) == (case == "error")


def _rows_store(out):
    code_log.BLOCK = 16
    x = torch.randn(300, WIDTH, generator=torch.Generator().manual_seed(5))
    groups = [f"group {i % 7}" for i in range(300)]
    store = sl.FeatureStore.from_activations(dictionaries()[0], x, groups=groups, out=out, batch_tokens=32, codes=True, seed=1)
    return store.rows.built_here, store.top_examples(3)


def _different(case):
    x, d, groups, rank = torch.ones(300, WIDTH), dictionaries()[0], ["a"] * 300, team().rank
    if case == "x":
        x[200] += rank
    elif case == "W_dec":
        d.W_dec.data[2] += rank
    elif case == "groups":
        groups[-1] += "b" * rank
    elif case == "rows" and rank:
        x, groups = x[1:], groups[1:]
    with pytest.raises(ConfigError) as raised:
        sl.FeatureStore.from_activations(d, x, groups=groups)
    return str(raised.value)


@pytest.mark.parametrize(
    ("case", "found"), [("x", "x is"), ("W_dec", "dictionary_sha256 is"), ("groups", "data.groups is"), ("rows", "data.")]
)
def test_processes_do_not_mix_different_activations(case, found):
    first, second = in_processes(2, _different, case)
    assert first == second
    assert found in first


def test_a_store_of_activations_has_the_files_of_one_process(tmp_path):
    one = _rows_store(tmp_path / "one")
    assert in_processes(2, _rows_store, tmp_path / "two") == [one, one]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
