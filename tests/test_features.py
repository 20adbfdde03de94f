"""The feature store against plain loops over dense codes, and its files."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import saelens_lite as sl
from saelens_lite.errors import (
    ConfigError,
    CorruptFileError,
    HookError,
    NonFiniteError,
    OutputExistsError,
    TextError,
    UserError,
)
from saelens_lite.features import text_rows, weights_hash, words_of_label
from saelens_lite.features.reduce import N_BINS
from saelens_lite.files import file_hash
from saelens_lite.model.passes import batches
from saelens_lite.registry import unregister
from saelens_lite.tokens import TokenRows, token_rows

HOOK = "blocks.1.hook_resid_pre"
D_SAE, N_TOKENS = 64, 700
WINDOW = (5, 2)
HOSTILE = "</script><img onerror>"


@pytest.fixture(scope="module")
def small(lm) -> sl.LanguageModel:
    """Two random blocks under the embedded tokenizer."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=lm.d_vocab,
        n_positions=24,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return sl.LanguageModel(GPT2LMHeadModel(config), lm.tokenizer, name="small")


@pytest.fixture(scope="module")
def rule_with_ties():
    """A rule whose codes are whole numbers, so that many activations are equal; its name."""

    @sl.register("rounded")
    class Rounded(sl.Sparsity):
        def activation(self, pre):
            return (pre - 2).relu().round()

    yield "rounded"
    unregister("rounded")


@pytest.fixture(scope="module")
def dictionaries(rule_with_ties) -> dict[str, sl.Dictionary]:
    """One of every kind; latents 3 and 40 never fire."""
    made = {}
    for rule, options in (("topk", {"k": 8}), (rule_with_ties, {})):
        d = sl.Dictionary.create(
            rule, reads=sl.Port(hook=HOOK, width=16), d_sae=D_SAE, options=options, origin=sl.Origin(n_ctx=20)
        )
        d.b_enc.data[[3, 40]] = -1e4
        d.W_enc.data[:, 7] *= 40  # a latent of another scale
        made[rule] = d
    return made


@pytest.fixture(scope="module")
def rows(small, documents) -> TokenRows:
    """Rows of 20 tokens, some of them twice, the last of each document padded; the count is reached inside a row."""
    return token_rows(small, [HOSTILE * 3, documents[1], *documents], n_ctx=20, n_tokens=N_TOKENS)


@pytest.fixture(scope="module", params=["topk", "rounded"])
def built(request, dictionaries, small, rows) -> tuple[sl.Dictionary, sl.FeatureStore]:
    dictionary = dictionaries[request.param]
    return dictionary, sl.FeatureStore.build(dictionary, small, rows, top_n=4, window=WINDOW, batch_tokens=100)


@pytest.fixture(scope="module")
def store(dictionaries, small, rows) -> sl.FeatureStore:
    return sl.FeatureStore.build(dictionaries["topk"], small, rows, top_n=4, window=WINDOW, batch_tokens=100)


@torch.no_grad()
def dense_codes(dictionary, lm, rows, batch_tokens: int) -> torch.Tensor:
    """Return codes of every position [n_seq n_ctx d_sae], zero where a position does not count."""
    out = torch.zeros(*rows.tokens.shape, D_SAE)
    for batch in batches(lm, rows, batch_tokens):  # other batches change the last bits of activations
        x, keep = lm.run(batch.rows.tokens, HOOK)[HOOK], batch.rows.keep
        codes = torch.zeros(*keep.shape, D_SAE)
        codes[keep] = dictionary.encode(x[keep]).to_dense()
        out[batch.number, : codes.shape[1]] = codes
    return out


def test_settings_come_as_an_object_and_by_name(dictionaries, small, rows, store):
    config = sl.StoreConfig(top_n=4, window=(1, 1), batch_tokens=100)
    again = sl.FeatureStore.build(dictionaries["topk"], small, rows, config, window=WINDOW)
    assert again.info == store.info
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, store.tensors, strict=True))
    assert config.window == (1, 1)


def test_counts_and_contexts_equal_plain_loops(built, small, rows):
    dictionary, store = built
    acts = dense_codes(dictionary, small, rows, batch_tokens=100).tolist()
    strings, tokens, keep = store.vocabulary, rows.tokens.tolist(), rows.keep.tolist()
    n_seq, n_ctx = rows.tokens.shape
    assert n_seq > 30
    assert store.info.n_tokens == N_TOKENS
    for latent in range(D_SAE):
        fired = [(-acts[r][p][latent], r, p) for r in range(n_seq) for p in range(n_ctx) if acts[r][p][latent] > 0]
        summary = store.latent(latent)
        assert summary.count == len(fired)
        assert summary.density == pytest.approx(len(fired) / N_TOKENS)
        assert float(store.density[latent]) == pytest.approx(len(fired) / N_TOKENS)
        values = [-v for v, _, _ in fired]
        assert summary.max == max(values, default=0)
        assert summary.mean == pytest.approx(sum(values) / len(values) if values else 0, rel=1e-6)
        assert summary.bin_width == pytest.approx(max(values, default=0) / N_BINS)
        bins = [min(int(v * N_BINS / max(values)), N_BINS - 1) for v in values]
        assert summary.histogram == [bins.count(b) for b in range(N_BINS)]

        best_of_row = {}
        for entry in sorted(fired):
            best_of_row.setdefault(entry[1], entry)
        expected = sorted(best_of_row.values())[:4]
        examples = store.top_examples(latent)
        assert [(-e.value, e.row, e.position) for e in examples] == expected
        for e in examples:
            last = max(p for p in range(n_ctx) if keep[e.row][p])
            shown = range(max(0, e.position - WINDOW[0]), min(last, e.position + WINDOW[1]) + 1)
            assert list(e.tokens) == [strings[tokens[e.row][p]] for p in shown]
            assert list(e.values) == [acts[e.row][p][latent] for p in shown]
            assert shown[e.peak] == e.position
            assert e.values[e.peak] == e.value
        assert float(store.tensors.top_nearby[latent].sum()) == pytest.approx(sum(sum(e.values) for e in examples), rel=1e-5)


def test_rule_with_ties_has_ties(dictionaries, small, rows):
    """The loop test above means something for ties only if there are some, also between rows."""
    store = sl.FeatureStore.build(dictionaries["rounded"], small, rows, top_n=4)
    values = store.tensors.top_value
    assert int(((values[:, 0] == values[:, 1]) & (values[:, 0] > 0)).sum()) > 10


def test_batches_do_not_matter(store, dictionaries, small, rows):
    other = sl.FeatureStore.build(dictionaries["topk"], small, rows, top_n=4, window=WINDOW, batch_tokens=1_000_000)
    assert torch.equal(other.tensors.count, store.tensors.count)
    torch.testing.assert_close(other.tensors.top_value, store.tensors.top_value)
    torch.testing.assert_close(other.tensors.mean, store.tensors.mean)


def test_silent_latents_have_no_examples(store):
    for latent in (3, 40):
        summary = store.latent(latent)
        assert (summary.count, summary.max, summary.mean, summary.bin_width, summary.examples) == (0, 0, 0, 0, [])
        assert sum(summary.histogram) == 0
    assert store.never_fires.nonzero().flatten().tolist() == [i for i in range(D_SAE) if store.latent(i).count == 0]
    assert all(e.value > 0 for i in range(D_SAE) for e in store.top_examples(i))


def test_promoted_tokens_are_the_matrix_product(store, dictionaries, small, monkeypatch):
    logits = dictionaries["topk"].W_dec.detach() @ small.unembedding().T
    order = logits.argsort(dim=1)
    strings = small.token_strings()
    for latent in (0, 7, 63):
        promoted, suppressed = store.promoted(latent), store.suppressed(latent)
        best, worst = order[latent].flip(0)[:10].tolist(), order[latent][:10].tolist()
        assert [effect for _, effect in promoted] == pytest.approx(logits[latent][best].tolist(), rel=1e-5)
        assert [effect for _, effect in suppressed] == pytest.approx(logits[latent][worst].tolist(), rel=1e-5)
        assert [text for text, _ in promoted if "‹" not in text] == [strings[i] for i in best if "\ufffd" not in strings[i]]
    monkeypatch.setattr("saelens_lite.features.weights.MAX_NUMBERS", 3 * small.d_vocab)  # 3 latents at a time
    again = sl.FeatureStore.build(dictionaries["topk"], small, "some text")
    assert torch.equal(again.weights.promoted, store.weights.promoted)
    torch.testing.assert_close(again.weights.suppressed_effect, store.weights.suppressed_effect)


def test_latents_that_promote_a_token(store, dictionaries, small):
    logits = dictionaries["topk"].W_dec.detach() @ small.unembedding().T
    least = logits.topk(10, dim=1).values[:, -1]
    token = store.promoted(7)[3][0]
    if token not in small.token_strings():
        token = store.promoted(7)[0][0]
    effect = logits[:, small.token_strings().index(token)]
    wanted = sorted((i for i in range(D_SAE) if effect[i] >= least[i]), key=lambda i: -effect[i])
    found = store.promoting(token)
    assert [latent for latent, _ in found] == wanted
    assert [value for _, value in found] == pytest.approx(effect[wanted].tolist(), rel=1e-5)
    with pytest.raises(UserError, match="did you mean ' constructor'"):
        store.promoting("constructor")
    with pytest.raises(UserError, match=r"'no such token'.*token of"):
        store.promoting("no such token")


def test_bytes_that_are_no_characters_are_visible(store, small):
    ids = small.tokenizer("日 ï")["input_ids"]
    assert "".join(store.vocabulary[i] for i in ids).startswith("‹e6")
    assert not any("\ufffd" in text or text == "" for text in store.vocabulary)
    pairs = zip(store.vocabulary, small.token_strings(), strict=True)
    assert all(shown == text for shown, text in pairs if "\ufffd" not in text)


def test_tokens_of_sentencepiece_keep_their_spaces():
    """Of a token by itself, such tokenizers leave out the first space."""
    words = ["<s>", "▁", "▁▁", "▁cat", "s", "<0xC3>", "▁▁x"]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    config = GPT2Config(vocab_size=len(words) + 1, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    lm = sl.LanguageModel(GPT2LMHeadModel(config), tokenizer, name="pieces")
    assert lm.token_strings()[3] == "cat"
    assert lm.vocabulary == ["<s>", " ", "  ", " cat", "s", "‹c3›", "  x", "<7>"]


def test_text_and_rows_give_the_same_store(dictionaries, small, documents):
    d = dictionaries["topk"]
    from_text = sl.FeatureStore.build(d, small, documents, n_tokens=300)
    from_rows = sl.FeatureStore.build(d, small, token_rows(small, documents, n_ctx=20, n_tokens=300))
    assert from_text.info == from_rows.info
    assert all(torch.equal(a, b) for a, b in zip(from_text.tensors, from_rows.tensors, strict=True))


@pytest.mark.parametrize("text", ["documents", "equal rows"])
def test_long_texts_are_kept_in_files(text, dictionaries, small, documents, monkeypatch, tmp_path):
    """The rows, and so the store, are those of a text in memory."""
    given = documents if text == "documents" else torch.arange(600).reshape(30, 20)
    config = sl.TextConfig(n_ctx=20) if text == "documents" else None
    in_memory = sl.FeatureStore.build(dictionaries["topk"], small, given, text_config=config, batch_tokens=100)
    monkeypatch.setattr(text_rows, "IN_MEMORY", 50)
    monkeypatch.setattr(text_rows.RowBlocks.__init__, "__kwdefaults__", {"n_tokens": None, "block_tokens": 60})
    rows = text_rows.rows_of(text_rows.RowBlocks(small, given, config), tmp_path)
    expected = token_rows(small, given, text_config=config)
    assert rows.tokens.dtype == torch.int32
    assert torch.equal(rows.tokens, expected.tokens.int())
    assert torch.equal(rows.keep, expected.keep)
    assert rows.ends_text == expected.ends_text
    assert (rows.length is None) == (expected.length is None) or torch.equal(rows.length, expected.lengths)
    on_disk = sl.FeatureStore.build(
        dictionaries["topk"], small, given, text_config=config, batch_tokens=100, out=tmp_path / "store"
    )
    assert on_disk.info == in_memory.info
    assert all(torch.equal(x, y) for x, y in zip(on_disk.tensors, in_memory.tensors, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_stores_of_the_format_before_are_read(store, tmp_path):
    folder = store.save(tmp_path / "store")
    content = json.loads((folder / "features.json").read_text())
    assert content["format"] == 5
    content["format"] = 3
    for name in ("partner_tokens", "model_sha256", "precision"):
        del content["info"][name]
    (folder / "features.json").write_text(json.dumps(content))
    loaded = sl.FeatureStore.load(folder)
    assert loaded.info == store.info.replace(model_sha256=None, precision=None)
    assert loaded.partners(7) == store.partners(7)


def test_mutual_information_of_counts_in_a_sample(store):
    """A tenth of the tokens with a tenth of the counts says the same."""
    assert store.partners(7, "count")
    sampled = sl.FeatureStore(store.info.replace(partner_tokens=N_TOKENS // 10), store.tensors, store.weights, store.vocabulary)
    for one, other in zip(store.partners(7, "count"), sampled.partners(7, "count"), strict=True):
        assert other[:2] == one[:2]
        assert other.pmi == pytest.approx(one.pmi + math.log(10))


def test_hook_of_another_width_promotes_nothing(small, documents):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook="blocks.0.mlp.out.hook_in", width=64), d_sae=32, options={"k": 4})
    store = sl.FeatureStore.build(d, small, documents[0])
    assert store.promoted(0) == store.suppressed(0) == []
    assert int(store.tensors.count.sum()) > 0


def test_save_and_load(store, tmp_path):
    folder = store.save(tmp_path / "store")
    loaded = sl.FeatureStore.load(folder)
    assert loaded.info == store.info
    assert loaded.vocabulary == store.vocabulary
    assert all(torch.equal(a, b) for a, b in zip(loaded.tensors, store.tensors, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(loaded.weights, store.weights, strict=True))
    assert all(loaded.latent(i) == store.latent(i) for i in range(D_SAE))


def test_same_input_same_bytes(dictionaries, small, rows, tmp_path):
    for name in ("a", "b"):
        store = sl.FeatureStore.build(dictionaries["topk"], small, rows, out=tmp_path / name)
        store.dashboard(tmp_path / f"{name}.html")
    for file in ("features.json", "features.safetensors", "weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_weights_hash_sees_every_weight(dictionaries, store):
    d = dictionaries["topk"]
    assert store.info.dictionary_sha256 == weights_hash(d)
    with torch.no_grad():
        d.b_dec[5] += 1e-6
    assert weights_hash(d) != store.info.dictionary_sha256
    with torch.no_grad():
        d.b_dec[5] = 0
    assert weights_hash(d) == store.info.dictionary_sha256


@pytest.mark.parametrize("file", ["features.json", "features.safetensors", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "one byte"])
def test_damaged_files_are_refused(store, tmp_path, file, damage):
    path = store.save(tmp_path / "store") / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2 if file.endswith("safetensors") else content.index(b'"d_sae"') + 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(CorruptFileError):
        sl.FeatureStore.load(tmp_path / "store")


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": lambda t: t["tokens"] + 100_000},
        {"top_place": lambda t: t["top_place"] - 2},
        {"top_value": lambda t: t["top_value"] * 0},
        {"length": lambda t: t["length"] - 15},
        {"length": lambda t: t["length"] + 15},
        {"random_place": lambda t: t["random_place"][:, 1:].contiguous()},
        {"group_nearby": lambda t: t["group_nearby"][..., 1:].contiguous()},
        {"group_count": lambda t: t["group_count"] + 1},
        {"group_count": lambda t: t["group_count"] + torch.tensor([1000, -1000, 0, 0, 0], dtype=torch.int32)},
        {"band_tokens": lambda t: t["band_tokens"] * 2},
        {"band_count": lambda t: t["band_count"].flip(1).contiguous()},
        {"histogram": lambda t: t["histogram"] * 2},
        {"frequent_count": lambda t: t["frequent_count"] * 1000},
        {"specific_partner": lambda t: t["specific_partner"] + D_SAE},
        {"count": lambda t: t["count"].float()},
        {"mean": lambda t: t["mean"][1:]},
        {"histogram": lambda t: t["histogram"][:, :7].contiguous()},
        {"surplus": lambda t: t["mean"].clone()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensors_that_do_not_fit_are_refused(store, tmp_path, change):
    """Even when the checksum has been adapted to them."""
    folder = store.save(tmp_path / "store")
    tensors = load_file(folder / "features.safetensors")
    save_file(tensors | {name: make(tensors) for name, make in change.items()}, folder / "features.safetensors")
    content = json.loads((folder / "features.json").read_text())
    content["sha256"]["features.safetensors"] = file_hash(folder / "features.safetensors")
    (folder / "features.json").write_text(json.dumps(content))
    with pytest.raises(CorruptFileError):
        sl.FeatureStore.load(folder)


@pytest.mark.parametrize("name", ["logit_low logit_width logit_skew logit_kurtosis", "encoder_decoder_cosine"])
def test_weights_of_fewer_latents_are_refused(store, tmp_path, name):
    """Statistics that either all latents have or none has."""
    folder = store.save(tmp_path / "store")
    tensors = load_file(folder / "weights.safetensors")
    save_file(tensors | {one: tensors[one][:3].clone() for one in name.split()}, folder / "weights.safetensors")
    content = json.loads((folder / "features.json").read_text())
    content["sha256"]["weights.safetensors"] = file_hash(folder / "weights.safetensors")
    (folder / "features.json").write_text(json.dumps(content))
    with pytest.raises(CorruptFileError, match=r"tensors and features\.json"):
        sl.FeatureStore.load(folder)


def test_existing_outputs_are_kept(store, dictionaries, small, tmp_path):
    page, folder = tmp_path / "sub" / "features.html", tmp_path / "store"
    assert store.dashboard(page) == page
    with pytest.raises(OutputExistsError):
        store.dashboard(page)
    store.dashboard(page, exists="overwrite")
    with pytest.raises(OutputExistsError, match="folder"):
        store.dashboard(page.parent, exists="overwrite")
    store.save(folder)
    with pytest.raises(OutputExistsError):
        store.save(folder)
    with pytest.raises(OutputExistsError):  # before the text is read
        sl.FeatureStore.build(dictionaries["topk"], small, "", out=folder)
    sl.FeatureStore.build(dictionaries["topk"], small, "text", out=folder, exists="overwrite")
    assert sl.FeatureStore.load(folder).info.n_tokens < store.info.n_tokens


@pytest.mark.parametrize("latent", [-1, D_SAE, 10**9])
@pytest.mark.parametrize(
    "method",
    [
        "top_examples",
        "quantile_examples",
        "random_examples",
        "silent_examples",
        "position_profile",
        "partners",
        "promoted",
        "suppressed",
        "latent",
    ],
)
def test_latents_out_of_range(store, latent, method):
    with pytest.raises(UserError, match="0 to 63"):
        getattr(store, method)(latent)


@pytest.mark.parametrize("latent", [-1, D_SAE, 10**9])
def test_scores_of_latents_out_of_range(store, latent):
    with pytest.raises(UserError, match="0 to 63"):
        store.score([latent], model=words_of_label)


def test_requests_that_cannot_be_met(dictionaries, small, rows):
    d, build = dictionaries["topk"], sl.FeatureStore.build

    def other(d_in: int = 16, hook: str | None = HOOK) -> sl.Dictionary:
        return sl.Dictionary.create("topk", reads=sl.Port(hook=hook, width=d_in), d_sae=32, options={"k": 4})

    with pytest.raises(ConfigError, match="hook="):
        build(other(hook=None), small, "text")
    assert build(other(hook=None), small, "text", hook=HOOK).info.reads == (HOOK,)
    with pytest.raises(HookError, match="resid_pre"):
        build(other(hook="blocks.1.hook_resid_prae"), small, "text")
    with pytest.raises(sl.errors.ShapeError, match="16"):
        build(other(d_in=24), small, "text")
    with pytest.raises(TextError):
        build(d, small, "")
    with pytest.raises(TextError):
        build(d, small, TokenRows(rows.tokens, torch.zeros_like(rows.keep)))
    for bad in ({"top_n": 0}, {"window": (-1, 3)}, {"n_groups": 0}, {"seed": -1}, {"batch_tokens": 0}, {"n_tokens": 0}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            build(d, small, "text", **bad)
    with pytest.raises(ConfigError, match="n_tokens"):
        build(d, small, rows, n_tokens=10)
    with pytest.raises(ConfigError, match=r"unknown key 'top_m'.*top_n"):
        build(d, small, rows, top_m=3)
    with pytest.raises(ConfigError, match="out="):
        build(d, small, rows, codes=True)
    with pytest.raises(ConfigError, match="no dictionary"):
        build([], small, rows)
    with pytest.raises(UserError, match="codes=True"):
        build(d, small, "text").sql("select 1")
    with pytest.raises(ConfigError, match="store has no folder"):
        build(d, small, "text").write_labels()
    broken = other()
    broken.W_enc.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="W_enc"):
        build(broken, small, "text")
    huge = other()
    huge.W_enc.data[:, 0], huge.W_enc.data[:, 1] = 3e38, -3e38
    with pytest.raises(NonFiniteError, match="codes"):
        build(huge, small, "text")
    mute = other()
    mute.b_enc.data.fill_(-1e6)
    with pytest.raises(TextError, match="none of the 32 latents fires"):
        build(mute, small, "text")
