"""The last share of a training, in which KL through the model is a part of the loss."""

import copy
import itertools
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interrupted import Interrupted

import saelens_lite as sl
from saelens_lite import TrainConfig
from saelens_lite.errors import ConfigError, NonFiniteError, PluginError, Stopped, TextError
from saelens_lite.tokens import TokenRows, token_rows
from saelens_lite.training import Trainer, kl
from saelens_lite.training.feed import Feed
from saelens_lite.training.step import DenseStep

PRE1, PRE2, MLP1 = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out"
RULES = {
    "topk": {"k": 4},
    "batch_topk": {"k": 4},
    "matryoshka": {"k": 4},
    "group_max": {"k": 4},
    "l1": {"coefficient": 0.5},
    "p_anneal": {"coefficient": 0.5},
    "gated": {"coefficient": 0.5},
    "jumprelu": {"bandwidth": 0.4},
    "matching_pursuit": {"k": 3},
}
PLACES = {
    "autoencoder": {"hook": PRE2},
    "transcoder": {"hook": PRE1, "writes": (MLP1,), "skip": True},
    "crosscoder": {"reads": (PRE1, PRE2)},
}
N_CTX, D_VOCAB = 12, 50


@pytest.fixture(scope="module")
def exact_lm():
    """A small GPT-2 with random weights in float64, for token ids."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_positions": N_CTX, "n_embd": 16, "n_layer": 3, "n_head": 2}
    module = GPT2LMHeadModel(GPT2Config(vocab_size=D_VOCAB, bos_token_id=0, eos_token_id=0, **sizes))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return sl.LanguageModel(module.double(), None, name="exact")


def tokens(n: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, D_VOCAB, (n, N_CTX), generator=torch.Generator().manual_seed(seed))


def stream_of(lm, text=None, hooks=(PRE1, PRE2, MLP1), **settings):
    text = tokens() if text is None else text
    return sl.ActivationStream(lm, text, hooks, **{"buffer_tokens": 128, "batch_tokens": 60} | settings)


def config_of(rule="topk", place="autoencoder", **settings):
    usual = {"d_sae": 24, "n_tokens": 480, "batch_size": 40, "lr": 1e-2, "log_every": 100, "sparsity_warmup": 0.0}
    return TrainConfig(sparsity=rule, options=RULES[rule], **{**usual, "kl_share": 0.5, **PLACES[place], **settings})


def replaced_logits(module, token_ids, new: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a GPT-2 with activations replaced, by torch's own hooks."""
    blocks = module.transformer.h
    handles = []
    for hook, x in new.items():
        if hook == MLP1:
            handles.append(blocks[1].mlp.register_forward_hook(lambda *_, x=x: x))
        else:
            block = blocks[{PRE1: 1, PRE2: 2}[hook]]
            handles.append(block.register_forward_pre_hook(lambda _, args, x=x: (x, *args[1:])))
    try:
        return module(token_ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def activations_of(module, token_ids) -> dict[str, torch.Tensor]:
    """Return the activations at the hooks of a GPT-2, by torch's own hooks."""
    acts, blocks = {}, module.transformer.h
    handles = [
        blocks[1].register_forward_pre_hook(lambda _, args: acts.__setitem__(PRE1, args[0])),
        blocks[2].register_forward_pre_hook(lambda _, args: acts.__setitem__(PRE2, args[0])),
        blocks[1].mlp.register_forward_hook(lambda _, __, out: acts.__setitem__(MLP1, out)),
    ]
    with torch.no_grad():
        module(token_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return acts


def kl_by_hand(module, rows: TokenRows, writes, x_hat: torch.Tensor) -> torch.Tensor:
    """Return the mean of KL(clean ‖ spliced) over the positions that count; differentiable."""
    acts, widths = activations_of(module, rows.tokens), []
    widths = [acts[hook].shape[-1] for hook in writes]
    new = {}
    for hook, part in zip(writes, x_hat.split(widths, dim=1), strict=True):
        new[hook] = acts[hook].clone().masked_scatter(rows.keep[..., None], part)
    with torch.no_grad():
        log_p = module(rows.tokens, use_cache=False).logits.log_softmax(-1)[rows.keep]
    log_q = replaced_logits(module, rows.tokens, new).log_softmax(-1)[rows.keep]
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


class Watched:
    """A source that notes the rows it gives."""

    def __init__(self, source):
        self.source, self.rows = source, []

    def __getattr__(self, name):
        return getattr(self.source, name)

    def row_batches(self, *args, **settings):
        for rows in self.source.row_batches(*args, **settings):
            self.rows.append(rows)
            yield rows


@pytest.mark.parametrize("chunk", [1 << 23, 3 * D_VOCAB])
@pytest.mark.parametrize(
    ("rule", "place"), [(rule, "autoencoder") for rule in RULES] + [("topk", "transcoder"), ("jumprelu", "crosscoder")]
)
def test_the_gradient_of_the_whole_loss_is_that_of_dense_float64_autograd(exact_lm, monkeypatch, rule, place, chunk):
    monkeypatch.setattr(kl, "CHUNK_LOGITS", chunk)
    source = Watched(stream_of(exact_lm))
    trainer = Trainer(config_of(rule, place, kl_share=1.0, kl_coefficient=3.0), source)
    feed = Feed(iter(()), source, [PRE1, PRE2, MLP1], 40, seed=0)
    feed.read(0, [trainer])
    batch, divergence = feed.of(trainer)
    with torch.no_grad():
        for parameter in trainer.dictionary.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    exact = copy.deepcopy(trainer.dictionary).double()
    computed = trainer.backward(batch, None, divergence)

    step = computed.step
    dense = DenseStep(
        exact, step.x.double(), step.target.double(), dead=step.dead, progress=step.progress, warmup=1.0,
        coefficient=None if step.coefficient is None else step.coefficient,
    )  # fmt: skip
    losses = dense.losses()
    scales = torch.cat([torch.full((16,), 1 / scale, dtype=torch.float64) for scale in trainer.target_scales])
    (rows,) = source.rows
    true_kl = kl_by_hand(exact_lm.module, rows, trainer.hooks.writes, dense.x_hat * scales)
    mse = losses.pop("mse")
    ((mse + 3 * (mse / true_kl).detach() * true_kl) / 4 + sum(losses.values())).backward()

    assert computed.losses["kl"].item() == pytest.approx(true_kl.item(), rel=1e-5)
    assert computed.losses["loss"].item() == pytest.approx((mse + sum(losses.values())).item(), rel=1e-4)
    for (name, ours), theirs in zip(trainer.dictionary.named_parameters(), exact.parameters(), strict=True):
        wanted = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        got = torch.zeros_like(ours) if ours.grad is None else ours.grad
        error = (got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-2)
        assert error <= 1e-4, f"gradient of {name}: relative error {error:.2e}"


def test_kl_alone_moves_each_parameter(exact_lm):
    """KL reaches encoder and decoder: the gradients are not those of mse."""
    trainer = Trainer(config_of(kl_share=1.0, kl_coefficient=1e6), source := stream_of(exact_lm))
    feed = Feed(iter(()), source, [PRE1, PRE2, MLP1], 40, seed=0)
    feed.read(0, [trainer])
    batch, divergence = feed.of(trainer)
    gradients = []
    for given in (divergence, None):
        trainer.backward(batch, None, given)
        gradients.append({name: p.grad.clone() for name, p in trainer.dictionary.named_parameters()})
    for name in ("W_enc", "W_dec", "b_dec"):
        assert F.cosine_similarity(*(g[name].flatten() for g in gradients), dim=0).abs() < 0.9
        assert gradients[0][name].norm() > 1e-3


def test_positions_that_do_not_count_keep_their_activation(exact_lm):
    rows = TokenRows(tokens(4), (torch.arange(N_CTX) > 0) & (tokens(4) % 3 > 0))
    model = kl.ModelOnRows(exact_lm, (PRE2,))
    model.prepare((PRE2,))
    x = model.read(rows)[PRE2]
    seen = []
    handle = exact_lm.module.transformer.h[2].ln_1.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x_hat = torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)
    model.divergence((PRE2,))(x_hat)
    handle.remove()
    clean = activations_of(exact_lm.module, rows.tokens)[PRE2]
    torch.testing.assert_close(seen[0][~rows.keep], clean[~rows.keep])
    torch.testing.assert_close(seen[0][rows.keep], x_hat)


def test_no_change_gives_no_kl_and_no_gradient(exact_lm):
    rows = TokenRows(tokens(4), torch.ones(4, N_CTX, dtype=torch.bool))
    model = kl.ModelOnRows(exact_lm, (PRE2,))
    model.prepare((PRE2,))
    x = model.read(rows)[PRE2].requires_grad_()
    value = model.divergence((PRE2,))(x)
    value.backward()
    assert value.abs() < 1e-12
    assert x.grad.abs().max() < 1e-12


@pytest.mark.parametrize("place", PLACES)
def test_kl_is_that_of_the_evaluation(random_lm, documents, place):
    """The same dictionary on the same rows: KL of a step is kl_sae of the report."""
    rows = token_rows(random_lm, documents, n_ctx=24, n_tokens=300)
    source = Watched(sl.ActivationStream(random_lm, rows, [PRE1, PRE2, MLP1]))
    trainer = Trainer(config_of(place=place, kl_share=1.0, batch_size=1000), source)
    feed = Feed(iter(()), source, [PRE1, PRE2, MLP1], 1000, seed=0)
    feed.read(0, [trainer])
    batch, divergence = feed.of(trainer)
    d = trainer.result()
    value = divergence(d(torch.cat([batch[hook] for hook in trainer.hooks.reads], dim=1)))
    (given,) = source.rows
    assert given.n_kept == rows.n_kept
    assert value.item() == pytest.approx(sl.evaluate(d, random_lm, rows)["kl_sae"], rel=1e-4)


# --- the rows ----------------------------------------------------------------------------------------------------------------


def positions_of(batches) -> list[tuple[int, ...]]:
    """Return the token ids of each row at the positions that count."""
    return [tuple(row[keep].tolist()) for rows in batches for row, keep in zip(rows.tokens, rows.keep, strict=True)]


def test_each_row_comes_once_an_epoch_in_the_order_of_the_seed(exact_lm):
    n = 11 * 40  # position 0 does not count
    batches = list(itertools.islice(stream_of(exact_lm).row_batches(40, seed=1), 28))
    assert {rows.n_kept for rows in batches} == {
        33,
        11,
    }  # three rows of eleven, or the last one of the text
    one = positions_of(batches[:14])
    assert len(one) * 11 == n
    assert sorted(one) == sorted(tuple(row) for row in tokens()[:, 1:].tolist())
    assert one != sorted(one)
    assert sorted(positions_of(batches[14:])) == sorted(one)
    assert positions_of(batches[14:]) != one

    def beginning(source, seed=1, start=0):
        return positions_of(itertools.islice(source.row_batches(40, seed=seed, start=start), 5))

    assert beginning(stream_of(exact_lm, buffer_tokens=64, hooks=[PRE1])) == one[:15]
    assert beginning(stream_of(exact_lm), seed=2) != one[:15]
    assert beginning(stream_of(exact_lm), start=3) == one[9:24]


def test_rows_that_were_read_or_held_out_are_left_out(exact_lm):
    held, rest = stream_of(exact_lm).hold_out(30)
    batches = positions_of(itertools.islice(rest.row_batches(440, seed=0), 1))
    assert len(batches) == 40 - 3
    whole = stream_of(exact_lm)
    kept = {tuple(x.tolist()) for x in whole._pieces(0).__next__()[PRE1][:30]}
    assert kept == {tuple(x.tolist()) for x in held.x[PRE1]}
    first_rows = set(positions_of(itertools.islice(whole.row_batches(440, seed=0), 1))) - set(batches)
    assert len(first_rows) == 3
    later = positions_of(itertools.islice(whole.row_batches(440, seed=0, skip=100), 1))
    assert len(later) == 40 - 10  # one row of the ten is read in part
    assert set(later) < set(batches)
    everything = positions_of(itertools.islice(whole.row_batches(440, seed=0, skip=440), 1))
    assert len(everything) == 40  # the next epoch


def test_a_row_that_is_longer_than_a_batch_is_a_batch(exact_lm):
    (rows,) = itertools.islice(stream_of(exact_lm).row_batches(4, seed=0), 1)
    assert rows.tokens.shape == (1, N_CTX)
    (run,) = sl.train(stream_of(exact_lm), config_of(n_tokens=100, batch_size=4))
    assert run.history[-1]["tokens"] == 52 + 5 * 11


def test_a_text_whose_rows_are_all_held_out_is_refused(exact_lm):
    _, rest = stream_of(exact_lm, text=tokens(1)).hold_out(5)
    with pytest.raises(TextError, match="no whole row is left"):
        next(rest.row_batches(40, seed=0))


# --- the phase in a training -------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class InterruptedRows(Interrupted):
    """A source that is interrupted at a batch of rows."""

    def hold_out(self, n_tokens):
        held, rest = self.source.hold_out(n_tokens)
        return held, InterruptedRows(rest, self.at)

    def batches(self, *args, **settings):
        return self.source.batches(*args, **settings)

    def row_batches(self, *args, start=0, **settings):
        for number, rows in enumerate(self.source.row_batches(*args, start=start, **settings), start):
            if number == self.at:
                signal.raise_signal(self.number)
            yield rows


TOGETHER = [
    config_of(),
    config_of("l1", seed=2),
    config_of("gated", "transcoder", kl_share=0.25),
    config_of("jumprelu", kl_share=0, n_tokens=320),
]


@pytest.mark.parametrize(
    "stops", [[(Interrupted, 3)], [(InterruptedRows, 0)], [(Interrupted, 2), (InterruptedRows, 2)]], ids=str
)
def test_an_interrupted_run_gives_the_same_bytes(exact_lm, tmp_path, stops):
    sl.train(stream_of(exact_lm), TOGETHER, tmp_path / "alone", validation_tokens=30)
    out = tmp_path / "run"
    for i, (kind, at) in enumerate(stops):
        source = kind(stream_of(exact_lm), at)
        with pytest.raises(Stopped):
            sl.resume(out, source) if i else sl.train(source, TOGETHER, out, validation_tokens=30)
    sl.resume(out, stream_of(exact_lm))
    assert contents(out) == contents(tmp_path / "alone")


def test_each_dictionary_is_what_it_is_alone(exact_lm, tmp_path):
    together = sl.train(stream_of(exact_lm), TOGETHER, tmp_path / "together")
    for i, (config, run) in enumerate(zip(TOGETHER, together, strict=True)):
        (alone,) = sl.train(stream_of(exact_lm), config, tmp_path / str(i))
        for name in ("config.toml", "log.jsonl"):
            assert (alone.folder / name).read_bytes() == (run.folder / name).read_bytes()
        assert contents(alone.folder / "dictionary") == contents(run.folder / "dictionary")


def test_the_log_has_kl_from_the_phase_on(exact_lm, tmp_path):
    (run,) = sl.train(stream_of(exact_lm), config_of(kl_coefficient=2.0), tmp_path / "run", validation_tokens=30)
    lines = list(run.history)
    before, after = ([line for line in lines if ("kl" in line) is given] for given in (False, True))
    assert before[-1]["tokens"] == 240  # the line before the phase has the means of all steps before it
    assert before[-1]["step"] == 6
    assert all(line["loss"] == pytest.approx(line["mse"], rel=1e-4) for line in lines)  # topk has no loss of its own
    assert after[-1]["tokens"] >= 480
    assert after[-1]["kl"] > 0
    assert "val_fvu" in after[-1]
    assert after[0]["lr"] > after[-1]["lr"]
    settings = sl.load(tmp_path / "run").training_record["config"]
    assert (settings["kl_share"], settings["kl_coefficient"]) == (0.5, 2.0)
    assert "kl_share = 0.5" in (tmp_path / "run" / "config.toml").read_text()


def test_settings_without_kl_are_as_before():
    assert not [key for key in TrainConfig(kl_share=0, kl_coefficient=2.0).model_dump(mode="json") if key.startswith("kl_")]


def test_a_run_may_be_extended_within_its_phase(exact_lm, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        sl.train(InterruptedRows(stream_of(exact_lm), 1), config_of(), out)
    (run,) = sl.resume(out, stream_of(exact_lm), n_tokens=2000)
    lines = [line for line in run.history if line["tokens"] > 500]  # the first one also has the steps before the interruption
    before, after = ([line for line in lines if ("kl" in line) is given] for given in (False, True))
    assert max(line["tokens"] for line in before) == run.dictionary.training_record["kl_after"]
    assert min(line["tokens"] for line in after) > 1000
    assert run.dictionary.training_record["kl_after"] == pytest.approx(1000, abs=20)
    assert run.history[-1]["tokens"] >= 2000


def test_a_run_that_stays_in_its_phase_reads_the_next_rows(exact_lm, tmp_path):
    with pytest.raises(Stopped):
        sl.train(InterruptedRows(stream_of(exact_lm), 3), config_of(n_tokens=480), tmp_path / "run")
    (run,) = sl.resume(tmp_path / "run", stream_of(exact_lm), n_tokens=500)
    (whole,) = sl.train(stream_of(exact_lm), config_of(n_tokens=480), tmp_path / "whole")
    records = [one.dictionary.training_record for one in (run, whole)]
    assert [record["kl_after"] for record in records] == [240, 240]
    assert records[0]["tokens"] >= 500


def test_an_extended_run_that_is_interrupted_gives_the_same_bytes(exact_lm, tmp_path):
    for name in ("run", "alone"):
        with pytest.raises(Stopped):
            sl.train(InterruptedRows(stream_of(exact_lm), 1), config_of(), tmp_path / name)
    with pytest.raises(Stopped):
        sl.resume(tmp_path / "run", InterruptedRows(stream_of(exact_lm), 3), n_tokens=1000)
    sl.resume(tmp_path / "run", stream_of(exact_lm))
    sl.resume(tmp_path / "alone", stream_of(exact_lm), n_tokens=1000)
    assert contents(tmp_path / "run") == contents(tmp_path / "alone")


def test_dictionaries_with_different_kl_are_extended_one_at_a_time(exact_lm, tmp_path):
    sl.train(stream_of(exact_lm), [config_of(kl_share=0), config_of()], tmp_path / "run")
    with pytest.raises(ConfigError, match=r"kl_share makes batches of whole rows.*one at a time: .*0-topk, .*1-topk"):
        sl.resume(tmp_path / "run", stream_of(exact_lm), n_tokens=2000)
    (run,) = sl.resume(tmp_path / "run" / "1-topk", stream_of(exact_lm), n_tokens=2000)
    end = next(line["tokens"] for line in run.history if line["tokens"] >= 480)
    assert run.dictionary.training_record["kl_after"] == pytest.approx((end + 2000) / 2, abs=21)


@pytest.mark.parametrize(
    ("n_tokens", "batch_size", "share", "after"),
    [(4000, 900, 0.05, 3600), (4000, 900, 1e-6, 3600), (480, 40, 0.29, 360), (480, 40, 0.3, 320), (480, 40, 1.0, 0)],
)
def test_the_phase_begins_at_the_nearest_batch(exact_lm, n_tokens, batch_size, share, after):
    """Even the smallest share has a step. 0.29 of 480 tokens begin after 340.8, 0.3 after 336."""
    (run,) = sl.train(stream_of(exact_lm), config_of(n_tokens=n_tokens, batch_size=batch_size, kl_share=share))
    assert run.dictionary.training_record["kl_after"] == after
    assert "kl" in run.history[-1]


def test_closing_a_feed_closes_the_text(exact_lm):
    is_open = []

    def watched(rows):
        is_open.append(True)
        try:
            yield from rows
        finally:
            is_open.pop()

    source = stream_of(exact_lm)
    source._read_pools, read_pools = lambda *args: watched(read_pools(*args)), source._read_pools
    trainer = Trainer(config_of(kl_share=1.0), source)
    feed = Feed(iter(()), source, [PRE1, PRE2, MLP1], 40, seed=0)
    feed.read(0, [trainer])
    assert is_open == [True]
    feed.close()
    assert is_open == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_lr": 0.1}, "^TrainConfig: kl_lr without kl_share"),
        ({"kl_coefficient": 2.0, "kl_lr": 0.1}, "kl_coefficient and kl_lr without kl_share"),
        ({"kl_share": 0.1, "kl_lr": 11.0}, "kl_lr = 11.0: "),
        ({"kl_share": 0.1, "kl_coefficient": 1e7}, "kl_coefficient = 10000000.0: "),
        ({"hook": PRE1, "reads": (PRE2,)}, "^TrainConfig: hook = .* contradict each other"),
    ],
)
def test_settings_that_do_nothing_or_are_too_large_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_kl_falls_when_a_dictionary_of_another_tool_is_tuned(lm, tmp_path):
    """A dictionary in another tool's format, trained with KL alone, comes nearer to the model's predictions."""
    text = "python-docs:train"
    (run,) = sl.train(
        sl.ActivationStream(lm, text, PRE2), TrainConfig(options={"k": 8}, d_sae=128, n_tokens=4000, batch_size=256, lr=3e-3)
    )
    theirs = sl.load(sl.convert(run.dictionary.save(tmp_path / "own"), tmp_path / "theirs", "sparsify"))
    assert "read_from" in theirs.training_record
    config = TrainConfig(n_tokens=4000, batch_size=512, kl_share=1.0, kl_lr=1.0, lr=1e-3, hook=PRE2)
    (tuned,) = sl.train(sl.ActivationStream(lm, text, PRE2), config, start_from=theirs)
    before, after = (sl.evaluate(d, lm, "python-docs:held-out", n_tokens=1000, hook=PRE2) for d in (theirs, tuned.dictionary))
    assert after["kl_sae"] < 0.95 * before["kl_sae"]
    assert after["l0"] == pytest.approx(before["l0"], rel=0.01)


# --- refusals ----------------------------------------------------------------------------------------------------------------


def test_sources_without_rows_are_refused(cache, tmp_path):
    with pytest.raises(
        ConfigError, match=r"kl_share = 0.5 runs the model on whole token rows, and ActivationCache has only act"
    ):
        sl.train(cache, config_of(hook="blocks.1.hook_resid_pre"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"TensorSource has only activations; train on a text: sl.ActivationStream\(lm, text"):
        sl.fit(torch.randn(100, 8), d_sae=16, n_tokens=100, kl_share=0.1, k=2)


def test_several_models_are_refused(exact_lm):
    source = sl.ActivationStream({"base": exact_lm, "chat": exact_lm}, tokens(), [PRE2])
    for hook in (f"base:{PRE2}", f"chat-base:{PRE2}"):
        with pytest.raises(ConfigError, match=r"kl_share = 0\.5"):
            sl.train(source, config_of(hook=hook))


def test_a_target_before_the_input_is_refused(exact_lm):
    with pytest.raises(sl.errors.HookError, match="the model computes"):
        sl.train(stream_of(exact_lm), config_of(hook=PRE2, writes=(PRE1,)))


def test_a_model_that_reads_ahead_is_refused(exact_lm, monkeypatch):
    monkeypatch.setitem(exact_lm.__dict__, "is_causal", False)
    with pytest.raises(ConfigError, match=r"kl_share = 0.5, which compares predictions of the next token, needs a model that"):
        sl.train(stream_of(exact_lm), config_of())


def test_a_loss_of_a_rule_must_not_be_called_kl(exact_lm):
    class Named(sl.Sparsity):
        def activation(self, pre):
            return pre.relu()

        def losses(self, step):
            return {"kl": step.mean(step.codes.value)}

    sl.register("named_kl")(Named)
    try:
        with pytest.raises(PluginError, match="the rule named_kl calls a loss 'kl'"):
            sl.train(stream_of(exact_lm), TrainConfig(sparsity="named_kl", hook=PRE2, d_sae=24, n_tokens=80, kl_share=1.0))
    finally:
        sl.registry.unregister("named_kl")


def test_a_kl_that_is_not_finite_stops_training(exact_lm, monkeypatch):
    monkeypatch.setattr(kl, "_kl_and_slope", lambda new, *_: (new.new_tensor(torch.nan), torch.zeros_like(new)))
    monkeypatch.setattr(kl, "_try_out", lambda *_: None)
    with pytest.raises(NonFiniteError, match=r"the loss \(kl\) became NaN"):
        sl.train(stream_of(exact_lm), config_of())


def test_the_command_says_what_it_needs(cache_folder, command):
    code, _, err = command("train", cache_folder, "--hook", PRE1, "--kl-share", "0.1", "--out", "x")
    assert code == 2
    assert "kl_share = 0.1 runs the model on token rows, which a cache does not hold; give --text and --model" in err
    code, out, _ = command("train", "--help")
    assert "--kl-share" in out
    assert "--kl-coefficient" in out
