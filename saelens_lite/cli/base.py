"""The base of all commands: the app that they register with, its entry point, and its error messages."""

import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, UnknownOptionError

from saelens_lite import registry
from saelens_lite.cli import processes
from saelens_lite.cli.flags import in_flags, is_flag, with_aliases
from saelens_lite.errors import SaelensLiteError, Stopped
from saelens_lite.processes import is_launched
from saelens_lite.terminal import console, visible

__all__ = ["app", "console", "main", "more_help", "on_unknown_option", "say", "visible"]

app = App(
    name="saelens-lite",
    suppress_keyboard_interrupt=False,  # `main` says what was saved
    help="Hook a transformer, cache its residual stream, train sparse dictionaries, read them and publish them.",
    help_format="plaintext",
    default_parameter=Parameter(negative_iterable=()),
)
more_help: dict[str, Callable[[list[str]], None]] = {}  # prints what follows the help of a command
on_unknown_option: dict[str, Callable[[list[str], UnknownOptionError], list[str]]] = {}  # returns other tokens, or raises
app.meta.group_parameters = app.meta["--help"].group = "Global options"
app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    verbose: Annotated[bool, Parameter(negative="")] = False,
    traceback: Annotated[bool, Parameter(negative="")] = False,
    imports: Annotated[list[Path] | None, Parameter(name="--import")] = None,
) -> None:
    """Hook a transformer, cache its residual stream, train sparse dictionaries, read them and publish them.

    Parameters
    ----------
    verbose
        Print the library's log messages.
    traceback
        Show the full traceback of an error.
    imports
        Python file that registers plugins, such as a sparsity rule of yours. It is run before the command. May be repeated.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    for path in imports or ():
        registry.import_file(path)
    command, bound = _parsed(with_aliases(tokens))
    command(*bound.args, **bound.kwargs)


def _parsed(tokens: list[str]) -> tuple[Callable[..., Any], Any]:
    """Return the command and its arguments. A command may reinterpret an unknown option."""
    while True:
        try:
            command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
            return command, bound
        except UnknownOptionError as error:
            if tokens[0] not in on_unknown_option:
                raise
            tokens = on_unknown_option[tokens[0]](tokens, error)


def main() -> None:
    """Run a command. Report an error in one line on standard error. Exit code: 2 for a user's mistake, 1 for other errors."""
    wants_traceback = "--traceback" in sys.argv
    processes.be_quiet()
    try:
        app.meta(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
        if _command() in more_help and not {"--help", "-h"}.isdisjoint(sys.argv):
            more_help[_command()](sys.argv[1:])
        processes.end_well()
    except (SaelensLiteError, Stopped) as error:
        _fail(error, str(error), error.exit_code, wants_traceback)
    except CycloptsError as error:
        _fail(error, str(error), 2, wants_traceback)
    except KeyboardInterrupt as error:
        _fail(error, "interrupted", 130, wants_traceback)
    except BrokenPipeError as error:
        if is_launched():
            processes.end(error, "", 1, lambda _: None)
        sys.exit(1)
    except Exception as error:
        _fail(error, f"{type(error).__name__}: {error} (add --traceback to see where)", 1, wants_traceback)


def _fail(error: BaseException, message: str, code: int, wants_traceback: bool) -> None:
    message = in_flags(" ".join(message.split()), _flags(), sys.argv[1:])

    def show(message: str) -> None:
        if wants_traceback:
            traceback.print_exception(error)
        say(f"saelens-lite: {message}", error=True)

    if is_launched():
        processes.end(error, message, code, show)
    if wants_traceback:
        raise error
    show(message)
    sys.exit(code)


def _command() -> str:
    """Return the name of the command that was asked for, or an empty string."""
    return next((token for token in sys.argv[1:] if token in app), "")


def _flags() -> dict[str, str]:
    """Return the flag of each setting of the command that was asked for."""
    if _command() not in app:
        return {}
    flags = [flag for argument in app[_command()].assemble_argument_collection() for flag in argument.names if is_flag(flag)]
    return {flag.removeprefix("--").replace("-", "_"): flag for flag in flags}


class _Visible(logging.Formatter):
    """A formatter of log lines, which may quote files."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def say(text: object, *, error: bool = False) -> None:
    """Print text to standard output or standard error. Control characters are shown, not sent to the terminal."""
    print(visible(str(text)), file=sys.stderr if error else sys.stdout)
