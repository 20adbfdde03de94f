"""The command line with one more command, `work`, which fails in a given way if it runs as several processes."""

import logging
import os
import signal
import time

from saelens_lite.cli import main, processes
from saelens_lite.cli.base import app, say
from saelens_lite.cli.processes import Devices
from saelens_lite.errors import ConfigError
from saelens_lite.processes import team


@app.command
def work(how: str, *, devices: Devices = None) -> None:
    """Meet the others, print something, and fail."""
    if processes.start(devices, "cpu", lambda: "see how to go on"):
        return
    everyone = team()
    everyone.wait()
    say(f"printed by {everyone.rank} with {os.environ.get('OMP_NUM_THREADS')} threads")
    logging.getLogger("saelens_lite").warning("logged by %d", everyone.rank)
    if how == "all raise":
        raise ConfigError("the same everywhere")
    if how == "one raises" and everyone.rank == 1:
        raise ConfigError("cannot read $HOME")
    with everyone.failing_together():
        if how == "one tells all" and everyone.rank == 1:
            raise ConfigError("cannot read $HOME")
    if how == "killed" and everyone.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "waits":
        time.sleep(60)
    everyone.wait()


if __name__ == "__main__":
    main()
