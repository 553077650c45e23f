"""Memory of runs on the CPU."""

import resource

from mixmim_ds.libc import keep_memory


def page_faults() -> int:
    """Of this process, when it fills 64 MiB as it has before."""
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(b"1") * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_malloc_fills_what_it_has_without_the_kernel() -> None:
    keep_memory()
    assert page_faults() < 16, "by default 16,384, or 32 of huge pages"
