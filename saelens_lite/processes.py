"""Several processes that do one job together.

`torchrun --nproc-per-node 4 -m saelens_lite …` starts the same command 4 times. `team()` tells each process its rank and lets
it exchange small messages and tensors with the others. In a program that was started once, the team has one member, and
every method returns at once.

All members must call the same methods in the same order. If one of them ends or does not answer in time, the others get a
ProcessLostError instead of waiting for ever. `SAELENS_LITE_TIMEOUT` sets that time in seconds.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, wraps
from typing import Any, TypeVar

from saelens_lite import registry
from saelens_lite.errors import ConfigError, ProcessLostError, SaelensLiteError

TIMEOUT = 1800.0  # seconds; one process may write a large file meanwhile
Value = TypeVar("Value")


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of Team that raises ProcessLostError if a process cannot be reached."""

    @wraps(method)
    def guarded(self: "Team", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except RuntimeError as error:  # torch raises its base class for lost connections
            raise ProcessLostError(
                f"process {self.rank} of {self.world} lost another one, which ended or did not answer within "
                f"{timeout():g} s ({_cause(error)})"
            ) from error

    return guarded


def _cause(error: Exception) -> str:
    """Return the first sentence of an error of torch, without the places in its source."""
    return re.sub(r"\[\S+\.\w+:\d+\] ", "", str(error).partition("\n")[0]).partition(". ")[0][:200]


class Team:
    """The processes that work together, or some of them.

    Args:
        group: a process group of torch.distributed, or None for a team of one.
    """

    def __init__(self, group: Any = None):
        self._group = group
        self.rank, self.world = 0, 1
        if group is not None:
            import torch.distributed as dist

            self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """True in the process that writes files and shows progress."""
        return self.rank == 0

    @_guarded
    def gather(self, value: Value) -> list[Value]:
        """Return the value of each process, by rank. Values are pickled, so they may be any plain data."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def tell(self, value: Value) -> Value:
        """Return the value of the first process, whatever the others give."""
        return self.gather(value if self.is_first else None)[0]

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.gather(None)

    def first(self, function: Callable[[], Value]) -> Value:
        """Call a function in the first process, and return its plain result in all. Its error is raised in all."""
        result: Any = None
        with self.failing_together():
            if self.is_first:
                result = function()
        return self.tell(result)

    @_guarded
    def among(self, groups: Sequence[Sequence[int]]) -> "Team":
        """Return the team of that group of ranks to which this process belongs. Each process is in one group."""
        import torch.distributed as dist

        chosen = ALONE
        for ranks in groups:
            whole = len(ranks) == self.world
            group = self._group if whole or len(ranks) == 1 else dist.new_group(ranks, timedelta(seconds=timeout()))
            if self.rank in ranks and len(ranks) > 1:
                chosen = self if whole else Team(group)
        return chosen

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in any process."""
        return any(self.gather(bool(flag)))

    @_guarded
    def sum(self, x: Any) -> Any:
        """Return the sum of a tensor over the processes. It has the same bytes in each of them."""
        return self._reduced(x, "SUM")

    @_guarded
    def min(self, x: Any) -> Any:
        """Return the least of each entry of a tensor over the processes."""
        return self._reduced(x, "MIN")

    def _reduced(self, x: Any, how: str) -> Any:
        if self.world == 1:
            return x
        import torch.distributed as dist

        result = x.detach().clone().contiguous()
        dist.all_reduce(result, getattr(dist.ReduceOp, how), group=self._group)
        return result

    @_guarded
    def stack(self, x: Any) -> Any:
        """Return the tensors of all processes, which have equal shapes, along a new first axis."""
        if self.world == 1:
            return x.unsqueeze(0)
        import torch
        import torch.distributed as dist

        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(parts, x.detach().contiguous(), group=self._group)
        return torch.stack(parts)

    def cat(self, x: Any) -> Any:
        """Return the tensors of all processes, joined along the first axis. Their lengths may differ."""
        if self.world == 1:
            return x
        import torch

        lengths = self.gather(len(x))
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x.detach()
        return torch.cat([part[:n] for part, n in zip(self.stack(padded), lengths, strict=True)])

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Run a block in all processes, which calls no methods of the team. If it fails in one, raise its error in all."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        errors = self.gather(own if own is None or isinstance(own, SaelensLiteError) else RuntimeError(f"{own!r:.2000}"))
        if own is not None:
            raise own
        for rank, error in enumerate(errors):
            if error is not None:
                error.add_note(f"in process {rank} of {self.world}")
                raise error

    def agree(self, facts: Mapping[str, Any], what: str) -> None:
        """Check that all processes have the same facts.

        what: names the facts in the message, such as "settings".

        Raises:
            ConfigError: a fact differs. The message has both values.
        """
        for rank, other in enumerate(all_facts := self.gather(dict(facts))):
            for name in {**all_facts[0], **other}:
                first, value = all_facts[0].get(name), other.get(name)
                if first != value:
                    raise ConfigError(
                        f"the processes have different {what}: {name} is {first!r} in process 0 and {value!r} in process "
                        f"{rank}; start all processes with the same command and the same versions"
                    )


ALONE = Team()


def timeout() -> float:
    """Return the number of seconds after which a process that does not answer counts as lost."""
    with suppress(ValueError):
        return max(1.0, float(os.environ.get("SAELENS_LITE_TIMEOUT", TIMEOUT)))
    raise ConfigError(f"SAELENS_LITE_TIMEOUT = {os.environ['SAELENS_LITE_TIMEOUT']!r}; expected a number of seconds")


def is_launched() -> bool:
    """Return whether torchrun has started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Return the number of this process among those that torchrun started, without joining them; 0 in others."""
    return int(os.environ.get("RANK", "0")) if is_launched() else 0


def local_rank() -> int:
    """Return the number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_launched() else 0


@cache
def take_gpu() -> None:
    """Make this process's own GPU the one that torch calls cuda, if torchrun started the process and there are GPUs."""
    if is_launched():
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())


def on_this_machine() -> int:
    """Return the number of processes that torchrun has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def team() -> Team:
    """Return the team of all processes of this job. The first call in a process that torchrun started joins the team.

    Raises:
        ProcessLostError: the other processes do not come.
    """
    if is_launched():
        return _joined()
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return _of_group(dist.group.WORLD)
    return ALONE


@cache
def _joined() -> Team:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        take_gpu()
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backends, timeout=timedelta(seconds=timeout()))
        except (RuntimeError, ValueError) as error:
            if "EADDRINUSE" in str(error):
                raise ConfigError(
                    f"port {os.environ.get('MASTER_PORT')} is in use by another program; choose another one with --master-port"
                ) from error
            raise ProcessLostError(f"the processes did not find each other within {timeout():g} s: {_cause(error)}") from error
    return Team(dist.group.WORLD)


def wait_for_the_end() -> None:
    """Wait until all processes of the team, if this one has joined it, come to their end, so that nobody hangs up on others."""
    if _joined.cache_info().currsize:
        _joined().wait()


def leave() -> None:
    """Leave the team with all others, if this process has joined it."""
    dist = sys.modules.get("torch.distributed")
    if _joined.cache_info().currsize and dist is not None and dist.is_initialized():
        wait_for_the_end()
        dist.destroy_process_group()
        _joined.cache_clear()


@cache
def _of_group(group: Any) -> Team:
    return Team(group)


def check_same(settings: Mapping[str, Any], data: Any = None, device: Any = None) -> None:
    """Check that all processes of the team do the same job. Every process calls it before the work begins.

    Versions of the packages are compared too: this one, torch, transformers if it is imported, and those of plugins.

    Args:
        settings: plain data, such as {"dictionary": [config.model_dump(mode="json")]}. It may be nested.
        data: a description of the data, such as the path of a cache and the hash of its manifest, or the hash of a text.
        device: of the process. Only its kind is compared, for each process has a GPU of its own.

    Raises:
        ConfigError: two processes differ, with both values; or there are more processes than GPUs.
    """
    everyone = team()
    if everyone.world == 1:
        return
    everyone.agree(_versions(), "versions")
    everyone.agree(dict(_leaves(settings)), "settings")
    everyone.agree(dict(_leaves(data, "data")), "data")
    everyone.agree({} if device is None else {"device": str(device).partition(":")[0]}, "devices")
    if str(device).startswith("cuda"):
        import torch

        n, here = torch.cuda.device_count(), on_this_machine()
        if everyone.any(here > n):
            raise ConfigError(
                f"{here} processes were started on this machine, which has {n} GPUs; start one for each GPU, or choose the CPU"
            )


def _versions() -> dict[str, str]:
    """Return the versions of the packages that decide about results."""
    plugins = [plugin for kind in registry.kinds() for plugin in registry.plugins(kind) if plugin.entry_point]
    libraries = {name: str(sys.modules[name].__version__) for name in ("torch", "transformers") if name in sys.modules}
    return libraries | {plugin.distribution: plugin.version for plugin in plugins}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each part of nested data. The number of a GPU is left out."""
    if isinstance(value, Mapping) and value:
        parts: Any = value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and value:
        parts = enumerate(value)
    else:
        yield name, re.sub(r"^cuda:\d+$", "cuda", value) if isinstance(value, str) else value
        return
    for key, part in parts:
        yield from _leaves(part, f"{name}.{key}" if name else str(key))
