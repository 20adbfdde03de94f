"""The prompt view against dense codes, its table and page with hostile tokens, and the live prompt without a browser."""

import copy
import re
import sys
from html.parser import HTMLParser
from io import StringIO

import pytest
import torch
from rich.console import Console

import saelens_lite as sl
from saelens_lite.errors import ConfigError, NonFiniteError, TextError
from saelens_lite.features.html import quoted
from saelens_lite.interventions import LogProb
from saelens_lite.views import PromptRow, PromptView
from saelens_lite.views.live import _widget_class

HOOK, TARGET = "blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"
STREAM = "blocks.1.hook_resid_pre"
PROMPT = "The old man\n said é that"
TOP = 4


def made(kind: str) -> sl.Dictionary:
    if kind == "transcoder":
        reads, writes = (sl.Port(hook=hook, width=48) for hook in (HOOK, TARGET))
        return sl.Dictionary.create("topk", reads=reads, writes=writes, d_sae=96, options={"k": 6})
    return sl.Dictionary.create("topk", reads=sl.Port(hook=STREAM, width=48), d_sae=96, options={"k": 6})


@pytest.fixture(scope="module", params=["autoencoder", "transcoder"])
def any_dictionary(request):
    """An autoencoder and a transcoder of random directions."""
    return made(request.param)


@pytest.fixture(scope="module")
def dictionary():
    """An autoencoder of random directions."""
    return made("autoencoder")


@pytest.fixture(scope="module")
def store(dictionary, random_lm):
    """A store of so little text that some latents never fire in it."""
    store = sl.FeatureStore.build(dictionary, random_lm, ["It was the best of times"])
    store.label(7, "sevens")
    return store


@torch.no_grad()
def dense(dictionary, lm, text: str) -> torch.Tensor:
    """Return codes [pos d_sae], position 0 left out by zeros."""
    hook = dictionary.hook
    codes = dictionary.encode(lm.run(text, hook)[hook][0]).to_dense()
    return codes * (torch.arange(len(codes)) > 0)[:, None]


def test_by_activation_the_largest_codes_come_first(any_dictionary, random_lm):
    view = sl.prompt_view(any_dictionary, random_lm, PROMPT, top=TOP)
    codes = dense(any_dictionary, random_lm, PROMPT)
    tokens = random_lm.to_tokens(PROMPT).tokens[0].tolist()
    assert "".join(view.tokens[1:]) == PROMPT
    assert len(view.tokens) == len(tokens) == len(codes)
    assert view.at(0) == []
    for position in range(1, len(tokens)):
        best = codes[position].topk(TOP)
        rows = view.at(position)
        assert [row.latent for row in rows] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([row.activation for row in rows]), best.values)
        assert {row.token for row in rows} == {view.tokens[position]}
    assert {row[4:] for row in view.rows} == {(None, None, None, None)}
    assert view.strongest(1)[0].activation == pytest.approx(float(codes.max()))
    torch.testing.assert_close(torch.tensor(view.shades), codes.amax(1) / codes.max())


def test_relative_is_the_share_of_the_largest_activation_in_the_store(dictionary, random_lm, store):
    view = sl.prompt_view(dictionary, random_lm, PROMPT, "relative", store=store, top=96)
    largest = dense(dictionary, random_lm, "It was the best of times").amax(0)
    codes = dense(dictionary, random_lm, PROMPT)
    assert len(view.rows) == int((codes > 0).sum())
    unseen = [row for row in view.rows if row.relative is None]
    assert unseen
    assert all(largest[row.latent] == 0 and view.score(row) == 0 for row in unseen)
    for position in range(1, len(view.tokens)):
        rows = view.at(position)
        known = [row.relative for row in rows if row.relative is not None]
        assert known == sorted(known, reverse=True)
        assert [row.relative for row in rows[: len(known)]] == known
        for row in rows[: len(known)]:
            assert row.relative == pytest.approx(float(codes[position, row.latent] / largest[row.latent]), rel=1e-5)
    assert {row.label for row in view.rows if row.latent == 7} <= {"sevens"}
    assert {row.promoted for row in view.rows if row.latent == 7} <= {store.promoted(7)[0][0]}
    assert all(row.label is None and row.promoted for row in view.rows if row.latent != 7)


@pytest.mark.parametrize("way", ["gradient", "ablation", "direct"])
def test_by_attribution_the_largest_effects_of_either_sign_come_first(dictionary, random_lm, way):
    metric = LogProb((3, 5))
    view = sl.prompt_view(dictionary, random_lm, PROMPT, "attribution", metric=metric, way=way, top=TOP)
    found = sl.attribute(dictionary, random_lm, PROMPT, metric)
    for position in range(1, len(view.tokens)):
        here = [
            (latent, effect)
            for place, latent, effect in zip(
                found.position.tolist(), found.latent.tolist(), found.effects[way].tolist(), strict=True
            )
            if place == position
        ]
        best = sorted(here, key=lambda entry: -abs(entry[1]))[:TOP]
        assert [(row.latent, row.attribution) for row in view.at(position)] == [(i, pytest.approx(x)) for i, x in best]
    assert view.metric == found.metric
    assert min(view.shades) < 0
    assert max(map(abs, view.shades)) == 1


def test_the_loss_is_the_metric_unless_another_is_given(dictionary, random_lm):
    view = sl.prompt_view(dictionary, random_lm, PROMPT, "attribution")
    loss = sl.prompt_view(dictionary, random_lm, PROMPT, metric="loss", top=96)
    assert (view.metric, view.by, loss.by) == ("loss", "attribution", "activation")
    known = {(row.position, row.latent): row.attribution for row in loss.rows}
    assert all(known[row.position, row.latent] == row.attribution for row in view.rows)


def test_token_ids_will_do_and_everything_is_plain_data(dictionary, random_lm):
    tokens = random_lm.to_tokens(PROMPT).tokens[0]
    assert sl.prompt_view(dictionary, random_lm, tokens) == sl.prompt_view(dictionary, random_lm, PROMPT)
    content = sl.prompt_view(dictionary, random_lm, PROMPT, top=1).to_dict()
    assert content["rows"][0].keys() == set(PromptRow._fields)
    assert [row["position"] for row in content["rows"]] == list(range(1, len(tokens)))


def test_errors(dictionary, random_lm, store):
    def view(*args, **settings):
        return sl.prompt_view(dictionary, random_lm, *args, **settings)

    with pytest.raises(TextError, match="empty text"):
        view("")
    with pytest.raises(ConfigError, match=r"by = 'activations'; expected .*did you mean activation"):
        view(PROMPT, "activations")
    with pytest.raises(ConfigError, match="give store="):
        view(PROMPT, "relative")
    with pytest.raises(ConfigError, match="expected 1 or more"):
        view(PROMPT, top=0)
    with pytest.raises(ConfigError, match="expected 'loss', a pair of tokens"):
        view(PROMPT, metric="los")
    with pytest.raises(ConfigError, match="the store is of another dictionary"):
        sl.prompt_view(made("transcoder"), random_lm, PROMPT, store=store)
    with pytest.raises(ConfigError, match="a hook on the residual stream"):
        sl.prompt_view(made("transcoder"), random_lm, PROMPT, "attribution", way="direct")
    broken = copy.deepcopy(random_lm.module)
    broken.transformer.h[0].mlp.c_proj.bias.data[3] = torch.inf
    for metric in (None, "loss"):
        with pytest.raises(NonFiniteError, match="activations or codes of the prompt"):
            sl.prompt_view(dictionary, sl.LanguageModel(broken, random_lm.tokenizer, name="broken"), PROMPT, metric=metric)


HOSTILE = [
    "</script><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "<img src=x onerror=alert(1)>",
    "\u202eevil\x1b[31m [/b]",
    "\n",
]


def hostile_view(by: str = "attribution") -> PromptView:
    """Return every string that comes from outside is hostile."""
    rows = [
        PromptRow(i, token, 10 + i, 1.5, None if i == 1 else 0.5, (-1) ** i * 0.25, token, token)
        for i, token in enumerate(HOSTILE)
    ]
    return PromptView(HOSTILE[0], HOSTILE[1], by, HOSTILE[3], tuple(HOSTILE), tuple(rows))


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.titles = set(), set(), "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("by", ["activation", "relative", "attribution"])
def test_hostile_strings_stay_text(by):
    page = Page(hostile_view(by)._repr_html_())
    assert page.tags == {"div", "span", "table", "tr", "td", "b"}
    assert page.attributes == {"style", "title"}
    for shown in [*HOSTILE[:3], "\\u202eevil\\x1b[31m [/b]", "⏎"]:
        assert page.text.count(shown) >= 2
        assert any(shown in title for title in page.titles)
    assert not re.search(r"\b0%", page.text)  # a share that is not known
    assert not re.search("[\u202e\x1b]", page.text + "".join(page.titles))


def test_small_effects_are_not_shown_as_none():
    row = PromptRow(0, "a", 3, 1.0, None, -2.5e-6, None, None)
    view = PromptView("model", "hook", "attribution", "loss", ("a",), (row,))
    assert "-2.5e-06" in Page(view._repr_html_()).text
    assert "-2.5e-06" in printed(view)


def printed(view: PromptView) -> str:
    out = StringIO()
    Console(file=out, width=200, force_terminal=False).print(view)
    return out.getvalue()


def test_the_table_has_the_numbers_that_are_known(dictionary, random_lm, store):
    plain = printed(sl.prompt_view(dictionary, random_lm, PROMPT, top=2))
    assert "relative" not in plain
    assert "attribution" not in plain
    view = sl.prompt_view(dictionary, random_lm, PROMPT, "relative", store=store, metric="loss", top=2)
    table = printed(view)
    for row in view.rows:
        share = "" if row.relative is None else rf"{row.relative:.0%}\s+"
        assert re.search(rf"\b{row.latent}\s+{row.activation:.3g}\s+{share}\{row.attribution:+.3g}", table)
    assert "'⏎'" in table
    assert not re.search("[\u202e\x1b]", printed(hostile_view()))


def test_a_prompt_in_which_nothing_fires(random_lm):
    silent = made("autoencoder")
    silent.b_enc.data.fill_(-1e6)
    view = sl.prompt_view(silent, random_lm, PROMPT)
    assert view.rows == ()
    assert view.shades == [0] * len(view.tokens)
    assert view.title in " ".join(printed(view).split())
    assert Page(view._repr_html_()).tags == {"div", "span", "table"}


@pytest.fixture
def live(dictionary, random_lm):
    """A live prompt."""
    return sl.LivePrompt(dictionary, random_lm, prompt=PROMPT, top=2, max_new_tokens=4)


def test_a_live_prompt_shows_the_view_of_its_text(live, dictionary, random_lm):
    assert live.view == sl.prompt_view(dictionary, random_lm, PROMPT, top=2)
    shown = live.widget.view
    assert [row["score"] for row in shown["rows"]] == [row.activation for row in live.view.rows]
    assert shown["tokens"][4] == "⏎"
    assert shown["shades"] == live.view.shades
    assert live.widget.orders == ["activation", "attribution"]
    live.widget.prompt = "It was"
    live.widget.by = "attribution"
    assert live.view == sl.prompt_view(dictionary, random_lm, "It was", "attribution", top=2)
    assert live.widget.view["title"] == live.view.title
    assert (live.widget.error, live.widget.busy) == ("", False)


def test_a_live_prompt_with_a_store(dictionary, random_lm, store):
    live = sl.LivePrompt(dictionary, random_lm, store, prompt=PROMPT)
    live.widget.by = "relative"
    assert live.view == sl.prompt_view(dictionary, random_lm, PROMPT, "relative", store=store, top=8)
    for row, shown in zip(live.view.rows, live.widget.view["rows"], strict=True):
        assert shown["reach"] == pytest.approx(3 * max(row.activation, store.latent(row.latent).max))
        assert shown["about"].endswith(f"promotes {quoted(row.promoted)}")


def test_sliders_steer_as_edits_do(live, dictionary, random_lm):
    live.widget.edits = [[5, 40.0], [6, 0.0]]
    assert live.edits == [sl.Add(5, 40.0)]
    with random_lm.splice(dictionary, [sl.Add(5, 40.0)]):
        edited = random_lm.generate(PROMPT, 4)
    assert (live.steered.plain, live.steered.edited) == (random_lm.generate(PROMPT, 4), edited)
    assert live.steered.kl > 0
    assert live.widget.continuation == {"plain": live.steered.plain, "edited": edited, "kl": live.steered.kl}
    live.widget.edits = []
    assert live.widget.continuation == {"plain": live.steered.plain, "edited": live.steered.plain, "kl": 0}
    live.widget.prompt = "It was"
    assert live.steered is None
    assert live.widget.continuation == {}
    live.widget.asked += 1
    assert live.steered.plain == random_lm.generate("It was", 4)


def test_errors_are_shown_until_something_works(live):
    live.widget.prompt = ""
    assert "empty text" in live.widget.error
    live.widget.asked += 1
    assert "empty text" in live.widget.error
    assert not live.widget.busy
    live.widget.prompt = "It was"
    assert live.widget.error == ""
    live.widget.edits = [[960, 1.0]]
    assert live.widget.error == "no latent 960; this dictionary has latents 0 to 95"


def test_unexpected_errors_are_shown_and_raised(live, monkeypatch):
    monkeypatch.setattr(live.lm, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        live.widget.asked += 1
    assert live.widget.error == "ZeroDivisionError: division by zero"
    assert not live.widget.busy


def test_a_live_prompt_shows_itself(live):
    data, _ = live._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == live.widget.model_id
    assert "textContent" in live.widget._esm
    assert "innerHTML" not in live.widget._esm
    assert ".sl-live" in live.widget._css


def test_a_live_prompt_needs_anywidget_and_a_fitting_store(dictionary, random_lm, store, monkeypatch):
    with pytest.raises(ConfigError, match="the store is of another dictionary"):
        sl.LivePrompt(made("transcoder"), random_lm, store)
    with pytest.raises(TextError, match="empty text"):
        sl.LivePrompt(dictionary, random_lm, prompt="")
    _widget_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(ConfigError, match=r"pip install 'saelens-lite\[widget\]'"):
        sl.LivePrompt(dictionary, random_lm)
