"""The text of tokens: scripts with several bytes per character, and tokenizers with other marks for spaces and bytes."""

import gzip
import io
import json
import pickle
import re
import string

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import saelens_lite as sl
from saelens_lite.errors import ConfigError, UserError
from saelens_lite.features.explaining.halves import shown_contexts
from saelens_lite.features.explaining.judging import Sheet, in_questions
from saelens_lite.features.explaining.scoring import by_tokens
from saelens_lite.features.explaining.trials import trials_of
from saelens_lite.features.html import PART
from saelens_lite.interventions import LogProb
from saelens_lite.interventions.metrics import token_id
from saelens_lite.tokens.display import Vocabulary

TEXTS = {
    "Chinese": "老人看着大海，说：",
    "emoji": "ok 👩‍💻 and 👍🏽!",
    "accents": "é à la naïve cafe\u0301 Ñ",
    "Arabic": "مرحبا بالعالم",
    "Thai": "สวัสดีชาวโลก",
    "mixed": "The 老 man\n said “é” — that’s 𝒳.",
}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
ORDINARY = string.ascii_letters + string.digits + ".,"
anything = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fallback_bpe() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a space in front of every text, bytes for what the vocabulary lacks."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁", *ORDINARY, "he", "▁he", "she", "▁she", "▁▁", "▁P", "▁Pa"]
    merges = [("h", "e"), ("▁", "he"), ("s", "he"), ("▁", "she"), ("▁", "▁"), ("▁", "P"), ("▁P", "a")]
    ids = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def fallback_unigram() -> PreTrainedTokenizerFast:
    """Like T5's and XLNet's, with bytes for what the vocabulary lacks."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -9.0) for piece in BYTES), ("▁", -3.0)]
    pieces += [(character, -4.0) for character in ORDINARY] + [("▁he", -2.0), ("he", -2.5), ("▁she", -2.0), ("é", -4.0)]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def word_piece() -> PreTrainedTokenizerFast:
    """Like BERT's cased one."""
    words = ["[UNK]", "[CLS]", "[SEP]", *ORDINARY, *(f"##{character}" for character in ORDINARY), "he", "##he", "she", "##ing"]
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece("##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def end_of_word() -> PreTrainedTokenizerFast:
    """Like OpenAI-GPT's."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False)
    inner.train_from_iterator(["the heathen he said she saw there was here", " ".join(string.ascii_lowercase)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


MADE = {made.__name__: made for made in (fallback_bpe, fallback_unigram, word_piece, end_of_word)}


@pytest.fixture(scope="module")
def tokenizers(lm) -> dict:
    return {"byte_level": lm.tokenizer, "byt5": ByT5Tokenizer()} | {name: make() for name, make in MADE.items()}


@pytest.fixture(scope="module")
def vocabularies(tokenizers) -> dict[str, Vocabulary]:
    return {name: Vocabulary.of(tokenizer, len(tokenizer)) for name, tokenizer in tokenizers.items()}


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def model(tokenizer) -> sl.LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    return sl.LanguageModel(GPT2LMHeadModel(config), tokenizer, name="pieces")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("name", ["byte_level", "fallback_bpe", "fallback_unigram", "byt5"])
def test_a_row_shows_the_text(name, text, tokenizers, vocabularies):
    ids = ids_of(tokenizers[name], text)
    shown = vocabularies[name].row(ids)
    assert len(shown) == len(ids) > len(text) / 4
    assert "".join(shown).removeprefix(" ") == text
    assert "" in shown  # parts of characters, for else nothing was tested


@anything
@given(text=st.text())
def test_joined_texts_are_what_a_byte_level_tokenizer_decodes(text, tokenizers, vocabularies):
    ids = ids_of(tokenizers["byte_level"], text)
    shown = "".join(vocabularies["byte_level"].row(ids))
    assert shown == tokenizers["byte_level"].decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", ["fallback_bpe", "fallback_unigram"])
@anything
@given(text=st.text(min_size=1))
def test_joined_texts_are_what_byte_fallback_decodes_behind_its_space(name, text, tokenizers, vocabularies):
    ids = ids_of(tokenizers[name], text)
    decoded = tokenizers[name].decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(vocabularies[name].row(ids)) == f" {decoded}"


@anything
@given(words=st.lists(st.text(string.ascii_letters, min_size=1, max_size=8), min_size=1))
def test_joined_texts_are_what_word_piece_decodes_behind_its_space(words, tokenizers, vocabularies):
    ids = ids_of(tokenizers["word_piece"], " ".join(words))
    decoded = tokenizers["word_piece"].decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(vocabularies["word_piece"].row(ids)) == f" {decoded}" == f" {' '.join(words)}"


@anything
@given(words=st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=8), min_size=1))
def test_joined_texts_are_what_marks_of_word_ends_decode_to(words, tokenizers, vocabularies):
    ids = ids_of(tokenizers["end_of_word"], " ".join(words))
    assert "".join(vocabularies["end_of_word"].row(ids)) == tokenizers["end_of_word"].decode(ids) + " " == f"{' '.join(words)} "


@anything
@given(data=st.data())
def test_any_ids_show_every_byte_once_and_in_its_token(data, vocabularies):
    """Against a reading byte by byte: what each token shows is decided by the bytes around it alone."""
    vocabulary = vocabularies["byte_level"]
    parts = st.sampled_from(sorted(vocabulary.parts))
    ids = data.draw(st.lists(st.one_of(parts, parts, st.integers(1, 4095)), max_size=12))
    shown = vocabulary.row(ids)
    rebuilt = b"".join(
        bytes.fromhex(piece[1:-1]) if piece.startswith("‹") else piece.encode() for text in shown for piece in pieces_of(text)
    )
    assert rebuilt == b"".join(vocabulary.parts.get(i) or vocabulary[i].encode() for i in ids)
    start = data.draw(st.integers(0, len(ids)))
    stop = data.draw(st.integers(start, len(ids)))
    assert vocabulary.window(torch.tensor(ids, dtype=torch.long), start, stop) == shown[start:stop]


def pieces_of(text: str) -> list[str]:
    """Return a text cut at its bytes in angle quotation marks, which the embedded vocabulary has in no text of its own."""
    pieces = text.replace("‹", "\0‹").replace("›", "›\0").split("\0")
    return [piece for piece in pieces if piece]


def test_single_tokens_show_their_bytes(tokenizers, vocabularies):
    for name in ("byte_level", "fallback_bpe"):
        vocabulary = vocabularies[name]
        first = ids_of(tokenizers[name], "a老")[-3]
        assert vocabulary[first] == "‹e8›"
        assert vocabulary.row([first]) == ["‹e8›"]  # cut off before it is complete
        assert not any("\\x" in text or "\ufffd" in text or not text for text in vocabulary)
    a = vocabularies["fallback_bpe"].index("a")
    tail = ids_of(tokenizers["fallback_bpe"], "老")[-2:]
    assert vocabularies["fallback_bpe"].row([*tail, a]) == ["‹80›", "‹81›", "a"]


def test_texts_keep_their_spaces(vocabularies):
    for name, texts in {
        "fallback_bpe": [" he", "he", " ", "  ", " Pa", "<s>", "\n", "A"],
        "fallback_unigram": [" he", "he", " ", "</s>", "\n"],
        "word_piece": [" he", "he", " she", "ing", "[CLS]"],
        "end_of_word": ["he ", "he"],
    }.items():
        assert set(texts) <= set(vocabularies[name]), name


def test_ids_without_token_are_numbers(tokenizers):
    n = len(tokenizers["fallback_bpe"])
    assert Vocabulary.of(tokenizers["fallback_bpe"], n + 2)[n:] == [f"<{n}>", f"<{n + 1}>"]
    assert Vocabulary.of(None, 3) == ["<0>", "<1>", "<2>"]


def test_names_that_are_bytes():
    """As the first Qwen's tokenizer has them."""

    class Bytes:
        all_special_ids = ()

        def get_vocab(self):
            return {b"a": 0, b"\xe8\x80": 1, b"\x81": 2, " é".encode(): 3}

        def batch_decode(self, rows, **_):
            raw = {i: name for name, i in self.get_vocab().items()}
            return [b"".join(raw[i] for i in row).decode(errors="replace") for row in rows]

    vocabulary = Vocabulary.of(Bytes(), 4)
    assert vocabulary == ["a", "‹e880›", "‹81›", " é"]
    assert vocabulary.row([3, 1, 2, 1, 0]) == [" é", "", "老", "‹e880›", "a"]


def test_a_replacement_character_of_the_text_is_itself(tokenizers, vocabularies):
    ids = ids_of(tokenizers["byte_level"], "a\ufffdb")
    assert "".join(vocabularies["byte_level"].row(ids)) == "a\ufffdb"


def test_a_vocabulary_survives_json_and_pickle(vocabularies):
    for vocabulary in vocabularies.values():
        for again in (Vocabulary.from_json(**vocabulary.to_json()), pickle.loads(pickle.dumps(vocabulary))):
            assert (again, again.parts) == (vocabulary, vocabulary.parts)


def test_json_does_not_depend_on_the_order_in_which_tokens_became_known():
    """A tokenizer lists its vocabulary in another order in each process."""
    texts, parts = ["a", "b", "c"], {2: b"\xe8", 0: b"\x80"}
    one, other = (
        json.dumps(Vocabulary(texts, dict(some)).to_json()) for some in (parts.items(), reversed(list(parts.items())))
    )
    assert one == other


def test_older_stores_have_bytes_in_their_texts(tokenizers, vocabularies):
    ids = ids_of(tokenizers["byte_level"], "The 老")
    old = list(vocabularies["byte_level"])
    for i, raw in vocabularies["byte_level"].parts.items():
        old[i] = "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in raw)
    again = Vocabulary.from_json(old, None)
    assert (again, again.parts) == (vocabularies["byte_level"], vocabularies["byte_level"].parts)
    assert "".join(again.row(ids)) == "The 老"


@pytest.fixture(scope="module")
def chinese_store(random_lm) -> tuple[sl.Dictionary, sl.FeatureStore]:
    torch.manual_seed(0)
    d = sl.Dictionary.create("topk", reads=sl.Port(hook="blocks.1.hook_resid_pre", width=48), d_sae=40, options={"k": 4})
    text = TEXTS["Chinese"] + TEXTS["emoji"] + TEXTS["Thai"]
    return d, sl.FeatureStore.build(d, random_lm, [text * 2, text[3:] * 2, "plain text", text[1:]], window=(4, 2))


def test_contexts_are_windows_of_what_their_rows_show(chinese_store, random_lm):
    _, store = chinese_store
    n_empty = 0
    for latent in range(store.info.d_sae):
        for example in store.top_examples(latent) + store.random_examples(latent):
            row = store.tensors.tokens[example.row, : int(store.tensors.length[example.row])].tolist()
            start = example.position - example.peak
            assert list(example.tokens) == random_lm.vocabulary.row(row)[start : start + len(example.tokens)]
            assert not any("\\x" in token for token in example.tokens)
            n_empty += example.tokens.count("")
    assert n_empty > 100


def test_views_tables_and_cards_show_characters(chinese_store, random_lm):
    d, store = chinese_store
    view = sl.prompt_view(d, random_lm, TEXTS["Chinese"])
    assert "".join(view.tokens[1:]) == TEXTS["Chinese"]
    found = sl.attribute(d, random_lm, TEXTS["Chinese"], ablation=False)
    assert found.tokens == (view.tokens,)
    shown = {"view": view._repr_html_(), "table": rendered(found.table(60)), "rich": rendered(view)}
    shown["latent"] = "".join(store.latent(i)._repr_html_() for i in range(8))
    for name, text in shown.items():
        assert "老" in text, name
        assert PART in text, name
        assert not re.search(r"\\x[89a-f]", text), name


def rendered(table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_the_exported_contexts_have_no_empty_token(chinese_store, tmp_path):
    _, store = chinese_store
    out = store.export("neuronpedia", tmp_path, set_name="set", creator_id="me", model_id="m")
    lines = gzip.decompress((out / "activations" / "batch-0.jsonl.gz").read_bytes()).decode().splitlines()
    tokens = [token for line in lines for token in json.loads(line)["tokens"]]
    assert PART in tokens
    assert "" not in tokens
    assert not any("\\x" in token or "\ufffd" in token for token in tokens)


def test_a_saved_store_shows_the_same(chinese_store, tmp_path):
    _, store = chinese_store
    loaded = sl.FeatureStore.load(store.save(tmp_path / "store"))
    assert loaded.top_examples(0) == store.top_examples(0)
    assert loaded.vocabulary.parts == store.vocabulary.parts


def test_the_token_baseline_tells_parts_of_characters_apart(chinese_store, random_lm):
    """By what they show, all tokens that begin a character would be one."""
    d, _ = chinese_store
    text = "".join(TEXTS.values())
    store = sl.FeatureStore.build(d, random_lm, [text[i:] + text[:i] for i in range(0, len(text), 2)], window=(1, 1))
    by_numbers = sl.FeatureStore(store.info, store.tensors, store.weights, [str(i) for i in range(len(store.vocabulary))])
    latents = [i for i in range(store.info.d_sae) if 50 < store.tensors.count[i] < store.info.n_tokens / 5]
    assert len(latents) > 5
    blocks = {latent: trials_of(store, latent, "detection", 20, 0) for latent in latents}
    blocks = {latent: of for latent, of in blocks.items() if not isinstance(of, str)}  # those with enough contexts
    assert len(blocks) > 5
    for latent, of in blocks.items():
        sheet = Sheet(latent, "detection", "", shown_contexts(store, latent).all, in_questions(of, 5))
        assert by_tokens(store, sheet) == by_tokens(by_numbers, sheet)


@pytest.mark.parametrize(
    ("name", "text", "piece"),
    [
        ("fallback_bpe", " he", "▁he"),
        ("fallback_bpe", "Pa", "▁Pa"),  # no other token is it
        ("fallback_bpe", "\n", "<0x0A>"),
        ("fallback_bpe", "<s>", "<s>"),
        ("fallback_bpe", "A", "A"),
        ("fallback_unigram", " he", "▁he"),
        ("fallback_unigram", "é", "é"),
        ("word_piece", " he", "he"),
        ("word_piece", "ing", "##ing"),
        ("end_of_word", " he", "he</w>"),
        ("end_of_word", "he ", "he</w>"),
        ("byte_level", " he", "Ġhe"),
    ],
)
def test_a_token_is_found_by_its_text_inside_a_sentence(name, text, piece, tokenizers):
    lm = model(tokenizers[name])
    wanted = tokenizers[name].get_vocab()[piece]
    assert token_id(lm, text) == token_id(lm, wanted) == wanted


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("fallback_bpe", "he", r"matches several tokens of pieces: \d+ \('he'\) or \d+ \(' he'\); give the id"),
        ("fallback_bpe", "He", r"'He' is not one token of pieces: \[' ', 'H', 'e'\]; did you mean ' he' or 'he'\?"),
        ("fallback_bpe", "老", r"is not one token of pieces: \[' ', '', '', '老'\]$"),
        ("word_piece", "é", r"'é' is not one token of pieces: \['\[UNK\]'\]$"),
        ("byte_level", " he said", r"is not one token of pieces: \[' he', ' said'\]$"),
    ],
)
def test_an_unclear_token_is_refused_with_its_pieces_and_what_is_near(name, text, said, tokenizers):
    with pytest.raises(ConfigError, match=said):
        token_id(model(tokenizers[name]), text)


def test_metrics_and_latents_by_the_text_of_a_token(tokenizers):
    lm = model(tokenizers["fallback_bpe"])
    d = sl.Dictionary.create("topk", reads=sl.Port(hook="blocks.1.hook_resid_pre", width=16), d_sae=24, options={"k": 4})
    he, she = (tokenizers["fallback_bpe"].get_vocab()[piece] for piece in ("▁he", "▁she"))
    by_text, by_id = (sl.attribute(d, lm, "A he, she", pair, ablation=False) for pair in ((" he", " she"), (he, she)))
    assert by_text.metric == by_id.metric == "logit of ' he' − logit of ' she'"
    assert torch.equal(by_text.gradient, by_id.gradient)
    by_text, by_id = (sl.attribute(d, lm, "A he", LogProb(token), ablation=False) for token in (" he", he))
    assert torch.equal(by_text.value, by_id.value)
    store = sl.FeatureStore.build(d, lm, ["she saw he, 老"] * 3)
    wanted = (store.weights.promoted == he).any(1).nonzero().flatten().tolist()
    assert sorted(latent for latent, _ in store.promoting(" he")) == wanted != []
    with pytest.raises(UserError, match=r"'He' is not a token of pieces; did you mean ' he' or 'he'\?"):
        store.promoting("He")
