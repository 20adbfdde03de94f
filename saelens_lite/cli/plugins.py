"""The command that lists plugins, shows the options of a rule, and checks plugins."""

import json
import re
import sys
from typing import TYPE_CHECKING, Any

from saelens_lite.cli.base import app, console, say
from saelens_lite.cli.options import PrintJson
from saelens_lite.errors import ConfigError, PluginError, near_matches
from saelens_lite.tables import grid

if TYPE_CHECKING:
    from rich.table import Table

    from saelens_lite.registry import Finding, Plugin


@app.command
def plugins(
    name: str | None = None,
    *,
    check: str | None = None,
    options: dict[str, str] | None = None,
    as_json: PrintJson = False,
) -> None:
    """List the installed plugins, or show one with its options. With --check, test one against its contract.

    The environment variable SAELENS_LITE_PLUGINS restricts which plugins may be loaded: a comma-separated list of distributions
    and kind:name pairs, e.g. SAELENS_LITE_PLUGINS=my-rules,loggers:my_logger. Built-in plugins are always allowed. If the
    variable is unset, all plugins are allowed.

    Parameters
    ----------
    name
        Plugin to show: its name, or kind:name.
    check
        Plugin to check: its name, or kind:name. Prints one line per check. The exit code is 1 if any check fails. A logger
        writes to its configured destination, so set WANDB_MODE=offline or the like first.
    options
        With --check: options of a sparsity rule or of an explainer, e.g. --options.k 4.
    """
    from saelens_lite import registry

    if options and not check:
        raise ConfigError("--options belong to the rule that is checked; add --check NAME")
    if check:
        _check(_named(check), options or {}, as_json)
    elif name and as_json:
        say(json.dumps(_facts(_finding(_named(name))) | _options_as_json(_named(name)), indent=2, ensure_ascii=False))
    elif name:
        _show(_named(name))
    else:
        findings = [registry.check(plugin) for kind in registry.kinds() for plugin in registry.plugins(kind)]
        if as_json:
            say(json.dumps([_facts(finding) for finding in findings], indent=2, ensure_ascii=False))
        else:
            _list(findings)


def _named(asked: str) -> "Plugin":
    """Return the plugin called NAME or kind:NAME."""
    from saelens_lite import registry

    kind, _, name = asked.rpartition(":")
    if kind:
        return registry.find(name, kind)
    every = [plugin for k in registry.kinds() for plugin in registry.plugins(k)]
    kinds = sorted({plugin.kind for plugin in every if plugin.name == name})
    if len(kinds) > 1:
        raise PluginError(f"{asked!r} is the name of several plugins; choose one: {' or '.join(f'{k}:{name}' for k in kinds)}")
    if not kinds:
        known = [plugin.name for plugin in every]
        raise PluginError(f"no plugin is called {name!r}{near_matches(name, known) or '; known: ' + ', '.join(known)}")
    return registry.find(name, kinds[0])


def _check(plugin: "Plugin", options: dict[str, str], as_json: bool) -> None:
    """Print the findings of the conformance kit on a plugin. Exit with code 1 if a check fails."""
    from saelens_lite import registry
    from saelens_lite.config import parse_options
    from saelens_lite.testing import check_plugin

    report = check_plugin(registry.load(plugin.name, plugin.kind), options=parse_options(options))
    if as_json:
        say(json.dumps({"plugin": report.plugin, "checks": [c._asdict() for c in report.checks]}, indent=2, ensure_ascii=False))
    else:
        console().print(report)
    if not report.ok:
        sys.exit(1)


def _facts(finding: "Finding") -> dict[str, str]:
    """Return a finding as flat JSON."""
    p = finding.plugin
    origin = {"name": p.name, "kind": p.kind, "distribution": p.distribution, "version": p.version, "target": p.target}
    return origin | {"paper": finding.paper, "summary": finding.summary, "status": finding.status, "why": finding.why}


def _finding(plugin: "Plugin") -> "Finding":
    """Return what is known about a plugin. A rule is read from its source, so that torch is not imported."""
    from saelens_lite import registry
    from saelens_lite.rule_options import rule_of

    if plugin.kind != "sparsity":
        return registry.check(plugin)
    rule = rule_of(plugin)
    return registry.Finding(plugin, "ok", paper=rule.paper, summary=(rule.__doc__ or "").partition("\n")[0])


def _options_as_json(plugin: "Plugin") -> dict[str, Any]:
    from saelens_lite.rule_options import config_of, options_of

    return {"options": [o._asdict() for o in options_of(config_of(plugin.name))]} if plugin.kind == "sparsity" else {}


def _show(plugin: "Plugin") -> None:
    """Print what a plugin is; for a rule or an explainer, with its options."""
    finding = _finding(plugin)
    origin = f"{plugin.distribution} {plugin.version}".strip()
    lines = [f"{plugin.name} ({plugin.kind}, {origin})", finding.summary, finding.paper, finding.why]
    console().print("\n".join(line for line in lines if line), markup=False, soft_wrap=False)
    if plugin.kind == "sparsity":
        console().print(options_table(plugin.name))
    elif plugin.kind == "explainers" and finding.status == "ok":
        console().print(options_table(plugin.name, plugin.kind))


def options_table(name: str, kind: str = "sparsity") -> "Table":
    """Return a table of the options of a rule or of an explainer."""
    from saelens_lite import registry
    from saelens_lite.rule_options import config_of, options_of

    options = options_of(config_of(name) if kind == "sparsity" else registry.load(name, kind).Config)
    flags = f"options of {name}: --options.NAME VALUE" + ", or an [options] table in a file" * (kind == "sparsity")
    return grid(
        ("option", "type", "default", "meaning"),
        options,
        title=flags if options else f"{name} has no options",
        column=lambda title: {"overflow": "fold", "no_wrap": title in ("option", "default")},
    )


def options_of_all() -> "Table":
    """Return a table of the options of all rules that may be loaded, each with its default."""
    from saelens_lite import registry
    from saelens_lite.rule_options import options_of, rule_of

    rows = []
    for plugin in registry.plugins():
        if plugin.allowed:
            try:
                options = options_of(rule_of(plugin).Config)
            except PluginError:  # `saelens-lite plugins` tells why
                continue
            rows.append((plugin.name, ", ".join(f"{option.name} = {option.default}" for option in options)))
    caption = "--options.NAME VALUE sets one; `saelens-lite plugins RULE` explains them."
    return grid(
        ("rule", "options"), rows, title="Options of the sparsity rules, with their defaults", caption=caption,
        column=lambda title: {"no_wrap": title == "rule"},
    )  # fmt: skip


def _list(findings: "list[Finding]") -> None:
    """Print the plugins, grouped by kind; the status and the distribution only where they say something."""
    from saelens_lite import registry

    for kind in sorted(registry.kinds(), key=lambda kind: (kind != "sparsity", kind)):
        rows = [_row(finding) for finding in findings if finding.plugin.kind == kind]
        console().print(grid(("name", "meaning"), rows, title=kind, column=lambda title: {"no_wrap": title == "name"}))
    console().print("`saelens-lite plugins NAME` shows one of them, with the options of a rule.")


def _row(finding: "Finding") -> tuple[str, str]:
    from saelens_lite.registry import OWN_DISTRIBUTION

    plugin = finding.plugin
    parts = [finding.summary.rstrip("."), short_paper(finding.paper)]
    if plugin.distribution != OWN_DISTRIBUTION:
        parts.append(f"from {plugin.distribution} {plugin.version}".strip())
    if finding.status != "ok":
        parts.append(f"{finding.status}: {finding.why}")
    return plugin.name, "; ".join(part for part in parts if part)


def short_paper(paper: str) -> str:
    """Return the authors, the year and the arXiv id of a reference, or its beginning."""
    authors = re.match(r"(.+?\d{4})\b", paper)
    arxiv = re.search(r"arXiv:\d{4}\.\d{4,5}", paper)
    return ", ".join(part for part in (authors[1] if authors else paper[:40], arxiv[0] if arxiv else "") if part)
