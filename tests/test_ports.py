"""Ports: crosscoders over several hooks of one model, and dictionaries of format 1, which names hooks in the origin."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

import saelens_lite as sl
from saelens_lite.cache import TensorSource
from saelens_lite.errors import ConfigError, CorruptFileError, Stopped
from saelens_lite.hub.card import write_card
from saelens_lite.tokens import token_rows
from saelens_lite.training import Trainer
from saelens_lite.training.step import SparseStep

ROOT = Path(__file__).parents[1]
RULES = {
    "l1": {},
    "topk": {"k": 2},
    "gated": {},
    "batch_topk": {"k": 2},
    "jumprelu": {},
    "matryoshka": {"k": 2, "prefixes": (0.5,)},
    "p_anneal": {},
    "group_max": {"k": 2},
    "matching_pursuit": {"k": 2},
}
FIRST, SECOND = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
TEXTS = ["The old man said that he would not go.", "It was the best of times, it was the worst of times"]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(d: sl.Dictionary) -> sl.Dictionary:
    for seed, parameter in enumerate(d.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=seed) * (0.3 if parameter.ndim == 1 else 1))
    if d.rule.tied:
        d.rule.after_step(d)
    return d


def ports(*widths: int, hooks: tuple[str, ...] = (FIRST, SECOND)) -> tuple[sl.Port, ...]:
    return tuple(sl.Port(hook=hook, width=width) for hook, width in zip(hooks, widths, strict=True))


# Folders of format 1


def older(folder: Path) -> Path:
    """Rewrite a folder in format 1: hooks are in the origin, and a key says whether it is a transcoder."""
    config = json.loads((folder / "cfg.json").read_text())
    ours = config["metadata"]["saelens_lite"]
    (reads,), writes = ours.pop("reads"), ours.pop("writes")
    ours["origin"] |= {"hook": reads["hook"], "target_hook": writes[0]["hook"] if writes else None}
    ours |= {"format": 1, "transcoder": writes is not None}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("rule", "across", "skip"), [*((rule, False, False) for rule in RULES), ("topk", True, False), ("topk", True, True)]
)
def test_format_1_gives_the_same_codes_and_outputs(rule, across, skip, tmp_path):
    reads, writes = ports(4, 5)
    made = {"reads": reads, "writes": writes if across else None, "skip": skip, "d_sae": 6, "options": RULES[rule]}
    d, x = randomised(sl.Dictionary.create(rule, **made)), normal(20, 4, seed=50)
    loaded = sl.Dictionary.load(older(d.save(tmp_path / "d")))
    assert torch.equal(loaded.encode(x).to_dense(), d.encode(x).to_dense())
    assert torch.equal(loaded(x), d(x))
    assert (loaded.ports, loaded.origin) == (d.ports, d.origin)


@pytest.mark.parametrize(
    "change",
    [
        {"transcoder": "yes"},
        {"transcoder": True},
        {"origin": {"hook": ["a"]}},
        {"origin": {"hook": FIRST, "target_hook": SECOND}},
        {"origin": 7},
        {"format": 3},
        {"reads": []},
    ],
)
def test_a_damaged_folder_of_format_1_is_refused(change, tmp_path):
    folder = older(sl.Dictionary.create("topk", reads=ports(4, 4)[0], d_sae=6, options={"k": 2}).save(tmp_path / "d"))
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["saelens_lite"] |= change
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match=r"cfg\.json"):
        sl.Dictionary.load(folder)


def test_only_code_that_reads_older_files_uses_the_old_names():
    files = {
        str(path.relative_to(ROOT))
        for folder in ("saelens_lite", "plugins")
        for path in (ROOT / folder).rglob("*.py")
        if re.search("is_transcoder|target_hook", path.read_text(encoding="utf-8"))
    }
    readers = {"dictionary/folder.py", "config.py", "features/info.py", "settings_file.py", "training/run.py"}
    assert files <= {f"saelens_lite/{name}" for name in readers}


# Training


def planted(n: int) -> TensorSource:
    """Return activations at two hooks of different width, which decode the same sparse codes with different directions."""
    codes = (torch.rand(n, 16, generator=torch.Generator().manual_seed(1)) < 0.15) * (0.5 + normal(n, 16, seed=2).abs())
    widths = {"a": 10, "b": 7}
    return TensorSource(
        {hook: codes @ normalize(normal(16, d, seed=d), dim=1) * d + 3 * normal(d, seed=20 + d) for hook, d in widths.items()}
    )


def settings(**more) -> sl.TrainConfig:
    common = {"d_sae": 40, "n_tokens": 40_000, "batch_size": 256, "lr": 1e-2, "options": {"k": 4}}
    return sl.TrainConfig(reads=("a", "b"), **common | more)


def fvu(d: sl.Dictionary, source: TensorSource) -> float:
    x = torch.cat([source.x[port.hook] for port in d.reads], dim=1)
    with torch.no_grad():
        return float((x - d(x)).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("rule", ["l1", "topk"])
def test_a_step_has_the_losses_and_gradients_of_the_dense_formula(rule):
    """x is the activations of both ports concatenated; the penalty uses the sum over the ports of a direction's norms."""
    options = {"l1": {"coefficient": 0.7}, "topk": {"k": 3}}[rule]
    d = randomised(sl.Dictionary.create(rule, reads=ports(5, 3), d_sae=12, options=options)).double().train()
    x = normal(30, 8, seed=40).double()
    step = SparseStep(d, x, dead=torch.zeros(12, dtype=torch.bool), progress=0.5, warmup=0.5)
    losses = step.losses()
    sum(losses.values()).backward()
    W_enc, b_enc, W_dec, b_dec = (p.detach().clone().requires_grad_() for p in (d.W_enc, d.b_enc, d.W_dec, d.b_dec))
    codes = ((x - b_dec) @ W_enc + b_enc).relu()
    if rule == "topk":
        codes = codes * torch.zeros_like(codes).scatter(1, codes.topk(3, dim=1).indices, 1.0)
    wanted = {"mse": (codes @ W_dec + b_dec - x).square().sum() / 30}
    if rule == "l1":
        norms = W_dec[:, :5].norm(dim=1) + W_dec[:, 5:].norm(dim=1)
        wanted["l1"] = 0.5 * 0.7 * (codes * norms).sum() / 30
    sum(wanted.values()).backward()
    for name, loss in wanted.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-9, atol=1e-9)
    for own, theirs in ((d.W_enc, W_enc), (d.b_enc, b_enc), (d.W_dec, W_dec), (d.b_dec, b_dec)):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_a_crosscoder_learns_and_loads_to_the_same_bits(tmp_path):
    source = planted(4096)
    (run,) = sl.train(source, settings(), tmp_path / "run")
    d = run.dictionary
    assert fvu(d, source) < 0.25
    assert (d.d_in, d.d_out, d.writes_what_it_reads) == (17, 17, True)
    loaded, x = sl.Dictionary.load(tmp_path / "run/dictionary"), torch.cat(list(source.x.values()), dim=1)
    assert (loaded.reads, loaded.writes) == (d.reads, d.writes)
    assert torch.equal(loaded(x), d(x))
    assert json.loads((tmp_path / "run/dictionary/cfg.json").read_text())["architecture"] == "topk_crosscoder"


def test_an_interrupted_crosscoder_ends_at_the_same_bytes(tmp_path, monkeypatch):
    source, real = planted(1024), Trainer.step
    config = settings(n_tokens=4096)
    (whole,) = sl.train(source, config, tmp_path / "whole")

    def step(self, batch, *more):
        real(self, batch, *more)
        if self.n_steps == 6:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(Stopped):
            sl.train(source, config, tmp_path / "stopped")
    (resumed,) = sl.resume(tmp_path / "stopped", source)
    for name, value in whole.dictionary.state_dict().items():
        assert torch.equal(resumed.dictionary.state_dict()[name], value), name


def test_matching_pursuit_reads_one_port():
    with pytest.raises(ConfigError, match="matching_pursuit encodes with W_decᵀ, so it must write the one port that it reads"):
        sl.train(planted(64), settings(sparsity="matching_pursuit", n_tokens=256))


# In a model


@pytest.fixture(scope="module")
def crosscoder(random_lm):
    """A crosscoder over two hooks of the random model."""
    d = sl.Dictionary.create("topk", reads=ports(48, 48), d_sae=96, options={"k": 6}, seed=3)
    d.b_dec.data.copy_(normal(96, seed=4) * 0.1)
    return d


def both(lm, rows) -> torch.Tensor:
    acts = lm.run(rows, [FIRST, SECOND])
    return torch.cat([acts[FIRST], acts[SECOND]], dim=-1)


def logits_with(lm, rows, new: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Return the logits when torch hooks replace the outputs of two modules by the parts of `new`."""
    first, second = (part.clone() for part in new.split(48, dim=-1))

    def put(part):
        def act(_module, _args, out):
            y = out[0] if isinstance(out, tuple) else out
            y = torch.where(keep[..., None], part, y)
            return (y, *out[1:]) if isinstance(out, tuple) else y

        return act

    blocks = lm.module.transformer.h
    handles = [blocks[0].register_forward_hook(put(first)), blocks[1].mlp.register_forward_hook(put(second))]
    try:
        return lm.logits(rows)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_a_splice_replaces_all_ports_by_the_reconstruction_of_a_clean_pass(random_lm, crosscoder):
    rows = random_lm.to_tokens(TEXTS)
    x = both(random_lm, rows)
    wanted = logits_with(random_lm, rows, crosscoder(x), rows.keep)
    with random_lm.splice(crosscoder, keep=rows.keep):
        torch.testing.assert_close(random_lm.logits(rows), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, random_lm.logits(rows), atol=1e-2)
    changed = x + 5.0 * crosscoder.W_dec[7]  # added to the code, with the error term
    with random_lm.splice(crosscoder, [sl.Add(7, 5.0)], keep=rows.keep):
        acts = random_lm.run(rows, ["blocks.1.hook_resid_pre", SECOND])
    torch.testing.assert_close(acts["blocks.1.hook_resid_pre"][rows.keep], changed[rows.keep][:, :48], rtol=1e-4, atol=1e-4)


def test_a_splice_of_several_hooks_generates_without_a_cache(random_lm, crosscoder):
    with random_lm.splice(crosscoder):
        text = random_lm.generate("The old man", 8, temperature=0)
        tokens = random_lm.to_tokens("The old man").tokens
        for _ in range(8):
            tokens = torch.cat([tokens, random_lm.logits(tokens)[:, -1:].argmax(-1)], dim=1)
        assert text == random_lm.tokenizer.decode(tokens[0, 1:])
        cached = random_lm.module(tokens[:, :4], use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="needs the whole row; run the model without a cache"):
            random_lm.module(tokens[:, 4:5], past_key_values=cached, use_cache=True)


@torch.no_grad()
def test_evaluation_covers_all_ports_together(random_lm, crosscoder):
    rows = token_rows(random_lm, TEXTS * 8, n_ctx=12, n_tokens=80)
    report = sl.evaluate(crosscoder, random_lm, rows, n_bootstrap=5)
    x, keep = both(random_lm, rows), rows.keep
    error = (x - crosscoder(x))[keep].double().square().sum()
    assert report["fvu"] == pytest.approx(float(error / (x[keep].double() - x[keep].double().mean(0)).square().sum()), rel=1e-5)
    log_p = logits_with(random_lm, rows, crosscoder(x), keep).double().log_softmax(-1)
    places = [(s, t) for s, t in keep.nonzero().tolist() if t + 1 < keep.shape[1]]  # rows end their texts: EOS is predicted too
    ce = torch.stack([-log_p[s, t, rows.tokens[s, t + 1]] for s, t in places]).mean()
    assert report["ce_sae"] == pytest.approx(float(ce), rel=1e-4)
    assert f"{FIRST} + {SECOND}" in str(report)


@torch.no_grad()
def test_evaluation_of_two_hooks_that_are_read_and_one_of_them_written(random_lm):
    d = sl.Dictionary.create("topk", reads=ports(48, 48), writes=ports(48, 48)[1], d_sae=96, options={"k": 6}, seed=3)
    rows = token_rows(random_lm, TEXTS * 8, n_ctx=12, n_tokens=80)
    report = sl.evaluate(d, random_lm, rows, n_bootstrap=5)
    x, keep = both(random_lm, rows), rows.keep
    y = x[keep][:, 48:].double()
    error = (y - d(x)[keep].double()).square().sum()
    assert report["fvu"] == pytest.approx(float(error / (y - y.mean(0)).square().sum()), rel=1e-5)


def test_attribution_is_the_slope_over_all_ports(random_lm, crosscoder):
    scores = sl.attribute(crosscoder, random_lm, TEXTS[0], ablation=True)
    assert scores.direct is None
    tokens = random_lm.to_tokens(TEXTS[0]).tokens
    clean = torch.nn.functional.cross_entropy(random_lm.logits(tokens)[0, :-1], tokens[0, 1:])
    for j in range(0, len(scores.latent), 7):
        edit = sl.Ablate(int(scores.latent[j]), positions=int(scores.position[j]))
        with random_lm.splice(crosscoder, [edit]):
            without = torch.nn.functional.cross_entropy(random_lm.logits(tokens)[0, :-1], tokens[0, 1:])
        assert float(scores.ablation[j]) == pytest.approx(float(clean - without), abs=1e-4)


def test_stores_comparisons_and_cards_name_every_port(random_lm, crosscoder, tmp_path, caplog):
    store = sl.FeatureStore.build(crosscoder, random_lm, TEXTS)
    assert store.info.reads == store.info.writes == (FIRST, SECOND)
    rows = random_lm.to_tokens(TEXTS)
    fires = crosscoder.encode(both(random_lm, rows)[rows.keep]).fires
    assert int(store.tensors.count.sum()) == int(fires.sum())
    with pytest.raises(ConfigError, match="Neuronpedia takes only dictionaries that read one hook and write one"):
        store.export("neuronpedia", tmp_path / "neuronpedia", set_name="set", creator_id="me")
    assert sl.compare(crosscoder, crosscoder).summary.shared == 1
    elsewhere = sl.Dictionary.create("topk", reads=ports(48, 48, hooks=(FIRST, "hook_embed")), d_sae=96, seed=1)
    sl.compare(crosscoder, elsewhere)
    assert f"hooks: {FIRST} + {SECOND} and {FIRST} + hook_embed" in caplog.text
    folder = crosscoder.save(tmp_path / "d")
    card = write_card(folder, crosscoder).read_text()
    assert FIRST in card
    assert SECOND in card
    assert "sae_lens import" not in card


@pytest.mark.parametrize("format", ["saelens", "sparsify", "dictionary_learning", "circuit_tracer"])
def test_formats_without_crosscoders_refuse_a_crosscoder(format, crosscoder, tmp_path):
    with pytest.raises(ConfigError, match=f"cannot be written as {format}"):
        sl.convert(crosscoder.save(tmp_path / "own"), tmp_path / "theirs", format)
    assert not (tmp_path / "theirs").exists()


def test_the_hook_of_a_difference_is_not_that_of_plain_activations():
    port = sl.Port(hook="h", width=4, model="chat")
    of = lambda port: sl.Dictionary.create("topk", reads=port, d_sae=8, options={"k": 2}).hook  # noqa: E731
    assert of(port) == of(sl.Port(hook="h", width=4)) == "h"
    assert of(port.replace(minus="base")) is None
