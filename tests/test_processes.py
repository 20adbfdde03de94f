"""Teams of processes: messages, sums, agreement, and lost members."""

import os
import signal
import socket

import pytest
import torch
from together import in_processes

from saelens_lite.errors import ConfigError, CorruptFileError, ProcessLostError
from saelens_lite.outputs import check_shared
from saelens_lite.processes import ALONE, check_same, team


def _all_methods():
    t = team()
    x = torch.tensor([1.0, -2.0]) * (t.rank + 1)
    return {
        "rank": t.rank,
        "gather": t.gather({"rank": t.rank}),
        "tell": t.tell(f"from {t.rank}"),
        "any": (t.any(t.rank == 1), t.any(False)),
        "sum": t.sum(x).tolist(),
        "min": t.min(x).tolist(),
        "stack": t.stack(x).tolist(),
        "cat": t.cat(torch.arange(t.rank + 1)).tolist(),
    }


def test_members_of_a_team_exchange_values_by_rank():
    results = in_processes(3, _all_methods)
    assert [result.pop("rank") for result in results] == [0, 1, 2]
    assert results[0] == results[1] == results[2]
    assert results[0] == {
        "gather": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        "tell": "from 0",
        "any": (True, False),
        "sum": [6.0, -12.0],
        "min": [1.0, -6.0],
        "stack": [[1.0, -2.0], [2.0, -4.0], [3.0, -6.0]],
        "cat": [0, 0, 1, 0, 1, 2],
    }


def test_a_team_of_one_needs_no_torch_distributed():
    x = torch.arange(3)
    assert team() is ALONE
    assert (ALONE.is_first, ALONE.gather(1), ALONE.tell(2), ALONE.any(True)) == (True, [1], 2, True)
    assert ALONE.sum(x) is x
    assert ALONE.cat(x) is x
    assert ALONE.stack(x).shape == (1, 3)
    ALONE.agree({"a": 1}, "settings")


def _disagree():
    t = team()
    with pytest.raises(ConfigError, match=r"different settings: k is 32 in process 0 and 33 in process 1"):
        t.agree({"d_sae": 8, "k": 32 + t.rank}, "settings")
    return True


def test_processes_with_different_settings_are_refused_with_both_values():
    assert in_processes(2, _disagree) == [True, True]


def _die():
    t = team()
    t.wait()
    if t.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(ProcessLostError, match=r"process 0 of 2 lost another one, [^/]*\(\w[^/]*peer"):  # no place in torch
        t.sum(torch.ones(1))
    return True


def test_a_process_that_dies_ends_the_others_with_an_error():
    with pytest.raises(AssertionError, match="a process died"):
        in_processes(2, _die)


def _sleep():
    t = team()
    t.wait()
    if t.rank == 1:
        import time

        time.sleep(4)
        return True
    with pytest.raises(ProcessLostError, match="did not answer within 2 s"):
        t.sum(torch.ones(1))
    return True


def test_a_process_that_hangs_ends_the_others_after_the_timeout():
    assert in_processes(2, _sleep, timeout=2.0) == [True, True]


def _raise_in(rank, error):
    if team().rank == rank:
        raise error


def _fail_in(rank, error):
    t = team()
    kind = type(error) if isinstance(error, CorruptFileError) or t.rank == rank else RuntimeError
    with pytest.raises(kind) as caught, t.failing_together():
        _raise_in(rank, error)
    t.wait()
    return str(caught.value), getattr(caught.value, "__notes__", [])


def test_an_error_in_one_process_is_raised_in_all():
    assert in_processes(3, _fail_in, 1, CorruptFileError("a file is damaged")) == [
        ("a file is damaged", ["in process 1 of 3"]),
        ("a file is damaged", []),
        ("a file is damaged", ["in process 1 of 3"]),
    ]
    assert [text for text, _ in in_processes(2, _fail_in, 0, ValueError("x"))] == ["x", "ValueError('x')"]


def _look(folders):
    t = team()
    place = folders[t.rank] / "above" / "out"
    if len(set(folders)) == 1:
        check_shared(place, t)
        t.wait()
        return not any(place.parent.iterdir())
    with pytest.raises(ConfigError, match=r"above is not the same folder for all processes: process 1 on .* cannot see"):
        check_shared(place, t, seconds=0.2)
    return True


def test_processes_that_do_not_see_the_same_folder_are_refused(tmp_path):
    assert in_processes(2, _look, [tmp_path / "a"] * 2) == [True, True]
    assert in_processes(2, _look, [tmp_path / "b", tmp_path / "c"]) == [True, True]
    assert not any((tmp_path / "b/above").iterdir())
    check_shared(tmp_path / "d" / "out", ALONE)
    assert not (tmp_path / "d").exists()


def _differ(part):
    rank = team().rank
    settings = {"dictionary": [{"d_sae": 8}, {"d_sae": 16 + rank * (part == "settings")}], "out": "runs"}
    data = {"cache": "here", "manifest_sha256": "ab" if rank and part == "data" else "cd", "device": f"cuda:{rank}"}
    device = torch.device("meta" if rank and part == "device" else "cpu")
    if part == "versions" and rank:
        torch.__version__ = "1.0"
    try:
        check_same(settings, data, device)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("nothing", None),
        ("settings", "different settings: dictionary.1.d_sae is 16 in process 0 and 17 in process 1"),
        ("data", "different data: data.manifest_sha256 is 'cd' in process 0 and 'ab' in process 1"),
        ("device", "different devices: device is 'cpu' in process 0 and 'meta' in process 1"),
        ("versions", f"different versions: torch is {str(torch.__version__)!r} in process 0 and '1.0' in process 1"),
    ],
)
def test_processes_that_do_different_jobs_are_refused(part, said):
    found = in_processes(2, _differ, part)
    assert found == [None, None] if said is None else all(said in message for message in found)


def test_a_port_in_use_is_told(monkeypatch):
    with socket.create_server(("localhost", 0)) as other:
        port = str(other.getsockname()[1])
        here = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x"}
        for name, value in here.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ConfigError, match=f"port {port} is in use by another program; choose another one with --master-port"
        ):
            team()
