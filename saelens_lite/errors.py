"""Errors: the exceptions of saelens_lite, and the near matches that their messages offer.

```text
SaelensLiteError                 everything this library raises on purpose
├── UserError                    the request cannot be carried out as asked
│   ├── ConfigError              unknown key, value out of range, contradictory options
│   │   └── SourceChangedError   a run is resumed on other activations than it was trained on
│   ├── ModelNotFoundError       no such model here, or no network to fetch it
│   ├── HookError                the model has no hook of that name
│   ├── TextError                no text, or nothing left of it after tokenising
│   ├── ShapeError               a tensor whose shape does not fit
│   ├── PluginError              a plugin that is unknown, broken, restricted, or claimed twice
│   ├── OutputExistsError        the output is already there
│   ├── CorruptFileError         a file that is damaged, truncated or of another kind
│   ├── LockedError              another process is at work on the same output
│   └── BudgetError              questions to a chat model would cost more than its limit
│       └── BudgetReachedError   the limit was reached in the middle; what is done is kept
├── HubError                     the Hugging Face Hub did not do what it was asked
│   ├── HubNotFoundError         no such repository, revision or folder that you may see
│   ├── HubAccessError           no token, or one that may not do this
│   ├── HubConflictError         the repository has changed since it was read
│   └── HubUnreachableError      no network, no answer, or a Hub in trouble
├── ChatError                    the endpoint of a chat model did not do what it was asked
│   ├── ChatAccessError          no key, one that may not do this, or no credit
│   └── ChatUnreachableError     no network, a wrong address, or an endpoint in trouble
├── NonFiniteError               NaN or infinity where numbers were expected
├── ProcessLostError             one of several processes ended or does not answer
└── DiskFullError                the disk is full

Stopped                          Ctrl-C or SIGTERM, after the state was saved
```
"""

import difflib
from collections.abc import Iterable
from pathlib import PurePath


class SaelensLiteError(Exception):
    """Base of all errors that the library raises on purpose. The command line exits with `exit_code`."""

    exit_code = 1


class UserError(SaelensLiteError):
    """The request cannot be carried out as asked."""

    exit_code = 2


class ConfigError(UserError):
    """An unknown key, a value out of range, or options that contradict each other."""


class SourceChangedError(ConfigError):
    """A run is resumed on other activations than it was trained on."""


class ModelNotFoundError(UserError):
    """The model is neither embedded, nor a local folder, nor reachable on the Hub."""


class HookError(UserError):
    """The model has no hook of that name."""


class TextError(UserError):
    """There is no text, or nothing is left of it after tokenising."""


class ShapeError(UserError):
    """A tensor has a shape that does not fit."""


class PluginError(UserError):
    """A plugin is unknown, cannot be imported or started, may not be loaded, or its name is claimed twice."""


class OutputExistsError(UserError):
    """The output already exists, and the request does not say to overwrite it."""


class CorruptFileError(UserError):
    """A file is damaged, truncated or of another kind than it claims."""


class LockedError(UserError):
    """Another process is at work on the same output."""


class BudgetError(UserError):
    """Questions to a chat model would cost more than the limit that it was given. Nothing was sent."""


class BudgetReachedError(BudgetError):
    """The limit of a chat model was reached in the middle. The answers until then are kept."""


class HubError(SaelensLiteError):
    """The Hugging Face Hub, or another server of public files, refused or failed a request."""


class HubNotFoundError(HubError):
    """The repository, revision, folder or public file does not exist, or this account may not see it."""

    exit_code = 2


class HubAccessError(HubError):
    """The Hub needs a token, or the token does not have the permission."""

    exit_code = 2


class HubConflictError(HubError):
    """The repository on the Hub has changed since it was read."""


class HubUnreachableError(HubError):
    """The Hub or another server cannot be reached, or does not answer as it should."""


class ChatError(SaelensLiteError):
    """The endpoint of a chat model refused a request, or has no such model."""


class ChatAccessError(ChatError):
    """The endpoint needs a key, the key does not have the permission, or the account has no credit."""

    exit_code = 2


class ChatUnreachableError(ChatError):
    """The endpoint cannot be reached, or does not answer as it should."""


class NonFiniteError(SaelensLiteError):
    """NaN or infinity where finite numbers were expected."""

    in_activations: bool = False  # True: training failed because of its data


class ProcessLostError(SaelensLiteError):
    """One of several processes that work together ended or does not answer."""


class DiskFullError(SaelensLiteError):
    """The disk is full."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped the work after its state was saved. The message says how to resume."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


def near_matches(asked: str, names: Iterable[str], most: int = 3) -> str:
    """Return «; did you mean a, b?», or an empty string if no name is close."""
    close = difflib.get_close_matches(asked, list(names), n=most, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else ""


def not_a_dictionary(given: object) -> ConfigError:
    """Return the error for something that was given in place of a dictionary."""
    named = isinstance(given, str | PurePath)
    shown = repr(str(given)[:200]) if named else f"a {type(given).__name__}"
    return ConfigError(f"{shown} is not a dictionary; give one, such as sl.load({shown if named else '…'})")
