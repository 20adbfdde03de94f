"""Feature stores of several models: what each model adds to a latent, against dense float64 products."""

import copy

import pytest
import torch

import saelens_lite as sl
from saelens_lite.errors import ConfigError, CorruptFileError, UserError
from saelens_lite.features import code_log, collect
from saelens_lite.model import Models
from saelens_lite.tensor_files import read_tensors, write_tensors
from saelens_lite.tokens import token_rows

HOOK, D_SAE, N_CTX = "blocks.1.hook_resid_pre", 24, 20
SETTINGS = {"top_n": 5, "window": (3, 2), "n_groups": 3, "group_size": 2, "batch_tokens": 100}


@pytest.fixture(scope="module")
def models(random_lm) -> Models:
    """A model and a copy with other weights in its first block."""
    other = sl.LanguageModel(copy.deepcopy(random_lm.module), random_lm.tokenizer, name="other")
    with torch.no_grad():
        other.blocks[0].mlp.c_proj.weight.mul_(-3)
    return Models({"base": random_lm, "chat": other})


def made(kind: str, width: int) -> sl.Dictionary:
    """Return a crosscoder, or a dictionary of the difference, with biases that are not zero."""
    ports = {
        "crosscoder": [sl.Port(hook=HOOK, width=width, model=name) for name in ("base", "chat")],
        "difference": [sl.Port(hook=HOOK, width=width, model="chat", minus="base")],
    }[kind]
    d = sl.Dictionary.create("topk", reads=ports, d_sae=D_SAE, options={"k": 5}, seed=3, origin=sl.Origin(n_ctx=N_CTX))
    generator = torch.Generator().manual_seed(4)
    d.b_enc.data.copy_(torch.randn(D_SAE, generator=generator) / 10)
    d.b_dec.data.copy_(torch.randn(d.d_in, generator=generator) / 10)
    d.W_dec.data[:, : d.d_out // 2] *= torch.linspace(0, 2, D_SAE)[:, None]  # latent 0: only in the second half
    return d


@pytest.fixture(scope="module")
def rows(random_lm, documents):
    return token_rows(random_lm, documents, n_ctx=N_CTX, n_tokens=700)


@pytest.fixture(scope="module", params=["crosscoder", "difference"])
def case(request, models, rows):
    d = made(request.param, models.first.d_model)
    return d, sl.FeatureStore.build(d, models, rows, **SETTINGS)


@torch.no_grad()
def dense(d, models, rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [row pos latent], the parts [row pos latent model] in float64, and the bias, from the formulas."""
    keys = [f"{name}:{HOOK}" for name in ("base", "chat")]
    acts = models.run(rows.tokens, keys)
    base, chat = (acts[key].double() for key in keys)
    W, b = d.W_enc.double(), d.b_dec.double()
    n = base.shape[-1]
    if len(d.reads) == 2:
        x, bias = torch.cat([base, chat], -1), d.b_enc.double()
        parts = torch.stack([(base - b[:n]) @ W[:n], (chat - b[n:]) @ W[n:]], -1)
    else:
        x, bias = chat - base, d.b_enc.double() - b @ W
        parts = torch.stack([-(base @ W), chat @ W], -1)
    codes = d.encode(x.float()).to_dense().double()
    return torch.where(rows.keep[..., None], codes, 0), parts, bias


def test_parts_and_bias_add_up_to_the_pre_activation(case, models, rows):
    d, store = case
    codes, parts, bias = dense(d, models, rows)
    assert torch.allclose(store.models.bias.double(), bias, atol=1e-5)
    n_seen = 0
    for latent in range(D_SAE):
        examples = [*store.top_examples(latent), *store.random_examples(latent)]
        for example in examples + [one for group in store.quantile_examples(latent) for one in group.examples]:
            assert list(example.parts) == ["base", "chat"]
            wanted = parts[example.row, example.position, latent].tolist()
            assert list(example.parts.values()) == pytest.approx(wanted, abs=1e-4)
            assert sum(example.parts.values()) + float(bias[latent]) == pytest.approx(example.value, abs=1e-4)  # topk: f = h
            n_seen += 1
        fires = codes[..., latent] > 0
        if fires.any():
            mean = parts[..., latent, :][fires].mean(0)
            assert store.models.mean_part[latent].tolist() == pytest.approx(mean.tolist(), abs=1e-4)
    assert n_seen > 100


@pytest.mark.parametrize("at", [0, 1])
def test_contexts_of_a_model_are_those_with_its_largest_parts(case, models, rows, at):
    d, store = case
    codes, parts, _ = dense(d, models, rows)
    own = torch.where(codes > 0, parts[..., at], -torch.inf)
    for latent in range(D_SAE):
        best, where = own[..., latent].max(1)
        order = [row for row in best.argsort(descending=True, stable=True).tolist() if best[row] > -torch.inf]
        examples = store.top_examples(latent, model=("base", "chat")[at])
        assert [(one.row, one.position) for one in examples] == [(row, int(where[row])) for row in order[: SETTINGS["top_n"]]]
        for one in examples:
            assert one.value == pytest.approx(float(codes[one.row, one.position, latent]), rel=1e-5)
            assert one.values[one.peak] == one.value


def test_directions_are_compared_in_equal_units(models, rows):
    d = made("crosscoder", models.first.d_model)
    store = sl.FeatureStore.build(d, models, rows, **SETTINGS)
    acts = models.run(rows.tokens, [f"{name}:{HOOK}" for name in ("base", "chat")])
    scales = [x[rows.keep].double().square().mean().rsqrt() for x in acts.values()]
    assert abs(scales[0] / scales[1] - 1) > 0.1
    parts = d.W_dec.detach().split(models.first.d_model, 1)
    first, second = (part.double() * scale for part, scale in zip(parts, scales, strict=True))
    norms = first.norm(dim=1), second.norm(dim=1)
    delta = ((norms[0] - norms[1]) / torch.maximum(*norms) + 1) / 2
    assert torch.allclose(store.models.norm.double(), torch.stack(norms, 1), rtol=1e-4)
    assert torch.allclose(store.models.delta_norm.double(), delta, atol=1e-5)
    assert float(delta[0]) == 0
    assert store.latent(0).delta_norm == 0
    cosine = (first * second).sum(1)[1:] / (norms[0] * norms[1])[1:]
    assert torch.allclose(store.models.cosine[1:].double(), cosine, atol=1e-5)


def test_promoted_tokens_are_those_of_each_models_unembedding(case, models):
    d, store = case
    for at, name in enumerate(("base", "chat")):
        direction = d.W_dec.split(models.first.d_model, 1)[at if len(d.writes) == 2 else 0]
        logits = direction[5].detach() @ models[name].unembedding().T
        value, token = logits.topk(3)
        promoted = store.promoted(5, name)
        assert [effect for _, effect in promoted[:3]] == pytest.approx(value.tolist(), rel=1e-4)
        assert promoted[0][0] == store.vocabulary[int(token[0])]
        assert store.suppressed(5, name)[0][1] == pytest.approx(float(logits.min()), rel=1e-4)
    assert store.promoted(5) == store.promoted(5, "chat")
    assert (len(store.models.delta_norm), len(store.models.cosine)) == ((D_SAE, D_SAE) if len(d.writes) == 2 else (0, 0))


def test_a_store_of_several_models_is_saved_and_loaded(case, tmp_path):
    _, store = case
    loaded = sl.FeatureStore.load(store.save(tmp_path / "store"))
    assert loaded.info == store.info
    assert (loaded.info.model, loaded.info.names) == (f"base = {store.info.models[0].model}, chat = other", ("base", "chat"))
    for name, x in store.models._asdict().items():
        assert torch.equal(getattr(loaded.models, name), x), name
    assert loaded.latent(7) == store.latent(7)
    path = tmp_path / "store" / "models.safetensors"
    tensors = read_tensors(path)
    tensors["best_place"] += 10**6
    write_tensors(path, tensors)
    with pytest.raises(CorruptFileError, match="checksum"):
        sl.FeatureStore.load(tmp_path / "store")


def test_an_interrupted_pass_is_resumed_with_all_parts(models, rows, tmp_path, monkeypatch):
    d = made("crosscoder", models.first.d_model)
    whole = sl.FeatureStore.build(d, models, rows, out=tmp_path / "whole", **SETTINGS)
    add, n = code_log.CodeLog.add, 0

    def failing(self, *batch):
        nonlocal n
        n += 1
        if n == 4:
            raise KeyboardInterrupt
        add(self, *batch)

    monkeypatch.setattr(collect.CodeLog, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        sl.FeatureStore.build(d, models, rows, out=tmp_path / "resumed", **SETTINGS)
    sl.FeatureStore.build(d, models, rows, out=tmp_path / "resumed", **SETTINGS)
    assert n > 5
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes(), path.name
    assert whole.models is not None


def test_a_control_shuffles_every_model_and_restores_it(models, rows):
    d = made("difference", models.first.d_model)
    before = models.fingerprint()
    store = sl.FeatureStore.build(d, models, rows, control=True, **SETTINGS)
    assert models.fingerprint() == before
    assert store.control.info.model.endswith("chat = other, weights shuffled")
    with models.redrawn(0) as redrawn:
        codes, _, _ = dense(d, redrawn, rows)
    assert torch.equal(store.control.tensors.count, (codes > 0).sum((0, 1)))
    twice = Models({"base": models.first, "chat": models.first})
    with twice.redrawn(0) as redrawn:
        acts = redrawn.run(rows.tokens, [f"base:{HOOK}", f"chat:{HOOK}"])
    assert torch.equal(*acts.values())


def test_what_one_model_is_needed_for_is_refused(models, rows, tmp_path):
    d = made("crosscoder", models.first.d_model)
    with pytest.raises(ConfigError, match="belongs to several models"):
        sl.FeatureStore.build(d, models.first, rows, **SETTINGS)
    store = sl.FeatureStore.build(d, models, rows, **SETTINGS)
    with pytest.raises(UserError, match="takes a store of one model, but this one is of base, chat"):
        store.export("neuronpedia", tmp_path / "export", set_name="a", creator_id="b")
    with pytest.raises(UserError, match="no model 'other'; its models: base, chat"):
        store.top_examples(0, model="other")


def test_a_store_of_one_model_has_nothing_about_several(random_lm, rows, tmp_path):
    port = sl.Port(hook=HOOK, width=random_lm.d_model)
    d = sl.Dictionary.create("topk", reads=port, d_sae=D_SAE, options={"k": 5}, origin=sl.Origin(n_ctx=N_CTX))
    store = sl.FeatureStore.build(d, random_lm, rows, **SETTINGS)
    assert store.models is None
    assert "models" not in store.info.model_dump()
    assert store.top_examples(int(store.tensors.count.argmax()))[0].parts is None
    assert not (store.save(tmp_path / "store") / "models.safetensors").exists()
    with pytest.raises(UserError, match="none with a name"):
        store.promoted(0, "base")
