"""The report on a plugin, one line per check."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from saelens_lite.errors import PluginError
from saelens_lite.tables import Result, columns_of, grid

Status = Literal["ok", "failed", "warning", "not checked"]


class CheckFailed(Exception):
    """A failed check. The message says the expectation, the observation and the remedy."""


class NotChecked(Exception):
    """A check that does not apply or could not run. The message is the reason."""


class Warned(Exception):
    """A weakness that does not fail the check."""


class Check(NamedTuple):
    """One check and its result: a number, or the fault and its remedy."""

    name: str
    status: Status
    found: str


@dataclass(frozen=True)
class PluginReport(Result):
    """The result of `check_plugin`. `print(report)` shows one line per check."""

    plugin: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "failed")

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

    def raise_if_failed(self) -> None:
        """Raise if a check failed.

        Raises:
            PluginError: at least one check failed. The message lists all failures.
        """
        if self.failed:
            faults = "\n".join(f"  {check.name}: {check.found}" for check in self.failed)
            raise PluginError(f"{self.plugin} fails {len(self.failed)} of {len(self.checks)} checks\n{faults}")

    def summary(self) -> str:
        """Return the number of checks by result: «14 ok, 1 not checked»."""
        statuses = [check.status for check in self.checks]
        return ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(sorted(statuses)))

    def columns(self) -> dict[str, list[Any]]:
        """Return the checks, column by column."""
        return columns_of(Check, self.checks)

    def table(self) -> Any:
        """Return a rich table with one line per check."""
        from rich.text import Text

        colours = {"ok": "green", "failed": "red", "warning": "yellow", "not checked": "dim"}
        return grid(
            ("check", "status", "found"),
            [(check.name, Text(check.status, style=colours[check.status]), check.found) for check in self.checks],
            title=f"{self.plugin}: {self.summary()}",
            column=lambda title: {"overflow": "fold", "no_wrap": title == "status"},
            collapse_padding=True,
        )

    def __repr__(self) -> str:
        return str(self)
