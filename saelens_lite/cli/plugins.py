"""The command that lists plugins and checks them."""

import json
import sys
from typing import TYPE_CHECKING

from saelens_lite.cli.base import app, console, say
from saelens_lite.cli.options import PrintJson
from saelens_lite.errors import ConfigError, PluginError
from saelens_lite.tables import grid

if TYPE_CHECKING:
    from rich.table import Table

    from saelens_lite.registry import Finding


@app.command
def plugins(
    *,
    check: str | None = None,
    options: dict[str, str] | None = None,
    as_json: PrintJson = False,
) -> None:
    """List the installed plugins and say whether each can be loaded. With --check, test one against its contract.

    The environment variable SAELENS_LITE_PLUGINS restricts which plugins may be loaded: a comma-separated list of distributions
    and kind:name pairs, e.g. SAELENS_LITE_PLUGINS=my-rules,loggers:my_logger. Built-in plugins are always allowed. If the
    variable is unset, all plugins are allowed.

    Parameters
    ----------
    check
        Plugin to check: its name, or kind:name. Prints one line per check. The exit code is 1 if any check fails. A logger
        writes to its configured destination, so set WANDB_MODE=offline or the like first.
    options
        With --check: options of a sparsity rule, e.g. --options.k 4.
    """
    from saelens_lite import registry

    if options and not check:
        raise ConfigError("--options belong to the rule that is checked; add --check NAME")
    if check:
        _check(check, options or {}, as_json)
        return
    findings = [registry.check(plugin) for kind in registry.kinds() for plugin in registry.plugins(kind)]
    if as_json:
        say(json.dumps([_facts(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        console().print(_plugin_table(findings))


def _check(asked: str, options: dict[str, str], as_json: bool) -> None:
    """Print the findings of the conformance kit on a plugin. Exit with code 1 if a check fails."""
    from saelens_lite import registry
    from saelens_lite.config import parse_options
    from saelens_lite.testing import check_plugin

    kind, _, name = asked.rpartition(":")
    kinds = [kind] if kind else [k for k in registry.kinds() if any(p.name == asked for p in registry.plugins(k))]
    if len(kinds) > 1:
        raise PluginError(f"{asked!r} is the name of several plugins; choose one: {' or '.join(f'{k}:{name}' for k in kinds)}")
    report = check_plugin(registry.load(name, *kinds), options=parse_options(options))
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


def _plugin_table(findings: "list[Finding]") -> "Table":
    rows = []
    for finding in findings:
        p, status = finding.plugin, f"{finding.status}: {finding.why}" if finding.why else finding.status
        rows.append((p.name, p.kind, p.distribution, p.version, finding.paper, status))
    return grid(
        ("name", "kind", "distribution", "version", "paper", "status"),
        rows,
        column=lambda title: {"overflow": "fold", "no_wrap": title not in ("paper", "status")},
    )
