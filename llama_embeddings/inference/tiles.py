"""Orders the texts of a pass so that attention computes less.

llama.cpp's attention on processors works in tiles of 64 by 64 tokens, and skips a tile only if no token in it may see
another. Texts packed back to back lie across the borders, and each that does brings in two tiles, of which most is
computed for nothing: of texts of 8 tokens, 192 a pass, a twentieth of the whole time. So texts are put together whose
tokens add up to whole tiles.

Where attention has no tiles, or others than these, the order is as good as any other. Knows lengths alone, neither
tokens nor models.
"""

from __future__ import annotations

from collections.abc import Sequence

# GGML_FA_TILE_Q and GGML_FA_TILE_KV of llama.cpp, the same on all processors.
TILE = 64
# So many texts are considered as company of one. More make a hit likelier; 40 of mixed lengths hardly ever miss.
MAX_CANDIDATES = 40


def find_filling(first: int, candidates: Sequence[int], *, room: int, offset: int = 0) -> list[int] | None:
    """Which candidates fill the tiles of a text of `first` tokens up to a border; None if no choice does.

    `candidates` are lengths in tokens; indices of theirs are returned, and those that come first are preferred. The
    text begins `offset` tokens behind a border. The nearest border that can be met wins; at most `room` tokens are
    taken, the text's own included.
    """
    wanted = -(offset + first) % TILE
    mask = (1 << max(room - first + 1, 0)) - 1
    # Bit n of the k-th number: n tokens can be made of the first k candidates.
    reachable = [1 & mask]
    for length in candidates:
        reachable.append((reachable[-1] | reachable[-1] << length) & mask)
    while wanted <= room - first:
        if reachable[-1] >> wanted & 1:
            return _trace(candidates, reachable, wanted)
        wanted += TILE
    return None


def _trace(candidates: Sequence[int], reachable: Sequence[int], n_tokens: int) -> list[int]:
    """The candidates that make so many tokens: from the last on, each that those before it cannot do without."""
    chosen = []
    for number in range(len(candidates), 0, -1):
        if not reachable[number - 1] >> n_tokens & 1:
            chosen.append(number - 1)
            n_tokens -= candidates[number - 1]
    return chosen


def arrange(lengths: Sequence[int]) -> list[int]:
    """The positions of all texts of a pass in the order to compute them; those that fill no tile come last."""
    left = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    filled: list[int] = []
    loose: list[int] = []
    while left:
        first, candidates = left[0], left[1 : 1 + MAX_CANDIDATES]
        room = sum(lengths[position] for position in left)
        filling = find_filling(lengths[first], [lengths[position] for position in candidates], room=room)
        if filling is None:
            # Nor would those of the same length have one.
            block = [position for position in left if lengths[position] == lengths[first]]
            loose += block
        else:
            block = [first, *(candidates[number] for number in filling)]
            filled += block
        taken = set(block)
        left = [position for position in left if position not in taken]
    return filled + loose
