"""Counts the values in a JSON text while it comes in, so that one that would not fit into memory is never parsed.

A list of empty lists takes two hundred times its size once it is parsed and checked, and as long as half a minute for
16 MB of it; a long string takes its size. So what counts is how many values there are, and what is in strings does not.
Checks nothing else: what is no JSON is found out by the parser.
"""

from __future__ import annotations

# A list or object takes so many times what a number does, in memory and in time.
WEIGHT_OF_CONTAINER = 20
# Bodies of at most so many bytes, all here at once, are not worth counting.
SMALL_BODY_BYTES = 8192


class JsonCounter:
    """Fed with the parts of a text in their order, wherever it is cut."""

    def __init__(self) -> None:
        self.n_values = 1
        self._is_in_string = False
        self._cut_escape = b""

    def feed(self, part: bytes) -> None:
        """Add what is in this part to `n_values`; lists and objects count WEIGHT_OF_CONTAINER times."""
        data = self._cut_escape + part
        is_cut = (len(data) - len(data.rstrip(b"\\"))) % 2 == 1
        self._cut_escape = b"\\" if is_cut else b""
        if is_cut:
            data = data[:-1]
        # Without escapes each quotation mark begins or ends a string.
        pieces = data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(pieces[1 if self._is_in_string else 0 :: 2])
        self._is_in_string ^= len(pieces) % 2 == 0
        n_containers = outside.count(b"[") + outside.count(b"{")
        self.n_values += outside.count(b",") + WEIGHT_OF_CONTAINER * n_containers
