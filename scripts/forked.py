"""Child processes that the scripts of this folder interrupt and kill."""

import os
import signal
import sys
from collections.abc import Callable

DONE, FAILED = 0, 3  # exit codes of a child


def child(work: Callable[[], object], exit_codes: dict[type[BaseException], int] | None = None) -> int:
    """Start work in a child process, and return its process id.

    The exit code is DONE, or after an error the code of its type in `exit_codes`. Other errors are printed to stderr, and the
    code is FAILED.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # else Ctrl-C could make the child continue in its parent's code
    number = os.fork()
    if number == 0:
        try:
            os.setsid()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            work()
        except BaseException as error:
            code = (exit_codes or {}).get(type(error))
            if code is None:
                print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(FAILED if code is None else code)
        os._exit(DONE)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return number


def ended(number: int) -> int:
    """Wait for a child process, and return its exit code, or minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
