"""Progress lines for long jobs: one every few seconds, none for a short job."""

import datetime
import time

from duotone.engine.log import say

SECONDS_BETWEEN = 10.0


class Progress:
    """Says "what: done of total" every few seconds."""

    def __init__(self, what: str, total: int):
        self.what, self.total = what, total
        self.began = self.last = time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last < SECONDS_BETWEEN or done >= self.total:
            return
        self.last = now
        left = datetime.timedelta(seconds=round((now - self.began) / max(1, done) * (self.total - done)))
        say(f"{self.what}: {done:,} of {self.total:,}, {left} left")
