"""Check a plugin: the conformance kit for sparsity rules, formats, loggers and explainers. It needs no test framework.

```python
from saelens_lite.testing import check_plugin


def test_my_rule():
    check_plugin(MyRule, options={"k": 4}).raise_if_failed()
```

For a rule, it checks gradients, saving, resuming, batches in which nothing fires, that the same seed gives the same bytes, and
more. For an explainer, it checks that a question has nothing of the contexts that are kept for scores, and quotes the text as
data. On the command line, `saelens-lite plugins --check NAME` checks an installed plugin.
"""

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from saelens_lite import registry
from saelens_lite.errors import PluginError
from saelens_lite.features.explainers import Explainer
from saelens_lite.formats import Format
from saelens_lite.loggers import Logger
from saelens_lite.sparsity import Sparsity
from saelens_lite.testing import explainers, formats, loggers, rules
from saelens_lite.testing.report import Check, CheckFailed, NotChecked, PluginReport, Warned

__all__ = ["Check", "PluginReport", "check_plugin"]


def check_plugin(
    plugin: type,
    *,
    options: dict[str, Any] | None = None,
    d_in: int = 32,
    d_sae: int = 96,
    planted: float | None = 0.5,
) -> PluginReport:
    """Check a plugin against its contract. This takes seconds.

    plugin: the class of a sparsity rule, a file format, a logger or an explainer, registered or not.
    options: arguments of the Config of a rule or an explainer.
    planted: required cosine between rows of W_dec and 96 planted directions, 3 of which make up each activation, on a scale
    from the chance level of an untrained dictionary (0) to 1. The requirement is lower if more latents fire than needed. None
    skips this check, for rules that do not suit such data.

    A logger starts with the configuration of this machine, so set WANDB_MODE=offline or the like first.

    Raises:
        PluginError: the plugin is of another kind, or options were given for a format or logger.
    """
    if issubclass(plugin, Sparsity):
        with _known_by_name(plugin) as name:
            lab = rules.Lab(plugin, name, options or {}, d_in, d_sae, planted)
            return PluginReport(f"sparsity rule {plugin.__qualname__}", _results(rules.CHECKS, lab))
    if issubclass(plugin, Explainer):
        with _known_by_name(plugin) as name:
            bench = explainers.Bench(plugin, name, options or {})
            return PluginReport(f"explainer {plugin.__qualname__}", _results(explainers.CHECKS, bench))
    for base, kind, module in ((Format, "format", formats), (Logger, "logger", loggers)):
        if issubclass(plugin, base):
            if options:
                raise PluginError(f"options = {options!r} were given for {plugin.__qualname__}, but {kind}s take no options")
            with _known_by_name(plugin) as name:
                return PluginReport(f"{kind} {plugin.__qualname__}", _results(module.CHECKS, module.Bench(plugin, name)))
    raise PluginError(
        f"{plugin!r} cannot be checked: give a class derived from saelens_lite.Sparsity, .Format, .Logger or .Explainer"
    )


def _results(checks: Sequence[tuple[str, Callable[[Any], str], tuple[str, ...]]], subject: Any) -> tuple[Check, ...]:
    """Return the result of every check, in order. A check that needs a failed one is skipped."""
    results: dict[str, Check] = {}
    for name, check, needs in checks:
        broken = [need for need in needs if results[need].status in ("failed", "not checked")]
        if broken:
            results[name] = Check(name, "not checked", f"needs: {', '.join(broken)}")
        else:
            results[name] = Check(name, *_verdict(check, subject))
    return tuple(results.values())


def _verdict(check: Callable[[Any], str], subject: Any) -> tuple[str, str]:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                1234
            )  # differs from every seed of training, so that redrawn random numbers do not pass as stored ones
            return "ok", check(subject)
    except NotChecked as reason:
        return "not checked", str(reason)
    except Warned as warning:
        return "warning", str(warning)
    except CheckFailed as verdict:
        return "failed", str(verdict)
    except Exception as error:  # whatever a plugin raises is a finding
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        return "failed", f"raised {type(error).__name__}: {' '.join(str(error).split())} ({where}, {place.name})"


@contextmanager
def _known_by_name(plugin: type) -> Iterator[str]:
    """Yield the name that loads a plugin. A plugin without a name gets one in the block."""
    own = plugin.__dict__.get("plugin_name")
    if own is not None and _loads(own, plugin):
        yield own
        return
    name = f"check_plugin.{plugin.__name__}"
    registry.register(name)(plugin)
    try:
        yield name
    finally:
        registry.unregister(name, plugin.plugin_kind)
        if own is None:
            del plugin.plugin_name
        else:
            plugin.plugin_name = own


def _loads(name: str, plugin: type) -> bool:
    """Return whether the name loads this plugin."""
    try:
        return registry.load(name, plugin.plugin_kind) is plugin
    except PluginError:  # unknown here, or not allowed
        return False
