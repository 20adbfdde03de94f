"""What all commands share: the app they register with, how it starts, and how a command that fails says so."""

import json
import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any
from unicodedata import category

from cyclopts import App, CycloptsError, Parameter

from saelens_lite.errors import SaelensLiteError, Stopped

if TYPE_CHECKING:
    from rich.console import Console

OBEYED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories of what has no shape of its own

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
        Log what the library does.
    traceback
        Show the whole traceback of an error.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    command(*bound.args, **bound.kwargs)


def main() -> None:
    """Run a command. Errors are one line on standard error: exit code 2 for the user's mistakes, 1 for the rest."""
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


def visible(text: str) -> str:
    """Replace characters that a terminal obeys instead of showing them by \\u and their number.

    These are control characters except line feed and tab, and marks of direction such as U+202E, which reorders what it stands
    before. JSON that goes through here is still the same JSON.
    """
    return "".join(char if char in "\n\t" or category(char) not in OBEYED else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else json.dumps(char)[1:-1]


class _Visible(logging.Formatter):
    """A formatter of log lines, which may quote files."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def say(text: object, *, error: bool = False) -> None:
    """Print text to standard output, or to standard error; what would steer the terminal is shown instead."""
    print(visible(str(text)), file=sys.stderr if error else sys.stdout)


def console() -> "Console":
    """Return where tables and results go: nothing in them is markup, and what would steer the terminal is shown instead."""
    from rich.console import Console

    class Visible(Console):
        def render_str(self, text: str, **settings: Any) -> Any:
            return super().render_str(visible(text), **settings)  # before rich leaves out some control characters

        def render(self, *args: Any, **settings: Any) -> Any:
            for segment in super().render(*args, **settings):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    return Visible(highlight=False, soft_wrap=True, markup=False, emoji=False)
