"""Keep freed memory: on CPUs, giving it back to the system after each tensor can cost more than the arithmetic."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_memory() -> bool:
    """Tell glibc to take large blocks from its heap and to keep them when they are freed; elsewhere do nothing.

    By default it maps each block above 128 KiB to 32 MiB anew and unmaps it when freed, so that every activation of
    every step is faulted in, page by page, and zeroed by the kernel. On a virtual machine we measured a training step
    of ResNet-10 at 112 px ten to twenty times faster with this. The resident size stays near its peak.

    Returns:
        whether the allocator took the settings.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**28}
    return all([mallopt(key, value) == 1 for key, value in settings.items()])
