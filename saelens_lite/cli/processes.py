"""Commands that run as several processes. Only the first one prints, and a failure is reported once.

`--devices N` starts the same command N times through torch's launcher; `torchrun -m saelens_lite …` does the same. A process
that fails tells the others so through the launcher's store, and waits a moment for their errors. Then one of them prints the
message of the error, with the number of its process unless all raise the same one. A process that has only lost another one
leaves it to the launcher to say which one was killed.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from saelens_lite.errors import ConfigError, ProcessLostError
from saelens_lite.processes import is_launched, rank, wait_for_the_end

ROLE = "saelens-lite"  # torch's launcher tells it to the processes that it starts
GRACE = 3.0  # seconds that a failing process waits for the errors of the others
WAIT = 10.0  # seconds in which the launcher's store has to answer
PR_SET_PDEATHSIG = 1  # of Linux: send a signal when the parent ends
TO_STOP = 600  # seconds after Ctrl-C in which a checkpoint is written; torch's launcher then kills the processes

Devices = Annotated[
    int | Literal["all"] | None,
    Parameter(
        help="Number of GPUs to use, or all; on a CPU, number of processes. The same command under torchrun also works, on one "
        "machine or several."
    ),
]


def start(
    devices: int | str | None, device: str | None = None, again: Callable[[], str] = lambda: "repeat the command"
) -> bool:
    """Start the processes that --devices asks for, and wait until they end. Return False if there is nothing to start.

    Args:
        again: returns the end of a sentence that says how to repeat or resume the command after a process was killed.

    Raises:
        ConfigError: this process is one of several already, or the computer has not that many devices.
        ProcessLostError: a process was killed.
    """
    if devices is None:
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            f"devices = {devices}: torchrun has started this process as one of {os.environ.get('WORLD_SIZE', '?')} already; "
            "use either torchrun or --devices"
        )
    n = _number(devices, device)
    if n > 1:
        _launch(n, again)
    return n > 1


def _number(devices: int | str, device: str | None) -> int:
    """Return the number of processes to start. Each of them needs a device."""
    if devices == 1:
        return 1
    if devices != "all" and int(devices) < 1:
        raise ConfigError(f"devices = {devices}; expected a number from 1, or all")
    import torch

    from saelens_lite.devices import chosen_device

    chosen = chosen_device(device)
    if chosen.type == "cpu" and devices != "all":
        return int(devices)
    if chosen.type != "cuda":
        only = (
            "; on a CPU, give the number of processes" if chosen.type == "cpu" else f", but {chosen} has one; add --device cpu"
        )
        raise ConfigError(f"devices = {devices}: needs several GPUs{only}")
    if chosen.index is not None:
        raise ConfigError(
            f"devices = {devices}: each process has a GPU of its own, but --device {device} names one for all; leave it out"
        )
    n_gpus = torch.cuda.device_count()
    if devices != "all" and int(devices) > n_gpus:
        raise ConfigError(
            f"devices = {devices}: this computer has only {n_gpus} GPU{'s' * (n_gpus != 1)}; give a smaller number, "
            "or add --device cpu"
        )
    return n_gpus if devices == "all" else int(devices)


def _launch(n: int, again: Callable[[], str]) -> None:
    """Run this command in n processes through torch's launcher, which uses a free port."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _n_cores() // n)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(TO_STOP))
    logging.disable()  # the launcher logs each failure
    with TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n,
            run_id=uuid.uuid4().hex,
            role=ROLE,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        command = [token.replace("$", "$$") for token in _command(sys.argv[1:])]  # the launcher substitutes names after $
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            _explain(error.failures, n, again)
        except SignalException as stop:
            number = signal.Signals(stop.sigval)
            if number == signal.SIGINT and not list(Path(folder).rglob("error.json")):
                raise KeyboardInterrupt from None
            sys.exit(128 + number)


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _command(tokens: Sequence[str]) -> list[str]:
    """Return the arguments of Python that run this command again, without --devices."""
    kept = [
        token
        for before, token in zip(["", *tokens], tokens, strict=False)
        if before != "--devices" and token.partition("=")[0] != "--devices"
    ]
    n = len(sys.orig_argv) - len(tokens)
    is_own = n > 1 and sys.orig_argv[n:] == list(tokens)
    return [*(sys.orig_argv[1:n] if is_own else ["-m", "saelens_lite"]), *kept]


def _explain(failures: dict[int, Any], n: int, again: Callable[[], str]) -> None:
    """End as the processes ended. Say which one was killed, unless one of them has printed the cause."""
    notes = [note for failure in failures.values() if (note := failure.error_file_data.get(ROLE))]
    for note in notes:
        if note["printed"]:
            sys.exit(note["code"])  # also the exit code of the launcher
    until = min((note["time"] for note in notes), default=time.time()) + WAIT  # then the launcher kills those that hang
    unsaid = [(i, end) for i, end in failures.items() if not end.error_file_data.get(ROLE) and end.timestamp < until]
    for number, end in unsaid:
        if -end.exitcode != signal.SIGTERM or not notes:  # by which the launcher ends the others
            why = ", perhaps because memory ran out" if -end.exitcode == signal.SIGKILL else ""
            how = f"was killed ({end.signal_name()}{why})" if end.exitcode < 0 else f"ended with exit code {end.exitcode}"
            raise ProcessLostError(f"process {number} of {n} {how}; {again()}")
    raise ProcessLostError(f"{notes[0]['message']}; {again()}")


_stderr: int | None = None  # a copy of the descriptor, in a process that prints nothing else


def be_quiet() -> None:
    """Print nothing from now on, unless this is the first process or the only one. End when the launcher is killed."""
    global _stderr  # noqa: PLW0603
    if not is_launched():
        return
    if sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it has ended meanwhile
            os.kill(os.getpid(), signal.SIGTERM)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch warns of each lost connection
    if rank() == 0:
        return
    _stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def end_well() -> None:
    """End this process if it is one of several, all of which have succeeded."""
    if is_launched():
        wait_for_the_end()
        _exit(0)


def _exit(code: int) -> None:
    """End without cleaning up: threads of torch may still wait, and would abort a process that ends as usual."""
    with suppress(OSError):  # nobody reads it
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def end(error: BaseException, message: str, code: int, show: Callable[[str], None]) -> None:
    """End this process, which is one of several, after an error. Show the message unless another process does."""
    where = [note for note in getattr(error, "__notes__", ()) if note.startswith("in process ")]  # in which it arose
    message = f"{where[0].removeprefix('in ')}: {message}" if where else message
    for number in (signal.SIGTERM, signal.SIGINT):  # as soon as one process has ended, the launcher ends the others
        signal.signal(number, signal.SIG_IGN)
    leaves_it = isinstance(error, ProcessLostError) and os.environ.get("ROLE_NAME") == ROLE  # to `_explain`
    shown = None if leaves_it else _message_to_show(error, message)
    if shown is not None:
        if _stderr is not None:
            os.dup2(_stderr, 2)
        show(shown)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # which the launcher reads
        note = {"printed": shown is not None, "code": code, "message": message, "time": time.time()}
        with suppress(OSError):  # its folder is the launcher's, which may be gone
            Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time()), ROLE: note}), "utf-8")
    _exit(code)


def _message_to_show(error: BaseException, message: str) -> str | None:
    """Return the message that this process has to show, or None if another process shows one."""
    import torch.distributed as dist

    me, world = rank(), int(os.environ["WORLD_SIZE"])
    is_lost = isinstance(error, ProcessLostError)
    has_number = is_lost or message.startswith("process ")
    alone = f"process {me} of {world}: {message}" if isinstance(error, Exception) and not has_number else message
    try:
        at = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=WAIT)
        )
        store = dist.PrefixStore(f"{ROLE}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", at)
        store.set(str(me), "" if is_lost else message)
        names = [str(i) for i in range(world)]
        with suppress(RuntimeError):  # the others have not failed
            store.wait(names, timedelta(seconds=GRACE))
        said = [store.get(name).decode() for name in names if store.check([name])]
        if is_lost and any(said):
            return None  # one of the others has the cause
        if store.compare_set("shown by", "", str(me)).decode() != str(me):
            return None
    except RuntimeError:  # no store: its process is gone
        return alone
    return message if said == [message] * world else alone
