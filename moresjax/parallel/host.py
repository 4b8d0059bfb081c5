"""Settings of the host process."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # <malloc.h>


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory instead of handing it back to the kernel.

    XLA's CPU backend allocates the temporaries of every run of a program anew. glibc maps blocks of
    that size from the kernel and unmaps them when they are freed, so each train step pays for tens
    of thousands of page faults. Call it before threads start. For programs that do little but run
    steps on a CPU; a process that must give memory back (an importer) should not call it.

    Returns:
      Whether the settings were taken; False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # One arena: the others are limited to 64 MiB and map what is larger after all.
    settings = {
        _M_ARENA_MAX: 1,
        _M_MMAP_MAX: 0,
        _M_TRIM_THRESHOLD: 2**31 - 1,
        _M_TOP_PAD: 64 << 20,
    }
    return all([libc.mallopt(name, value) == 1 for name, value in settings.items()])
