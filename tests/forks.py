"""Processes that a test forks off: for what they have of their parent, and what becomes of them without it."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

FORK = multiprocessing.get_context("fork")


def in_fork(function: Callable[[], Any]) -> Any:
    """What the function gives in a forked process."""
    ours, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: theirs.send(function()))
    process.start()
    assert ours.poll(60)
    answer = ours.recv()
    process.join()
    return answer


def goes_with_its_parent(begin: Callable[[Callable[[int], object]], object]) -> bool:
    """Whether a process ends when the one that began it is killed: it holds an end of a pipe as long as it lives.

    Args:
        begin: in a process of its own begins another one, calls its argument with that one's id, and waits.
    """
    ours, theirs = FORK.Pipe(duplex=False)
    parent = FORK.Process(target=lambda: begin(theirs.send))
    parent.start()
    theirs.close()
    assert ours.poll(60)
    pid = ours.recv()
    parent.kill()
    parent.join()
    gone = ours.poll(30)
    if not gone:
        os.kill(pid, signal.SIGKILL)
    return gone
