"""Work in a child process, which the scripts of this folder interrupt and kill."""

import os
import signal
import sys
from collections.abc import Callable

DONE, FAILED = 0, 3  # exit codes of a child


def child(work: Callable[[], object], exit_codes: dict[type[BaseException], int] | None = None) -> int:
    """Start work in a child process, and return the process's number.

    Its exit code is DONE, or for an error that of its type in `exit_codes`, else FAILED with the error on the terminal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # a child never runs on in the code of its parent
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
    """Wait for a child process, and return its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
