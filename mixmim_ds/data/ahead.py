"""Work done ahead in a thread."""

from collections.abc import Iterable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.1  # how soon the thread notices that nobody listens any more


def ahead(items: Iterable[T], depth: int) -> Iterator[T]:
    """The items, `depth` of them made in a thread before they are asked for. What that raises is raised here.

    The thread ends with this iterator, after the item that it is making.
    """
    queue: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
    closed = Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not closed.is_set():
            try:
                return queue.put((item, error), timeout=POLL_S)
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if closed.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        closed.set()
        while thread.is_alive():
            try:
                queue.get_nowait()
            except Empty:
                thread.join(POLL_S)
