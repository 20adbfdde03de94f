"""A live prompt in a notebook: type a text, see its latents, move sliders, read the continuation.

The page (live.js) holds no logic. It sets `prompt`, `by`, `edits` and `asked`; Python answers with `view`, `continuation` or
`error`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any

from saelens_lite.dictionary import Dictionary
from saelens_lite.errors import ConfigError, SaelensLiteError
from saelens_lite.features import FeatureStore
from saelens_lite.features.html import visible
from saelens_lite.interventions import Add, steer
from saelens_lite.interventions.site import Site
from saelens_lite.interventions.steering import Steered
from saelens_lite.model import AnyModel, LanguageModel, as_model
from saelens_lite.ports import PortNames
from saelens_lite.views.prompt import ORDERS, PromptRow, PromptView, about_row, prompt_view

REACH = 3  # end of a slider, as a multiple of the largest known activation of the latent


class LivePrompt:
    """A prompt in a notebook, with its latents and a slider for each.

    A slider adds to the code of a latent at every counted position of the prompt and the continuation, and keeps the error
    term. In Python, `view` and `steered` hold the contents of the page.

    Raises:
        ConfigError: anywidget is not installed, the store belongs to another dictionary, or as for `prompt_view`.
        HookError, ShapeError, TextError: the model lacks the hook, a width does not fit, or the text is empty.
    """

    view: PromptView
    steered: Steered | None = None

    def __init__(
        self,
        dictionary: Dictionary,
        lm: AnyModel | Mapping[str, LanguageModel],
        store: FeatureStore | None = None,
        *,
        prompt: str = "The old man looked at",
        metric: Any = "loss",
        hook: str | None = None,
        ports: PortNames = None,
        in_model: str | None = None,
        top: int = 8,
        max_new_tokens: int = 30,
        temperature: float | int = 0.8,
        seed: int = 0,
    ):
        self.dictionary, self.lm, self.store = dictionary, as_model(lm), store
        self._chosen = {"hook": hook, "ports": ports, "in_model": in_model}
        self._viewing = {"store": store, "top": top, **self._chosen}
        self._writer = Site(dictionary, self.lm, **self._chosen).lm
        self._metric = metric
        self._writing = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        self.widget = _widget_class()(prompt=prompt, orders=[by for by in ORDERS if by != "relative" or store is not None])
        self._look()
        self.widget.observe(self._on_prompt, ["prompt", "by"])
        self.widget.observe(self._on_request, ["edits", "asked"])

    @property
    def edits(self) -> list[Add]:
        """The edits of the sliders."""
        return [Add(int(latent), amount) for latent, amount in self.widget.edits if amount]

    def _on_prompt(self, _: Any) -> None:
        with self._answering():
            self._look()

    def _on_request(self, _: Any) -> None:
        with self._answering():
            self._write()

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Show in the page that Python is at work. Errors appear in the page; errors that are not ours are also raised."""
        self.widget.error, self.widget.busy = "", True
        try:
            yield
        except SaelensLiteError as error:
            self.widget.error = str(error)
        except Exception as error:
            self.widget.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.widget.busy = False

    def _look(self) -> None:
        """Show the latents of the prompt in the page."""
        widget = self.widget
        metric = self._metric if widget.by == "attribution" else None
        self.view = prompt_view(self.dictionary, self.lm, widget.prompt, widget.by, metric=metric, **self._viewing)
        widget.view = self._shown(self.view)
        self.steered, widget.continuation = None, {}

    def _shown(self, view: PromptView) -> dict[str, Any]:
        """Return the data of a view for the page."""
        rows = [
            {
                "position": row.position,
                "latent": row.latent,
                "score": view.score(row),
                "about": about_row(row),
                "reach": self._reach(row),
            }
            for row in view.rows
        ]
        return {"title": view.title, "tokens": [visible(token) for token in view.tokens], "shades": view.shades, "rows": rows}

    def _reach(self, row: PromptRow) -> float:
        """Return the end of a latent's slider."""
        largest = 0.0 if self.store is None else float(self.store.tensors.top_value[row.latent, 0])
        return REACH * max(row.activation, largest)

    def _write(self) -> None:
        """Show the model's continuation in the page."""
        prompt, edits = self.widget.prompt, self.edits
        if edits:
            self.steered = steer(self.dictionary, self.lm, prompt, edits, **self._chosen, **self._writing)
        else:
            plain = self._writer.generate(prompt, **self._writing)
            self.steered = Steered(plain, plain, 0.0)
        self.widget.continuation = {name: getattr(self.steered, name) for name in ("plain", "edited", "kl")}

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.widget._repr_mimebundle_(**kwargs)


@cache
def _widget_class() -> type:
    """Return the class of the widget, which holds the state that Python and the page share."""
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise ConfigError("a live prompt needs anywidget: pip install 'saelens-lite[widget]'") from None

    here = files("saelens_lite") / "views"

    class LivePromptWidget(anywidget.AnyWidget):
        _esm = (here / "live.js").read_text(encoding="utf-8")
        _css = (here / "live.css").read_text(encoding="utf-8")
        prompt = traitlets.Unicode().tag(sync=True)
        by = traitlets.Unicode("activation").tag(sync=True)
        orders = traitlets.List().tag(sync=True)
        edits = traitlets.List().tag(sync=True)  # [latent, amount] of each slider
        asked = traitlets.Int().tag(sync=True)  # number of presses of "Continue"
        view = traitlets.Dict().tag(sync=True)
        continuation = traitlets.Dict().tag(sync=True)
        error = traitlets.Unicode().tag(sync=True)
        busy = traitlets.Bool().tag(sync=True)

    return LivePromptWidget
