"""Which texts the store may hold: answers "certainly not" without asking it.

A Bloom filter over text hashes (Bloom, "Space/time trade-offs in hash coding with allowable errors", 1970). A text that
is new, the most usual case there is something to compute, needs no look into the database then, which saves a turn
through a thread while the engine has all cores. It never says "certainly not" of a text that was added; at three
million texts it is wrong about one new text in a hundred, which costs a lookup. Deleted texts stay in it, at the
same price. Texts whose tokens' embeddings are stored are in it by other digits of their hashes. Used on the event
loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import numpy as np

from llama_embeddings.storage.store import EmbeddingStore

N_BITS_LOG2 = 25  # 4 MB
N_PROBES = 4
_MASK = (1 << N_BITS_LOG2) - 1
# Enough hexadecimal digits for all probes.
N_DIGITS = (N_PROBES * N_BITS_LOG2 + 3) // 4
# The first digit that stands for a text: of those with an embedding, and of those with embeddings of their tokens.
OF_TEXTS = 0
OF_TOKENS = N_DIGITS


class KnownTexts:
    """A set of text hashes that may claim to hold one that it does not hold."""

    def __init__(self) -> None:
        self._bits = bytearray(1 << (N_BITS_LOG2 - 3))

    def add(self, text_hashes: Iterable[str], first_digit: int = OF_TEXTS) -> None:
        """Remember hashes, as hexadecimal digits."""
        bits = self._bits
        for text_hash in text_hashes:
            rest = int(text_hash[first_digit : first_digit + N_DIGITS], 16)
            for _ in range(N_PROBES):
                position = rest & _MASK
                bits[position >> 3] |= 1 << (position & 7)
                rest >>= N_BITS_LOG2

    def add_digits(self, digits: str) -> None:
        """The same for thousands: N_DIGITS of each hash, from its first digit on, put together. Ten times as fast."""
        # Two digits are a byte, and those of a hash are an odd number: a zero in front of each makes whole bytes.
        padded = np.zeros((len(digits) // N_DIGITS, N_DIGITS + 1), np.uint8)
        padded[:, 0] = ord("0")
        padded[:, 1:] = np.frombuffer(digits.encode("ascii"), np.uint8).reshape(-1, N_DIGITS)
        numbers = np.frombuffer(bytes.fromhex(padded.tobytes().decode("ascii")), np.uint8)
        numbers = numbers.reshape(-1, (N_DIGITS + 1) // 2)
        # The lowest 64 of the 104 bits, and the highest, which begin at bit 40.
        low = np.ascontiguousarray(numbers[:, -8:]).view(">u8").ravel()
        high = np.ascontiguousarray(numbers[:, :8]).view(">u8").ravel()
        shifted = (low, low >> N_BITS_LOG2, high >> (2 * N_BITS_LOG2 - 40), high >> (3 * N_BITS_LOG2 - 40))
        positions = np.concatenate(shifted).astype(np.uint64) & np.uint64(_MASK)
        bits = np.frombuffer(self._bits, np.uint8)
        np.bitwise_or.at(bits, positions >> np.uint64(3), (1 << (positions & np.uint64(7))).astype(np.uint8))

    def may_hold(self, text_hash: str, first_digit: int = OF_TEXTS) -> bool:
        """False only for a hash that was never added."""
        bits = self._bits
        rest = int(text_hash[first_digit : first_digit + N_DIGITS], 16)
        for _ in range(N_PROBES):
            position = rest & _MASK
            if not bits[position >> 3] >> (position & 7) & 1:
                return False
            rest >>= N_BITS_LOG2
        return True


async def load_known_texts(store: EmbeddingStore, known: KnownTexts) -> None:
    """Fill the filter from the stored rows."""
    async for digits in store.read_digits_of_text_hashes(OF_TEXTS, N_DIGITS):
        await asyncio.to_thread(known.add_digits, digits)
    async for digits in store.read_digits_of_bundle_hashes(OF_TOKENS, N_DIGITS):
        await asyncio.to_thread(known.add_digits, digits)
