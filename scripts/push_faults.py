"""Push dictionaries to a Hub on this machine while requests fail, and report the state of the repository after each push.

    python scripts/push_faults.py --times 20

Each fault is injected --times times into a push of two dictionaries to a repository that holds a third; then the push is
repeated without a fault. The exit code is 1 if a repository was ever neither unchanged nor complete, if an error was not a
HubError, if an upload was sent twice, or if a message contained the token.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from hub_server import Account, Blob, Fault, Hub, running_hub

TOKEN, REPO = "hf_tokenthatnobodymaysee", "me/dictionaries"


def meanwhile(hub: Hub) -> None:
    """Somebody else's commit."""
    repository = hub.repositories[REPO]
    repository.add("theirs", repository.head.files | {"theirs/cfg.json": Blob(b"{}")})


FAULTS: dict[str, Callable[[Hub], list[Fault]]] = {
    "none": lambda hub: [],
    "storage answers 500, twice": lambda hub: [Fault("PUT", "/storage/", "status", times=2)],
    "storage answers 500, always": lambda hub: [Fault("PUT", "/storage/", "status", times=999)],
    "connection dropped in an upload, twice": lambda hub: [Fault("PUT", "/storage/", "drop", times=2)],
    "connection dropped in every upload": lambda hub: [Fault("PUT", "/storage/", "drop", times=999)],
    "answer to an upload lost": lambda hub: [Fault("PUT", "/storage/", "lose")],
    "verification answers 500": lambda hub: [Fault("POST", "/complete/", "status", times=999)],
    "preupload answers 503": lambda hub: [Fault("POST", "/preupload/", "status", times=999, status=503)],
    "commit answers 500": lambda hub: [Fault("POST", "/commit/", "status")],
    "connection dropped in the commit": lambda hub: [Fault("POST", "/commit/", "drop")],
    "answer to the commit lost": lambda hub: [Fault("POST", "/commit/", "lose")],
    "token expires before the commit": lambda hub: [
        Fault("POST", "/commit/", "status", status=401, message="User Access Token is expired")
    ],
    "no right to write": lambda hub: [Fault("POST", "/preupload/", "status", status=403, message="Forbidden")],
    "head changes before the commit": lambda hub: [Fault("POST", "/commit/", "meanwhile", action=lambda: meanwhile(hub))],
    "too many requests": lambda hub: [Fault("POST", "/commit/", "status", status=429, message="Too many requests")],
    "listing answers 500": lambda hub: [Fault("GET", "/tree/", "status", times=999)],
    "listing is cut off": lambda hub: [Fault("GET", "/tree/", "cut", times=999)],
    "answers come in pieces": lambda hub: [Fault("GET", "/", "slow", times=2)],
}


class Outcome(NamedTuple):
    """The result of a push under a fault."""

    said: str  # the error, or "pushed"
    state: str
    repeated: str
    resent: int  # large files sent again although the storage had them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="how often each fault is met")
    times = parser.parse_args().times
    messages = Messages()
    logging.getLogger().addHandler(messages)
    logging.getLogger().setLevel(logging.DEBUG)
    bad = 0
    with tempfile.TemporaryDirectory() as home, running_hub() as hub:
        connect(hub, home)
        print(f"| fault, met {times} times | push | repository | pushed again | sent twice |\n| --- | --- | --- | --- | ---: |")
        for name, faults in FAULTS.items():
            outcomes = [meet(hub, faults, seed) for seed in range(times)]
            cells = [counted(outcome[i] for outcome in outcomes) for i in range(3)]
            resent = sum(outcome.resent for outcome in outcomes)
            bad += resent + sum(o.state == "BETWEEN" or o.repeated != "complete" or o.said[:3] == "BAD" for o in outcomes)
            print(f"| {name} | {' | '.join(cells)} | {resent} |", flush=True)
    leaks = sum(TOKEN in text for text in messages.texts)
    print(f"\n{len(messages.texts):,} log messages, the token in {leaks} of them")
    return 1 if bad or leaks else 0


class Messages(logging.Handler):
    """Remembers everything that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def connect(hub: Hub, home: str) -> None:
    """Point huggingface_hub at the server, before it is imported; it does not wait between attempts."""
    hub.accounts[TOKEN] = Account("me")
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    from huggingface_hub.utils import _http

    _http.time = SimpleNamespace(sleep=lambda _: None)


def meet(hub: Hub, faults: Callable[[Hub], list[Fault]], seed: int) -> Outcome:
    """Return a push under a fault, and one after it."""
    import saelens_lite as sl

    def dictionary(i: int) -> Any:
        return sl.Dictionary.create("topk", reads=8, d_sae=32, seed=10 * seed + i)

    hub.repositories.clear()
    hub.storage.clear()
    hub.order()
    sl.push({"first": dictionary(0)}, REPO)
    pushed = {"second": dictionary(1), "third": dictionary(2)}
    hub.order(*faults(hub))
    said = attempt(lambda: sl.push(pushed, REPO))
    hub.order()
    stored = set(hub.storage)
    state = found(hub)
    hub.requests.clear()
    attempt(lambda: sl.push(pushed, REPO))
    resent = sum(request.path.rpartition("/")[2] in stored for request in hub.sent("PUT"))
    return Outcome(said, state, found(hub), resent)


def attempt(push: Callable[[], Any]) -> str:
    """Return the message of a push."""
    import saelens_lite as sl

    try:
        push()
    except sl.errors.HubError as error:
        return f"BAD: the token in {error!r}" if TOKEN in str(error) else type(error).__name__
    except Exception as error:
        return f"BAD: {type(error).__name__}"
    return "pushed"


def found(hub: Hub) -> str:
    """Return the dictionaries in the repository, in a word."""
    files = hub.repositories[REPO].head.files
    names = ("cfg.json", "sae_weights.safetensors", "README.md")
    whole = {name for name in ("first", "second", "third") if all(f"{name}/{file}" in files for file in names)}
    listed = {name for name in ("first", "second", "third") if f"[{name}]" in files["README.md"].content.decode()}
    any_of_new = any(path.startswith(("second/", "third/")) for path in files)
    if whole == listed == {"first", "second", "third"}:
        return "complete"
    return "as before" if whole == listed == {"first"} and not any_of_new else "BETWEEN"


def counted(values: Any) -> str:
    """Return each value, with how often it came where that was not always."""
    counts = Counter(values).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{value} × {n}" for value, n in counts)


if __name__ == "__main__":
    sys.exit(main())
