"""Settings of the host process."""

import os
import sys

_HUGE = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Starts this process again with huge pages for large blocks, unless it has chosen already.

    XLA's CPU backend allocates the temporaries of every run of a program anew, and the kernel gives
    them out page by page: each train step pays for hundreds of thousands of page faults. glibc asks
    for pages of 2 MiB when its tunable says so, which it reads at the start of a process only. Call
    it first of all: nothing of the process survives. Does nothing on systems other than Linux, and
    a C library other than glibc ignores it.
    """
    chosen = os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or not sys.executable or "hugetlb" in chosen:
        return
    os.environ["GLIBC_TUNABLES"] = f"{chosen}:{_HUGE}".lstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
