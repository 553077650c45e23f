"""Calls of Linux' C library that Python has no name for."""

import ctypes
import signal

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl(2)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3)


def die_with_parent(number: signal.Signals) -> None:
    """Lets the kernel send this process a signal when the thread that started it is gone."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, number)


def keep_memory() -> None:
    """Lets malloc keep what it has got, from here on. By default the kernel gives it every large tensor anew, cleared
    page by page, and takes it back."""
    _LIBC.mallopt(_M_MMAP_MAX, 0)
    _LIBC.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
