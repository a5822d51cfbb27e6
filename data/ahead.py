"""Runs an iterator on its own thread, a few items ahead of the consumer."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
END = object()
POLL = 0.1  # seconds between two looks at the stop flag


class Ahead(Generic[T]):
    """An iterator that is read ahead of time; its exceptions are raised in the consumer.

    The thread ends when the source ends, on close(), and when this object is dropped.
    """

    def __init__(self, source: Iterator[T], ahead: int):
        items: queue.Queue = queue.Queue(maxsize=max(1, ahead))
        stop = threading.Event()
        # The thread must not hold a reference to `self`, or dropping this object could never end the thread.
        thread = threading.Thread(target=_produce, args=(source, items, stop), name="duotone-data", daemon=True)
        self._items, self._over = items, False
        self._close = weakref.finalize(self, _shut, thread, stop)
        thread.start()

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        if self._over:
            raise StopIteration
        item, error = self._items.get()
        if error is not None:
            self.close()
            raise error
        if item is END:
            self.close()
            raise StopIteration
        return item

    def close(self) -> None:
        """Stops reading and drops the items that were ready."""
        self._over = True
        self._close()


def _produce(source: Iterator, items: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in source:
            if not _put(items, (item, None), stop):
                return
        _put(items, (END, None), stop)
    except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
        _put(items, (None, error), stop)


def _put(items: queue.Queue, item: tuple, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            items.put(item, timeout=POLL)
            return True
        except queue.Full:
            continue
    return False


def _shut(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join()
