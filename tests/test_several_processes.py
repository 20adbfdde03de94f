"""Commands that run as several processes: --devices and torchrun, one message for a failure, and exit codes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saelens_lite import devices as of_torch
from saelens_lite.cli import processes
from saelens_lite.errors import ConfigError, ProcessLostError

PROGRAM = str(Path(__file__).with_name("failing_command.py"))
PRINTED = f"printed by 0 with {max(1, processes._n_cores() // 2)} threads\n"
LOGGED = "logged by 0\n"


@pytest.fixture(scope="module")
def ends():
    """The exit code, output and errors of launches, which run at the same time."""
    commands = {
        "all raise": (PROGRAM, "work", "all raise", "--devices=2"),
        "one raises": (PROGRAM, "work", "one raises", "--devices", "2"),
        "killed": (PROGRAM, "work", "killed", "--devices", "2"),
        "waits": (PROGRAM, "work", "waits", "--devices", "2"),
        "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node", "2", PROGRAM, "work", "one tells all"),
    }
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = {name: subprocess.Popen([sys.executable, *line], env=env, text=True, **pipes) for name, line in commands.items()}
    begun = running["waits"].stdout.readline()
    running["waits"].send_signal(signal.SIGINT)
    found = {}
    for name, one in running.items():
        out, err = one.communicate(timeout=120)
        found[name] = (one.returncode, (begun if name == "waits" else "") + out, err)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("all raise", 2, "saelens-lite: the same everywhere\n"),
        ("one raises", 2, "saelens-lite: process 1 of 2: cannot read $HOME\n"),
        ("killed", 1, "saelens-lite: process 1 of 2 was killed (SIGKILL, perhaps because memory ran out); see how to go on\n"),
        ("waits", 130, "saelens-lite: interrupted\n"),
    ],
)
def test_only_the_first_process_prints_and_a_failure_is_told_once(ends, name, code, message):
    assert ends[name] == (code, PRINTED, LOGGED + message)


@pytest.mark.slow
def test_torchrun_works_too_and_its_report_has_the_message(ends):
    code, out, err = ends["torchrun"]
    assert code == 1  # of torchrun
    assert out.startswith("printed by 0 ")
    assert err.count("saelens-lite: process 1 of 2: cannot read $HOME\n") == 1
    assert "traceback : process 1 of 2: cannot read $HOME\n" in err
    assert "logged by 1" not in err


def test_devices_within_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="devices = 2: torchrun has started this process as one of 4 already; use either"):
        processes.start(2)
    assert not processes.start(None)


@pytest.mark.parametrize(
    ("asked", "device", "n_gpus", "found"),
    [
        (1, None, 0, 1),
        (3, "cpu", 2, 3),
        (3, None, 0, 3),
        (2, None, 2, 2),
        ("all", "cuda", 4, 4),
        (0, None, 0, "devices = 0; expected a number from 1, or all"),
        ("all", None, 0, "on a CPU, give the number of processes"),
        ("all", "cpu", 4, "on a CPU, give the number of processes"),
        (3, None, 2, "this computer has only 2 GPUs; give a smaller number, or add --device cpu"),
        (2, "cuda", 1, "this computer has only 1 GPU; "),
        (2, "cuda:1", 2, "--device cuda:1 names one for all; leave it out"),
        (2, "cuda", 0, "torch finds no such device here"),
    ],
)
def test_each_process_needs_a_device(monkeypatch, asked, device, n_gpus, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(of_torch, "natural_device", lambda: torch.device("cuda" if n_gpus else "cpu"))
    if isinstance(found, int):
        assert processes._number(asked, device) == found
    else:
        with pytest.raises(ConfigError, match=found):
            processes._number(asked, device)


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        (["train", "cache", "--devices", "4", "--out", "x"], ["train", "cache", "--out", "x"]),
        (["train", "--devices=all", "--d-sae", "4"], ["train", "--d-sae", "4"]),
        (["eval", "run", "--device", "cuda"], ["eval", "run", "--device", "cuda"]),
    ],
)
def test_processes_run_the_same_command_without_devices(monkeypatch, tokens, kept):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "-m", "saelens_lite.cli", *tokens])
    assert processes._command(tokens) == ["-X", "utf8", "-m", "saelens_lite.cli", *kept]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest"])
    assert processes._command(tokens) == ["-m", "saelens_lite", *kept]


def failure(exitcode, seconds=100, **note):
    data = {processes.ROLE: {"time": 100.0, **note}} if note else {"message": "<NONE>"}
    return SimpleNamespace(
        exitcode=exitcode, timestamp=seconds, error_file_data=data, signal_name=lambda: signal.Signals(-exitcode).name
    )


def lost(said="process 0 of 2 lost another one", printed=False):
    return failure(1, message=said, printed=printed, code=1)


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        (
            {0: lost(), 1: failure(-signal.SIGKILL)},
            "process 1 of 2 was killed .SIGKILL, perhaps because memory ran out.; go on",
        ),
        ({0: lost(), 1: failure(-signal.SIGSEGV)}, "process 1 of 2 was killed .SIGSEGV.; go on"),
        ({0: lost(), 1: failure(3)}, "process 1 of 2 ended with exit code 3; go on"),
        ({0: lost(), 1: failure(-signal.SIGTERM)}, "process 0 of 2 lost another one; go on"),
        ({0: lost(), 1: failure(-signal.SIGKILL, seconds=131)}, "process 0 of 2 lost another one; go on"),
        ({1: failure(-signal.SIGTERM), 0: failure(-signal.SIGTERM)}, "process 1 of 2 was killed .SIGTERM.; go on"),
    ],
)
def test_the_cause_is_the_process_that_ended_by_itself(failures, said):
    with pytest.raises(ProcessLostError, match=said):
        processes._explain(failures, 2, lambda: "go on")


def test_an_error_that_was_printed_is_not_followed_by_another_message():
    failures = {1: failure(-signal.SIGTERM), 0: failure(2, message="bad", printed=True, code=2), 2: lost()}
    with pytest.raises(SystemExit) as end:
        processes._explain(failures, 3, lambda: "go on")
    assert end.value.code == 2
