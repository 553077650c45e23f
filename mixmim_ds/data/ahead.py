"""Work done ahead in a thread."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items, `depth` of them made in a thread before they are asked for. What that raises is raised here.

    The thread ends with this iterator, after the item that it is making.
    """
    source = iter(items)

    def one() -> list[T]:
        """The next item, or none at the end."""
        return list(islice(source, 1))

    with ThreadPoolExecutor(1, "ahead") as thread:
        waiting = deque(thread.submit(one) for _ in range(depth))
        try:
            while found := waiting.popleft().result():
                waiting.append(thread.submit(one))
                yield from found
        finally:
            thread.shutdown(cancel_futures=True)
