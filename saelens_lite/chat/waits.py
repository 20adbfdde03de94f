"""The waits between two attempts: exponential, with jitter, and at least as long as the server demands."""

import math
import random
import time
from email.utils import parsedate_to_datetime

MOST_DOUBLINGS = 30


def wait_before(n: int, first: float, longest: float, demanded: float | None = None) -> float:
    """Return the seconds before repetition n = 0, 1, …: half to all of min(longest, first · 2ⁿ), or more if demanded."""
    usual = min(longest, first * 2 ** min(n, MOST_DOUBLINGS)) * random.uniform(0.5, 1)
    return max(usual, demanded or 0.0)


def demanded_wait(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header demands, as a number or as a date; None if it demands nothing."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
