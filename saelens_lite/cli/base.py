"""The base of all commands: the app that they register with, its entry point, and its error messages."""

import logging
import sys
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from saelens_lite.errors import SaelensLiteError, Stopped
from saelens_lite.terminal import console, visible

__all__ = ["app", "console", "main", "say", "visible"]

app = App(
    name="saelens-lite",
    suppress_keyboard_interrupt=False,  # `main` says what was saved
    help="Hook a transformer, cache its residual stream, train sparse dictionaries, read them and publish them.",
    help_format="plaintext",
    default_parameter=Parameter(negative_iterable=()),
)
app.meta.group_parameters = app.meta["--help"].group = "Global options"
app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    verbose: Annotated[bool, Parameter(negative="")] = False,
    traceback: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Hook a transformer, cache its residual stream, train sparse dictionaries, read them and publish them.

    Parameters
    ----------
    verbose
        Print the library's log messages.
    traceback
        Show the full traceback of an error.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    command(*bound.args, **bound.kwargs)


def main() -> None:
    """Run a command. Report an error in one line on standard error. Exit code: 2 for a user's mistake, 1 for other errors."""
    wants_traceback = "--traceback" in sys.argv
    try:
        app.meta(sys.argv[1:], exit_on_error=False, print_error=False)
    except (SaelensLiteError, Stopped) as error:
        _fail(error, str(error), error.exit_code, wants_traceback)
    except CycloptsError as error:
        _fail(error, str(error), 2, wants_traceback)
    except KeyboardInterrupt as error:
        _fail(error, "interrupted", 130, wants_traceback)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        _fail(error, f"{type(error).__name__}: {error} (add --traceback to see where)", 1, wants_traceback)


def _fail(error: BaseException, message: str, code: int, wants_traceback: bool) -> None:
    if wants_traceback:
        raise error
    say(f"saelens-lite: {' '.join(message.split())}", error=True)
    sys.exit(code)


class _Visible(logging.Formatter):
    """A formatter of log lines, which may quote files."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def say(text: object, *, error: bool = False) -> None:
    """Print text to standard output or standard error. Control characters are shown, not sent to the terminal."""
    print(visible(str(text)), file=sys.stderr if error else sys.stdout)
