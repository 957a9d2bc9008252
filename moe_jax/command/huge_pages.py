"""Huge pages for memory that is allocated again in every step."""

import os
import platform
import sys


def use_huge_pages() -> None:
    """Restarts the process, once, with huge pages in glibc's allocator (Linux, glibc 2.35 or newer).

    On a CPU, XLA allocates and frees gigabytes in every step. With 4 KiB pages, the kernel's work for that takes about
    half the time of memory-bound operations. glibc reads the setting only when a process starts.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] == "glibc" and "glibc.malloc.hugetlb" not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
