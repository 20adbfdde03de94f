"""Ask a chat server on this machine questions while requests fail and the asking process is killed, and check what was paid.

    python scripts/chat_faults.py --runs 60

Each run asks the same questions in a process of its own, with faults drawn from a seed. In two of three runs the process is
stopped in the middle, by SIGKILL or by Ctrl-C, up to twice, and the call is repeated. The table counts, for each kind of run:

- requests, and the faults that they met; a repeated call meets new faults;
- paid: replies of the model, that is, answers with status 200, and of these the delivered ones, whose whole body was handed to
  the client in time. Replies that a fault damaged, cut or delayed beyond the time limit are paid and not delivered;
- in flight: replies that were delivered but not yet kept when the process was killed, at most one for each request that may be
  in progress. After Ctrl-C, these are waited for;
- asked again: requests for questions whose answer was kept, or that had a reply delivered earlier in the same call;
- lost: answers that were kept and are missing or different after a later call;
- wrong: answers that differ from those of a run without faults.

The exit code is 1 if anything was asked again, lost or wrong, if more was in flight than may be, or if the key of the server is
in a kept answer.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chat_server import ChatServer, Plan, Reply, question_hash, running_chat

SIGNALS = {"faults and SIGKILL": signal.SIGKILL, "faults and Ctrl-C": signal.SIGINT}
KINDS = ("faults", *SIGNALS)
CONCURRENCY, TIMEOUT = 6, 2.0
KEY = "sk-akeythatnobodymaysee"
COLUMNS = ("requests", "faults", "paid", "delivered", "stops", "in flight", "asked again", "lost", "wrong")


class Outcome(NamedTuple):
    """The counts of a run; the docstring of the script explains them."""

    counts: Counter[str]
    has_leak: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    totals = {kind: Counter({"runs": 0}) for kind in KINDS}
    bad = 0
    for i in range(args.runs):
        kind = KINDS[i % len(KINDS)]
        outcome = one_run(kind, args.seed + i, args.questions)
        totals[kind] += outcome.counts + Counter(runs=1)
        bad += is_bad(kind, outcome)
        if is_bad(kind, outcome):
            print(f"run {i} ({kind}): {outcome}", flush=True)
    print(f"| runs | {' | '.join(COLUMNS)} |\n| --- | {' | '.join('---:' for _ in COLUMNS)} |")
    for kind, counts in totals.items():
        print(f"| {counts['runs']} with {kind} | {' | '.join(f'{counts[name]:,}' for name in COLUMNS)} |")
    print(f"\n{args.runs} runs of {args.questions} questions, {bad} of them bad")
    return 1 if bad else 0


def is_bad(kind: str, outcome: Outcome) -> bool:
    """Return whether a run went wrong."""
    counts = outcome.counts
    too_much = counts["in flight"] > (CONCURRENCY * counts["stops"] if kind.endswith("SIGKILL") else 0)
    return bool(counts["asked again"] or counts["lost"] or counts["wrong"] or too_much or outcome.has_leak)


def one_run(kind: str, seed: int, n: int, timeout: float = TIMEOUT) -> Outcome:
    """Return the counts of one run, with faults and stops drawn from the seed."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter(dict.fromkeys(COLUMNS, 0))
    with tempfile.TemporaryDirectory() as home, running_chat(reply, key=KEY, lateness=timeout + 1) as server:
        folder = Path(home) / "kept"
        call(server, Path(home) / "without faults", n, timeout, Path(home) / "expected.json")
        expected = json.loads((Path(home) / "expected.json").read_text())
        server.plan = Plan(seed, rate=0.4, most=3)
        kept: dict[str, Any] = {}
        n_stops = 0 if kind == "faults" else draw.choice((1, 2))
        for attempt in range(n_stops + 1):
            server.plan = server.plan._replace(seed=1000 * seed + attempt)
            server.forget()
            moment = (draw.randrange(1, max(2, n - len(kept))), draw.uniform(0, 0.02))
            stop = (SIGNALS[kind], *moment) if attempt < n_stops else None
            call(server, folder, n, timeout, Path(home) / "answers.json", stop)
            now = kept_answers(folder)
            counts += Counter(
                {
                    "requests": len(server.requests),
                    "faults": server.met.total() - server.met["none"],
                    "paid": server.paid.total(),
                    "delivered": server.delivered.total(),
                    "stops": int(stop is not None),
                    "in flight": len(server.delivered.keys() - now.keys()),
                    "asked again": sum(server.asked[key] for key in kept) + asked_after_delivery(server),
                    "lost": sum(now.get(key) != answer for key, answer in kept.items()),
                }
            )
            kept = now
        answers = json.loads((Path(home) / "answers.json").read_text())
        counts["wrong"] += sum(a != b for a, b in zip(answers, expected, strict=True)) + n - len(kept)
        texts = [path.read_text() for path in Path(home).rglob("*.json")]
    return Outcome(counts, any(KEY in text for text in texts))


def reply(messages: list[dict[str, str]], body: dict[str, Any]) -> str | Reply:
    """Reply with a digest of the question; some questions are always refused, cut, or answered with nothing."""
    key = question_hash(messages)
    always = {0: Reply(None, refusal="No."), 1: Reply("a part of", "length"), 2: Reply("")}
    return always.get(int(key, 16) % 20, f"reply {key}")


def asked_after_delivery(server: ChatServer) -> int:
    """Return how many requests came for a question after its reply was delivered, in one call."""
    delivered: set[str] = set()
    again = 0
    for event, question in server.events:
        again += event == "asked" and question in delivered
        delivered |= {question} if event == "delivered" else set()
    return again


def kept_answers(folder: Path) -> dict[str, Any]:
    """Return the answers in a folder by the server's hash of their question, read without the library."""
    values = [json.loads(path.read_text()) for path in folder.rglob("*.json")]
    return {question_hash(value["asked"]["messages"]): value["answer"] for value in values}


def call(
    server: ChatServer,
    folder: Path,
    n: int,
    timeout: float,
    out: Path,
    stop: tuple[signal.Signals, int, float] | None = None,
) -> None:
    """Ask the questions in a process of its own; `stop` is a signal, the paid replies to wait for, and seconds after them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saelens_lite.chat", "openai.resources.chat.completions"])
    out.unlink(missing_ok=True)
    process = context.Process(target=client, args=(server.url, str(folder), n, timeout, str(out)))
    process.start()
    if stop is not None:
        number, n_paid, seconds = stop
        while process.is_alive() and server.paid.total() < n_paid:
            time.sleep(0.001)
        time.sleep(seconds)
        if process.is_alive():
            os.kill(process.pid, number)
    process.join()


def client(url: str, folder: str, n: int, timeout: float, out: str) -> None:
    """Ask the questions and write the answers, as a user's program would."""
    import saelens_lite as sl

    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["OPENAI_API_KEY"] = KEY
    model = sl.chat_model("any", base_url=url, folder=folder, concurrency=CONCURRENCY, timeout=timeout, backoff=0.01)
    questions = [sl.Question(f"question {i}", choices=("reply",) if i % 2 else ()) for i in range(n)]
    try:
        answers = model.ask(questions)
    except sl.errors.Stopped:
        return
    Path(out).write_text(json.dumps([answer._replace(was_kept=True) for answer in answers]))


if __name__ == "__main__":
    sys.exit(main())
