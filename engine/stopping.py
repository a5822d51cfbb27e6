"""What stops a run before its last image: a time limit, or a signal."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

import torch

from duotone.engine.distributed import meeting, zero

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and what queues and launchers send before they kill a process."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a run after a checkpoint was written; `code` is the exit code that shells use for the signal."""

    def __init__(self, number: int):
        super().__init__(f"{signal.Signals(number).name}: a checkpoint is written")
        self.code = 128 + number


def tell(line: str) -> None:
    """Writes a line from a signal handler, where print may be running already, and ignores a closed output."""
    with contextlib.suppress(OSError):
        os.write(2, f"\nduotone: {line}\n".encode())


class Stop:
    """Holds signals back while it is entered: the first stops the run after the next step, a second Ctrl-C at once.

    The launcher ends at the first Ctrl-C, so no second one reaches a rank under it.
    """

    def __init__(self, minutes: float, began: float, device: torch.device):
        self.minutes, self.began, self.device = minutes, began, device
        self.heard = 0
        self.told: Callable[[], list[float]] = lambda: [0.0, 0.0]
        self.handlers: dict = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            # A signal that the process ignores, for example under nohup, stays ignored.
            held = [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
            self.handlers = {number: signal.signal(number, self.hear) for number in held}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def ends_the_process(self) -> None:
        """After a SIGTERM, ignores further ones: the process is about to end, and they would change its exit code."""
        if self.heard == signal.SIGTERM and self.handlers.get(signal.SIGTERM) is signal.SIG_DFL:
            self.handlers[signal.SIGTERM] = lambda number, frame: None

    def hear(self, number: int, frame) -> None:
        # The launcher follows Ctrl-C up with SIGTERM to every rank, so only Ctrl-C can be a second call.
        if self.heard and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.heard = not self.heard, self.heard or number
        if first and int(os.environ.get("RANK", 0)) == 0:
            again = " (Ctrl-C once more stops at once)" if meeting.SET_HERE else ""
            tell(f"stopping with a checkpoint after the next step{again}")

    def due(self, *, now: bool = False) -> bool:
        """Whether the run stops after this step: a rank got a signal, or the ranks' mean clock is past the limit.

        All ranks decide alike. The answer is that of the step before, which has arrived and needs no waiting for the
        device; with `now` it is this step's.
        """
        before = self.told
        self.told = zero.means([float(self.heard > 0), time.monotonic() - self.began], self.device)
        heard, seconds = self.told() if now else before()
        if heard:
            self.heard = self.heard or signal.SIGTERM  # another rank got the signal
        return heard > 0 or 0 < 60 * self.minutes <= seconds
