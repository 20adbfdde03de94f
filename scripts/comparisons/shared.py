"""Common parts of the comparisons: programs in another tool's Python, and differences between codes and outputs."""

import os
import subprocess
from typing import NamedTuple

from torch import Tensor

TOLERANCE = 1e-5  # relative to the largest value


def run_peer(python: str, *arguments: object, doing: str, environment: dict[str, str] | None = None) -> str:
    """Return what another tool's Python prints for some arguments.

    Args:
        python: The Python of an environment with the tool.
        arguments: Its command line: "-c" and a program, or a script and its arguments.
        doing: What the program does, for the message if it fails.
        environment: Variables to set in addition to this process's own.
    """
    command = [python, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (environment or {}))
    if done.returncode:
        raise SystemExit(f"{python} failed while {doing}:\n{done.stderr[-4000:]}")
    return done.stdout


class Difference(NamedTuple):
    """The difference of codes and outputs between this library and another tool on the same activations."""

    codes: float  # largest absolute difference
    largest_code: float
    output: float  # largest absolute difference
    largest_output: float
    fires_elsewhere: int  # codes that are zero on one side only

    @classmethod
    def of(cls, codes: Tensor, output: Tensor, peer_codes: Tensor, peer_output: Tensor) -> "Difference":
        """Compare dense codes [n d_sae] and outputs [n d_out] of this library with those of a peer."""
        return cls(
            float((codes - peer_codes).abs().max()),
            float(codes.abs().max()),
            float((output - peer_output).abs().max()),
            float(output.abs().max()),
            int(((codes != 0) != (peer_codes != 0)).sum()),
        )

    @property
    def is_small(self) -> bool:
        """True if both differences are at most TOLERANCE of the largest value; NaN is not small."""
        return self.codes <= TOLERANCE * self.largest_code and self.output <= TOLERANCE * self.largest_output
