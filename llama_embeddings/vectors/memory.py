"""Keeps the resident size near what is in use; unless told otherwise, the C library keeps much of what was freed.

Frees nothing itself. Only glibc is spoken to; with other C libraries nothing happens.
"""

from __future__ import annotations

import ctypes
import sys

# Of malloc.h. Arenas are heaps that threads have for themselves, eight for each core unless bounded.
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3
N_ARENAS = 2
# Larger blocks are mapped, and go back when they are freed. Unless set, this grows with the blocks freed, to 32 MiB.
MAPPED_BLOCK_BYTES = 2**20


def bound_heaps() -> None:
    """Once, before there are threads."""
    tune = _find_in_glibc("mallopt")
    if tune is not None:
        tune(_M_ARENA_MAX, N_ARENAS)
        tune(_M_MMAP_THRESHOLD, MAPPED_BLOCK_BYTES)


def release_memory() -> None:
    """After much was freed; takes some milliseconds."""
    trim = _find_in_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _find_in_glibc(name: str) -> ctypes._NamedFuncPointer | None:
    # `malloc_trim` is glibc's alone; where it is missing, `mallopt` may mean something else.
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name) if library is not None and hasattr(library, "malloc_trim") else None
