"""What ends a run before its images are done: its minutes, or a signal."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

import torch

from duotone.engine.distributed import meeting, zero

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C; what queues and launchers send before they take the machine back."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run, which had written a checkpoint; the process's exit code tells the signal, as a shell's does."""

    def __init__(self, number: int):
        super().__init__(f"{signal.Signals(number).name}: a checkpoint is written")
        self.code = 128 + number


def tell(line: str) -> None:
    """A line from within a signal's handler: not by print, which may be at work just now, and whether or not it is heard."""
    with contextlib.suppress(OSError):
        os.write(2, f"\nduotone: {line}\n".encode())


class Stop:
    """Holds the signals back while it is entered: the first lets the next step end, a second Ctrl-C does not wait.

    Under the launcher, which Ctrl-C ends, no second one reaches a rank.
    """

    def __init__(self, minutes: float, began: float, device: torch.device):
        self.minutes, self.began, self.device = minutes, began, device
        self.heard = 0
        self.told: Callable[[], list[float]] = lambda: [0.0, 0.0]
        self.handlers: dict = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            # What the process was told to ignore, as nohup does, stays ignored.
            held = [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self.handlers = {number: signal.signal(number, self.hear) for number in held}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def ends_the_process(self) -> None:
        """Who was told to end is about to: a second SIGTERM, between here and there, would only take its exit code."""
        if self.heard == signal.SIGTERM and self.handlers.get(signal.SIGTERM) is signal.SIG_DFL:
            self.handlers[signal.SIGTERM] = lambda number, frame: None

    def hear(self, number: int, frame) -> None:
        # The launcher follows Ctrl-C up with SIGTERM to every rank, so only Ctrl-C can be a second call.
        if self.heard and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.heard = not self.heard, self.heard or number
        if first and int(os.environ.get("RANK", 0)) == 0:
            again = "; Ctrl-C once more: at once" if meeting.SET_HERE else ""
            tell(f"stopping with a checkpoint after the next step{again}")

    def due(self, *, now: bool = False) -> bool:
        """Whether the run stops after this step, on all ranks alike: one has heard a signal, or by the mean of their clocks.

        What they tell one another is read a step later, when it has arrived: no device is waited for, but for an answer `now`.
        """
        before = self.told
        self.told = zero.means([float(self.heard > 0), time.monotonic() - self.began], self.device)
        heard, seconds = self.told() if now else before()
        if heard:
            self.heard = self.heard or signal.SIGTERM  # which another rank has heard
        return heard > 0 or 0 < 60 * self.minutes <= seconds
