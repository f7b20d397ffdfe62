"""Gives memory that was freed back to the operating system. Frees nothing itself."""

from __future__ import annotations

import ctypes
import sys


def release_memory() -> None:
    """After much was freed: glibc keeps it for later otherwise. With other C libraries nothing happens."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
