"""A latent and a store as HTML: the numbers of the summary, hostile strings as text, nothing that acts on the notebook."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import saelens_lite as sl
from saelens_lite.features import Example, ExampleGroup, LatentSummary, Partner
from saelens_lite.features.html import quoted, shade, visible
from saelens_lite.features.label import Label

HOSTILE = [
    "</script><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "<img src=x onerror=alert(1)>",
    "\u202eevil\x1b[31m",
]
TAGS = {"div", "span", "b", "svg", "rect", "details", "summary", "table", "tr", "td"}
ATTRIBUTES = {
    "style", "title", "open", "viewbox", "preserveaspectratio", "role", "aria-label",
    "x", "y", "width", "height", "fill", "fill-opacity",
}  # fmt: skip


class Page(HTMLParser):
    """The parts of a page: tags, attributes, text without breaks, and the elements of one kind with their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def each(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.elements if found == tag]

    def check(self) -> "Page":
        assert {tag for tag, _ in self.elements} <= TAGS
        assert {name for _, attributes in self.elements for name in attributes} <= ATTRIBUTES
        assert not any("url" in (attributes.get("style") or "") for _, attributes in self.elements)
        assert not re.search("[\u202e\x1b]", self.text)
        return self


def example(tokens: list[str], values: list[float]) -> Example:
    peak = values.index(max(values))
    return Example(tuple(tokens), tuple(values), peak, values[peak], 3, 4)


def summary(strings: list[str], **changes) -> LatentSummary:
    """Return a latent in which every string is one of those given."""
    contexts = [example(strings, [0.5 * i for i in range(len(strings))])]
    pairs = [(token, 0.25) for token in strings]
    latent = LatentSummary(
        latent=12, label=strings[0], count=1234, density=0.0125, max=2.0, mean=0.75, std=0.5, skew=0.1, kurtosis=0.2,
        histogram=[4, 0, 2, 1], bin_width=0.5, promoted=pairs, suppressed=pairs, examples=contexts,
        groups=[ExampleGroup(1.0, 2.0, 0.2, contexts)], random=contexts, positions=[],
        partners=[Partner(99, 7, 1.5)], stability=0.875, similar=[(77, 0.625)],
    )  # fmt: skip
    return replace(latent, **changes)


def test_hostile_strings_stay_text():
    page = Page(summary(HOSTILE)._repr_html_()).check()
    for string in HOSTILE:
        assert page.text.count(visible(string)) == 5 + (string == HOSTILE[0])  # promoted, suppressed, three contexts; label


def test_a_card_names_the_origin_of_a_hostile_label():
    own, imported = (Page(summary(["a"], label=label)._repr_html_()).check() for label in ("x", Label("x", *HOSTILE[:2])))
    assert visible(f"(by {HOSTILE[1]}, {HOSTILE[0]})") in imported.text
    assert [tag for tag, *_ in imported.elements].count("span") == [tag for tag, *_ in own.elements].count("span") + 1


def test_a_card_has_the_figures():
    page = Page(summary([" a", "b\n", "c\t"])._repr_html_()).check()
    for figure in (
        "1,234 tokens",
        "1.25 %",
        "mean 0.75",
        "largest 2",
        "stability 0.88",
        "1 to 2, 20% of its activations",
        "99",
        "77",
    ):
        assert figure in page.text
    assert [(float(rect["x"]), float(rect["height"])) for rect in page.each("rect")] == [(0, 100), (2, 50), (3, 25)]
    assert [("open" in details) for details in page.each("details")] == [True, False, False]
    shaded = [span["style"] for span in page.each("span") if "background" in span.get("style", "")]
    assert [re.search(r"[\d.]+\)", style)[0] for style in shaded[:2]] == ["0.16)", "0.33)"]
    assert ["underline" in style for style in shaded[:2]] == [False, True]
    assert "b⏎" in page.text
    assert "c⇥" in page.text


def test_a_card_of_a_latent_that_never_fires_or_acts_on_no_token():
    nothing = {"promoted": [], "suppressed": [], "examples": [], "groups": [], "random": [], "partners": []}
    page = Page(summary(["a"], label=None, count=0, max=0.0, stability=None, **nothing)._repr_html_()).check()
    assert "never fires" in page.text
    assert not page.each("svg")
    assert not page.each("details")
    assert "promotes" not in page.text


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" a", " a"),
        ("\n\n", "⏎⏎"),
        ("\x00", "\\x00"),
        ("\u200b", "\\u200b"),
        ("é", "é"),
        ("\xa0", "␣"),
        ("\u0301s", "◌\u0301s"),
        (" ", "·"),
        ("\n  ", "⏎··"),
        ("", "‥"),  # a part of a character that a later token completes
    ],
)
def test_what_does_not_show_is_made_visible(token, shown):
    assert visible(token) == shown


def test_bytes_that_are_no_characters_read_the_same_everywhere():
    assert quoted(r"\xc3") == r"'\xc3'"
    assert quoted(" \n") == "'·⏎'"


def test_shades_have_a_sign_and_an_end():
    assert shade(2.0) == shade(1.0) != shade(-1.0)
    assert shade(0.0).endswith("0.00)")


def test_an_overview_of_a_store(random_lm):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook="blocks.1.hook_resid_pre", width=48), d_sae=96, options={"k": 6})
    d.b_enc.data[50:] = -1e4
    store = sl.FeatureStore.build(d, random_lm, ["It was the best of times, it was the worst"])
    densest = int(store.density.argmax())
    store.label(densest, HOSTILE[0])
    html = store._repr_html_()
    page = Page(html).check()
    assert HOSTILE[0] in page.text
    assert f"{int(store.never_fires.sum())} never do; 1 have a label" in page.text
    assert "6 fire on a token on average" in page.text
    heights = [float(rect["height"]) for rect in page.each("rect")]
    assert max(heights) == 100
    rows = re.findall(r"<b>(\d+)</b>", html)
    assert int(rows[0]) == densest
    assert len(rows) == 10
    assert not any(store.never_fires[int(row)] for row in rows)


def test_the_card_of_a_real_latent(random_lm):
    d = sl.Dictionary.create("topk", reads=sl.Port(hook="blocks.1.hook_resid_pre", width=48), d_sae=96, options={"k": 6})
    store = sl.FeatureStore.build(d, random_lm, ["It was the best of times, it was the worst"])
    latent = store.latent(int(store.density.argmax()))
    page = Page(latent._repr_html_()).check()
    assert page.text.count("".join(latent.examples[0].tokens)) >= 1
    assert len(page.each("details")) == 2 + len(latent.groups)
