"""Run a function in several processes that form a team, on the CPU with gloo."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "torch", "torch.distributed", "saelens_lite.training", "saelens_lite.evaluation", "saelens_lite.features",
    "transformer_lens.model_bridge", "transformers.models.gpt2.modeling_gpt2",  # six seconds, once instead of in each process
])  # fmt: skip


def in_processes(n: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call function(*args) in n processes that form a team, and return what each returns, by rank.

    function: of a module, not a lambda or a method. An error in a process is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends = [_context.Pipe(duplex=False) for _ in range(n)]
        processes = [
            _context.Process(target=_member, args=(rank, n, folder, ends[rank][1], timeout, function, args))
            for rank in range(n)
        ]
        for process in processes:
            process.start()
        for _, sender in ends:
            sender.close()
        results = []
        for receiver, _ in ends:
            try:
                results.append(pickle.loads(receiver.recv_bytes()))
            except EOFError:
                results.append(("lost", None, "the process died"))
        for process in processes:
            process.join()
    failures = [(error, trace) for kind, error, trace in results if kind == "error"]
    for error, trace in failures:
        error.add_note(trace)
        raise error
    assert all(kind != "lost" for kind, *_ in results), "a process died"
    return [value for _, value, _ in results]


def _member(rank: int, world: int, folder: str, sender: Any, timeout: float, function: Callable[..., Any], args: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["SAELENS_LITE_TIMEOUT"] = str(timeout)
    dist.init_process_group(
        "gloo", init_method=Path(folder, "meet").as_uri(), rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    try:
        sender.send_bytes(pickle.dumps(("value", function(*args), None)))  # a tensor in full, not a handle to its memory
    except BaseException as error:  # the test process raises it
        sender.send_bytes(pickle.dumps(("error", error, f"in process {rank}:\n{traceback.format_exc()}")))
    finally:
        dist.destroy_process_group()
