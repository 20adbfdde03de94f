"""What the checks of a plugin found, one line a check."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from saelens_lite.errors import PluginError

Status = Literal["ok", "failed", "warning", "not checked"]


class CheckFailed(Exception):
    """A check's verdict, in one sentence or two: what was expected, what was found, what to do."""


class NotChecked(Exception):
    """A check does not apply, or could not be made; the reason."""


class Warned(Exception):
    """Something that works, and is not as it should be."""


class Check(NamedTuple):
    """One thing that was checked, and what was found: a figure, or what is wrong and what to do."""

    name: str
    status: Status
    found: str


@dataclass(frozen=True)
class PluginReport:
    """What `check_plugin` found. `print(report)` shows a line a check."""

    plugin: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "failed")

    def __getitem__(self, name: str) -> Check:
        return {check.name: check for check in self.checks}[name]

    def raise_if_failed(self) -> None:
        """Nothing, if no check failed.

        Raises:
            PluginError: some did; the message has them all.
        """
        if self.failed:
            faults = "\n".join(f"  {check.name}: {check.found}" for check in self.failed)
            raise PluginError(f"{self.plugin} fails {len(self.failed)} of {len(self.checks)} checks\n{faults}")

    def summary(self) -> str:
        """How many checks ended how: «14 ok, 1 not checked»."""
        found = [check.status for check in self.checks]
        return ", ".join(f"{found.count(status)} {status}" for status in dict.fromkeys(sorted(found)))

    def __str__(self) -> str:
        name_width, status_width = (max(len(check[column]) for check in self.checks) for column in (0, 1))
        lines = [f"{name:{name_width}}  {status:{status_width}}  {found}" for name, status, found in self.checks]
        return "\n".join([f"{self.plugin}: {self.summary()}", *lines])

    def __repr__(self) -> str:
        return str(self)
