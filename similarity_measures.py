"""Measures of similarity and dependence between embeddings, and the registry that names them.

A vector measure compares one query with many candidates: `measure(query (d,), candidates (n, d)) -> float64 (n,)`.
It sees the two vectors as d paired observations where it is a statistic (rank correlations, HSIC, …) and as points in
d dimensions where it is a distance. `maxsim` compares two texts token by token and takes two matrices. `MEASURES` holds
them all with range, direction, cost and symmetry; endpoints and tables are made from it.

The rules that hold for every measure:

- Values are computed in float64, whatever comes in. A NaN, an infinity, or a magnitude above 1e100 (whose square
  could overflow) is a ValueError, and so are empty vectors and different lengths. float32 embeddings are always inside.
- No result is NaN. Where a formula divides by zero the result is 0.0, "no similarity shown": a vector of zeros in
  `cosine_similarity` and `jensen_shannon`, a vector of one repeated value in all correlations and dependences, also
  when both vectors are the same one. Distances need no such rule.
- A batch gives bit for bit what its candidates give one by one.

The loops are compiled by Numba, run on one thread (the server owns the cores), release the GIL and allocate O(d) per
call and, for the rank measures, O(n d). The machine code is kept in Numba's cache where some cache directory can be
written and compiled anew where none can; `warm_up()` takes the pause out of the first request either way.

Not here: p-values, indexes, searching, anything of HTTP. Nothing is logged and nothing is read from the environment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Positions = NDArray[np.int64]
Words = NDArray[np.uint64]

LARGEST_MAGNITUDE = 1e100
"""Larger values are refused: their squares, summed, could leave float64."""

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])


def _compile(*liberties: str) -> Callable[[_FunctionT], _FunctionT]:
    """Compile with Numba; `liberties` are LLVM's fast-math flags, of which two are used here.

    "reassoc" lets sums be reordered, hence use SIMD (a rounding error apart from the sum in order); "contract" fuses
    a multiplication with an addition. The others would let the compiler assume that NaN and infinity never occur.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": set(liberties) or False}

    def decorate(function: _FunctionT) -> _FunctionT:
        try:
            return cast(_FunctionT, njit(function, cache=True, **options))
        except RuntimeError:  # no cache directory can be written, as in a container with a read-only file system
            return cast(_FunctionT, njit(function, **options))

    return decorate


# ---------------------------------------------------------------------------------------------------------------------
# Input
# ---------------------------------------------------------------------------------------------------------------------


@_compile()
def _is_usable(value: float) -> bool:
    """Finite and not too large; both comparisons are false for NaN."""
    return -LARGEST_MAGNITUDE <= value <= LARGEST_MAGNITUDE


@_compile()
def _are_usable(values: Vector) -> bool:
    usable = True
    for value in values:  # no early exit: that would cost the SIMD, and bad input is the exception
        usable &= _is_usable(value)
    return usable


@_compile()
def _are_all_usable(x: Vector, Y: Matrix) -> bool:
    return _are_usable(x) and _are_usable(Y.reshape(-1))


def _convert(values: ArrayLike) -> NDArray[np.float64]:
    """C-contiguous, aligned, writable float64: one type for the compiled code, so nothing is ever compiled twice."""
    converted = np.asarray(values, np.float64)
    return converted if converted.flags.carray else converted.copy()


def _refuse_unusable(values: NDArray[np.float64], role: str) -> None:
    """Raise ValueError naming the first value that is NaN, infinite or too large, if there is one."""
    unusable = ~(np.abs(values) <= LARGEST_MAGNITUDE)
    if not unusable.any():
        return
    position = int(unusable.argmax())
    *rows, dimension = np.unravel_index(position, values.shape)
    raise ValueError(
        f"The {' '.join([role, *map(str, rows)])} has the value {values.flat[position]} at dimension {dimension}. "
        f"Every value has to be finite and at most {LARGEST_MAGNITUDE:g} in magnitude."
    )


def _check_shapes(query: ArrayLike, candidates: ArrayLike, minimum_dimensions: int = 1) -> tuple[Vector, Matrix]:
    """Query (d,) and candidates (n, d) as float64, or ValueError. No candidates at all (0, d) are fine."""
    # What `_convert` does, without its calls, and one comparison for three facts: half a microsecond a pair.
    x, Y = np.asarray(query, np.float64), np.asarray(candidates, np.float64)
    x, Y = x if x.flags.carray else x.copy(), Y if Y.flags.carray else Y.copy()
    if Y.shape[1:] != x.shape or x.ndim != 1 or x.size < minimum_dimensions:
        _refuse_shapes(x, Y, minimum_dimensions)
    return x, Y


def _refuse_shapes(x: Vector, Y: Matrix, minimum_dimensions: int) -> NoReturn:
    if x.ndim != 1 or Y.ndim != 2:
        raise ValueError(f"Expected a query (d,) and candidates (n, d), got the shapes {x.shape} and {Y.shape}.")
    if x.size != Y.shape[1]:
        raise ValueError(
            f"The vectors have different lengths: {x.size} and {Y.shape[1]}. Compare vectors of one model only."
        )
    raise ValueError(f"The vectors have {x.size} dimensions; this measure needs at least {minimum_dimensions}.")


def _check(query: ArrayLike, candidates: ArrayLike, minimum_dimensions: int = 1) -> tuple[Vector, Matrix]:
    """The same, and every value usable."""
    x, Y = _check_shapes(query, candidates, minimum_dimensions)
    if not _are_all_usable(x, Y):
        _refuse_unusable(x, "query")
        _refuse_unusable(Y, "candidate")
    return x, Y


def _score_geometry(score_rows: Callable[[Vector, Matrix], Vector], query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Check the shapes, and let `score_rows` look at the values: one call into compiled code, half of a pair's time.

    It answers with no scores where a value is unusable.
    """
    x, Y = _check_shapes(query, candidates)
    scores = score_rows(x, Y)
    if scores.size == 0:
        _refuse_unusable(x, "query")
        _refuse_unusable(Y, "candidate")
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------


@_compile("reassoc", "contract")
def _multiply_and_add(x: Vector, y: Vector) -> float:
    total = 0.0
    for i in range(x.size):
        total += x[i] * y[i]
    return total


@_compile()
def _clip(value: float, lowest: float, highest: float) -> float:
    """Take off the last bit by which rounding passes a bound."""
    return max(lowest, min(highest, value))


@_compile()
def _dot_rows(x: Vector, Y: Matrix) -> Vector:
    if not _are_all_usable(x, Y):
        return np.empty(0)
    scores = np.empty(Y.shape[0])
    for row in range(Y.shape[0]):
        scores[row] = _multiply_and_add(x, Y[row])
    return scores


@_compile()
def _cosine_rows(x: Vector, Y: Matrix) -> Vector:
    if not _are_all_usable(x, Y):
        return np.empty(0)
    scores = np.zeros(Y.shape[0])
    norm_x = math.sqrt(_multiply_and_add(x, x))
    for row in range(Y.shape[0]):
        norms = norm_x * math.sqrt(_multiply_and_add(Y[row], Y[row]))
        if norms > 0.0:
            scores[row] = _clip(_multiply_and_add(x, Y[row]) / norms, -1.0, 1.0)
    return scores


@_compile("reassoc", "contract")
def _euclidean_rows(x: Vector, Y: Matrix) -> Vector:
    if not _are_all_usable(x, Y):
        return np.empty(0)
    distances = np.empty(Y.shape[0])
    for row in range(Y.shape[0]):
        total = 0.0
        for i in range(x.size):
            total += (x[i] - Y[row, i]) ** 2
        distances[row] = math.sqrt(total)
    return distances


@_compile("reassoc", "contract")
def _manhattan_rows(x: Vector, Y: Matrix) -> Vector:
    if not _are_all_usable(x, Y):
        return np.empty(0)
    distances = np.empty(Y.shape[0])
    for row in range(Y.shape[0]):
        total = 0.0
        for i in range(x.size):
            total += abs(x[i] - Y[row, i])
        distances[row] = total
    return distances


@_compile()
def _chebyshev_rows(x: Vector, Y: Matrix) -> Vector:
    if not _are_all_usable(x, Y):
        return np.empty(0)
    distances = np.empty(Y.shape[0])
    lanes = np.empty(8)  # eight running maxima: one alone would be a chain of d dependent steps
    for row in range(Y.shape[0]):
        lanes[:] = 0.0
        whole = x.size - x.size % 8
        for start in range(0, whole, 8):
            for lane in range(8):
                difference = abs(x[start + lane] - Y[row, start + lane])
                lanes[lane] = difference if difference > lanes[lane] else lanes[lane]
        for i in range(whole, x.size):
            lanes[0] = max(lanes[0], abs(x[i] - Y[row, i]))
        distances[row] = lanes.max()
    return distances


# The same for one pair, as a plain number: an array takes as long to hand over as it takes to fill. NaN says that there
# is something unusable, and leaves it to the slow way to say what.


@_compile()
def _single(scores: Vector) -> float:
    return scores[0] if scores.size > 0 else math.nan


@_compile()
def _cosine_pair(x: Vector, y: Vector) -> float:
    return _single(_cosine_rows(x, y.reshape(1, -1)))


@_compile()
def _dot_pair(x: Vector, y: Vector) -> float:
    return _single(_dot_rows(x, y.reshape(1, -1)))


@_compile()
def _euclidean_pair(x: Vector, y: Vector) -> float:
    return _single(_euclidean_rows(x, y.reshape(1, -1)))


@_compile()
def _manhattan_pair(x: Vector, y: Vector) -> float:
    return _single(_manhattan_rows(x, y.reshape(1, -1)))


@_compile()
def _chebyshev_pair(x: Vector, y: Vector) -> float:
    return _single(_chebyshev_rows(x, y.reshape(1, -1)))


def cosine_similarity(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Cosine of the angle: x·y / (|x| |y|).

    Range -1 to 1, higher is more similar, symmetric, O(d). A vector of zeros has no direction and gives 0.0.
    Query (d,), candidates (n, d), result float64 (n,).
    """
    return _score_geometry(_cosine_rows, query, candidates)


def dot_product(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Inner product: Σ xᵢ yᵢ; equals the cosine for vectors of unit length.

    Unbounded, higher is more similar, symmetric, O(d). Query (d,), candidates (n, d), result float64 (n,).
    """
    return _score_geometry(_dot_rows, query, candidates)


def euclidean_distance(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Straight-line distance: √Σ (xᵢ - yᵢ)².

    Range 0 to ∞, lower is more similar, symmetric, O(d). Query (d,), candidates (n, d), result float64 (n,).
    """
    return _score_geometry(_euclidean_rows, query, candidates)


def manhattan_distance(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """City-block distance: Σ |xᵢ - yᵢ|.

    Range 0 to ∞, lower is more similar, symmetric, O(d). Query (d,), candidates (n, d), result float64 (n,).
    """
    return _score_geometry(_manhattan_rows, query, candidates)


def chebyshev_distance(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Largest difference in any dimension: max |xᵢ - yᵢ|.

    Range 0 to ∞, lower is more similar, symmetric, O(d). Query (d,), candidates (n, d), result float64 (n,).
    """
    return _score_geometry(_chebyshev_rows, query, candidates)


# ---------------------------------------------------------------------------------------------------------------------
# Linear correlation
# ---------------------------------------------------------------------------------------------------------------------


@_compile("reassoc", "contract")
def _center(values: Vector, centered: Vector) -> bool:
    """Write values minus their mean; False if they are all the same, which rounding of the mean would hide."""
    total = 0.0
    varies = False
    for value in values:
        total += value
        varies |= value != values[0]
    mean = total / values.size
    for i in range(values.size):
        centered[i] = values[i] - mean
    return varies


@_compile()
def _pearson_rows(x: Vector, Y: Matrix) -> Vector:
    scores = np.zeros(Y.shape[0])
    a, b = np.empty(x.size), np.empty(x.size)
    if not _center(x, a):
        return scores
    norm_a = math.sqrt(_multiply_and_add(a, a))
    for row in range(Y.shape[0]):
        varies = _center(Y[row], b)
        norms = norm_a * math.sqrt(_multiply_and_add(b, b))
        if varies and norms > 0.0:
            scores[row] = _clip(_multiply_and_add(a, b) / norms, -1.0, 1.0)
    return scores


def pearson_correlation(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Pearson's r: the cosine of the two vectors after each has lost its mean.

    Range -1 to 1, higher is more similar, symmetric, O(d). A constant vector gives 0.0.
    Query (d,), candidates (n, d), result float64 (n,).
    """
    return _pearson_rows(*_check(query, candidates))


# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------
# All rank measures work on three whole numbers per dimension: `below`, how many values are smaller; `upto`, how many
# are not larger; `slot`, its place in the sorted order, no two the same. The midrank is (below + upto + 1) / 2. Whole
# numbers make results independent of any strictly increasing map of a vector, to the last bit.


@_compile()
def _close_ties(order: Positions, start: int, end: int, upto: Positions) -> None:
    for place in range(start, end):
        upto[order[place]] = end


@_compile()
def _rank(values: Vector, order: Positions, below: Positions, upto: Positions, slot: Positions) -> None:
    """Fill `below`, `upto` and `slot` (d,) from the values and the positions that sort them."""
    start = 0
    for place in range(order.size):
        i = order[place]
        if values[i] != values[order[start]]:
            _close_ties(order, start, place, upto)
            start = place
        below[i] = start
        slot[i] = place
    _close_ties(order, start, order.size, upto)


@_compile()
def _allocate_ranks(dimensions: int) -> tuple[Positions, Positions, Positions]:
    return np.empty(dimensions, np.int64), np.empty(dimensions, np.int64), np.empty(dimensions, np.int64)


@_compile()
def _vary(upto: Positions, below: Positions) -> bool:
    """Whether not all values are the same."""
    return upto[0] - below[0] < upto.size


_RANK_BLOCK_ROWS = 64  # values and sorted positions of a block stay in the cache between sorting and scoring


def _score_by_rank(
    score_rows: Callable[..., Vector], query: ArrayLike, candidates: ArrayLike, minimum_dimensions: int = 1
) -> Vector:
    """Check the input, sort it, and call `score_rows(x, order_x, Y, orders)` for a block of rows at a time.

    NumPy's sort uses SIMD and is faster than one compiled here; the query's is stable because ξ depends on it.
    """
    x, Y = _check(query, candidates, minimum_dimensions)
    order_x = np.argsort(x, kind="stable")
    scores = np.empty(Y.shape[0])
    for start in range(0, Y.shape[0], _RANK_BLOCK_ROWS):
        block = Y[start : start + _RANK_BLOCK_ROWS]
        scores[start : start + _RANK_BLOCK_ROWS] = score_rows(x, order_x, block, np.argsort(block, axis=1))
    return scores


@_compile("reassoc", "contract")
def _correlate_ranks(below_x: Positions, upto_x: Positions, below_y: Positions, upto_y: Positions) -> float:
    """Pearson's r of the midranks, from sums of whole numbers; twice the centred midrank is below + upto - d."""
    n = below_x.size
    xy = xx = yy = 0
    for i in range(n):
        a, b = below_x[i] + upto_x[i] - n, below_y[i] + upto_y[i] - n
        xy += a * b
        xx += a * a
        yy += b * b
    return xy / math.sqrt(float(xx) * float(yy)) if xx > 0 and yy > 0 else 0.0


@_compile()
def _spearman_rows(x: Vector, order_x: Positions, Y: Matrix, orders: Positions) -> Vector:
    scores = np.empty(Y.shape[0])
    below_x, upto_x, slot = _allocate_ranks(x.size)
    below, upto, _ = _allocate_ranks(x.size)
    _rank(x, order_x, below_x, upto_x, slot)
    for row in range(Y.shape[0]):
        _rank(Y[row], orders[row], below, upto, slot)
        scores[row] = _clip(_correlate_ranks(below_x, upto_x, below, upto), -1.0, 1.0)
    return scores


def spearman_rho(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Spearman's ρ: Pearson's r of the midranks (tied values share their mean rank).

    Range -1 to 1, higher is more similar, symmetric, O(d log d). A constant vector gives 0.0.
    Query (d,), candidates (n, d), result float64 (n,). Source: Spearman, American Journal of Psychology 15 (1904).
    """
    return _score_by_rank(_spearman_rows, query, candidates)


# Kendall's tau and Hoeffding's D both ask, going through the dimensions by rising x: how many y so far are smaller?
# The y so far are a set of slots: one bit each in 64-bit words, and a Fenwick tree over the words' counts. At 384
# dimensions that are six words; at 4,096 it is still O(log d) a question, with a tree 64 times smaller than usual.


@_compile()
def _count_bits(word: np.uint64) -> Any:
    """Number of ones in a uint64; LLVM recognises the idiom and emits one instruction."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@_compile()
def _allocate_slot_set(dimensions: int) -> tuple[Words, Positions]:
    n_words = dimensions // 64 + 1
    return np.zeros(n_words, np.uint64), np.zeros(n_words + 1, np.int64)


@_compile()
def _add_slot(words: Words, tree: Positions, slot: int) -> None:
    word = slot >> 6
    words[word] |= np.uint64(1) << np.uint64(slot & 63)
    node = word + 1
    while node < tree.size:
        tree[node] += 1
        node += node & -node


@_compile()
def _count_slots_below(words: Words, tree: Positions, slot: int) -> int:
    node = slot >> 6
    mask = (np.uint64(1) << np.uint64(slot & 63)) - np.uint64(1)
    count = _count_bits(words[node] & mask)
    while node > 0:
        count += tree[node]
        node -= node & -node
    return count


@_compile()
def _count_concordance(
    order_x: Positions,
    upto_x: Positions,
    below: Positions,
    upto: Positions,
    slot: Positions,
    words: Words,
    tree: Positions,
) -> int:
    """Concordant minus discordant pairs. Dimensions with the same x ask before any of them enters the set."""
    words[:] = 0
    tree[:] = 0
    balance = start = 0
    while start < order_x.size:
        end = upto_x[order_x[start]]
        for place in range(start, end):
            i = order_x[place]
            smaller = _count_slots_below(words, tree, below[i])
            not_larger = smaller if upto[i] - below[i] == 1 else _count_slots_below(words, tree, upto[i])
            balance += smaller - (start - not_larger)
        for place in range(start, end):
            _add_slot(words, tree, slot[order_x[place]])
        start = end
    return balance


@_compile()
def _count_untied_pairs(below: Positions, upto: Positions) -> int:
    n = below.size
    twice_tied = 0
    for i in range(n):
        twice_tied += upto[i] - below[i] - 1
    return (n * (n - 1) - twice_tied) // 2


@_compile()
def _normalise_balance(balance: int, untied_x: int, untied_y: int) -> float:
    if untied_x == 0 or untied_y == 0:
        return 0.0
    return _clip(balance / math.sqrt(float(untied_x) * float(untied_y)), -1.0, 1.0)


@_compile()
def _kendall_rows(x: Vector, order_x: Positions, Y: Matrix, orders: Positions) -> Vector:
    scores = np.zeros(Y.shape[0])
    below_x, upto_x, _ = _allocate_ranks(x.size)
    below, upto, slot = _allocate_ranks(x.size)
    words, tree = _allocate_slot_set(x.size)
    _rank(x, order_x, below_x, upto_x, slot)
    untied_x = _count_untied_pairs(below_x, upto_x)
    for row in range(Y.shape[0]):
        _rank(Y[row], orders[row], below, upto, slot)
        balance = _count_concordance(order_x, upto_x, below, upto, slot, words, tree)
        scores[row] = _normalise_balance(balance, untied_x, _count_untied_pairs(below, upto))
    return scores


def kendall_tau(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Kendall's τ-b: (C - D) / √((N - Tx)(N - Ty)), with C concordant, D discordant, N all, T tied pairs.

    Range -1 to 1, higher is more similar, symmetric, O(d log d). A constant vector gives 0.0.
    Query (d,), candidates (n, d), result float64 (n,). Sources: Kendall, Biometrika 33 (1945); Fenwick, Software:
    Practice and Experience 24 (1994), for the tree that counts the pairs.
    """
    return _score_by_rank(_kendall_rows, query, candidates)


@_compile()
def _fill_bivariate_ranks(
    order_x: Positions,
    upto_x: Positions,
    below: Positions,
    upto: Positions,
    slot: Positions,
    words: Words,
    tree: Positions,
    Q: Vector,
) -> None:
    """Hoeffding's Qᵢ: 1, plus 1 for each point below in both, 1/2 if tied in one, 1/4 if tied in both.

    That is a quarter of four counts: y below and y not above, each among the points with smaller x (before the group
    of equal x enters the set) and among those with x not larger (after it), less the point itself.
    """
    words[:] = 0
    tree[:] = 0
    start = 0
    while start < order_x.size:
        end = upto_x[order_x[start]]
        for turn in range(2):
            for place in range(start, end):
                i = order_x[place]
                smaller = _count_slots_below(words, tree, below[i])
                untied = upto[i] - below[i] == 1
                not_larger = smaller + turn if untied else _count_slots_below(words, tree, upto[i])
                Q[i] = 0.25 * (smaller + not_larger) + (Q[i] + 0.75 if turn else 0.0)
            if turn == 0:
                for place in range(start, end):
                    _add_slot(words, tree, slot[order_x[place]])
        start = end


@_compile("reassoc", "contract")
def _combine_hoeffding(below_x: Positions, upto_x: Positions, below: Positions, upto: Positions, Q: Vector) -> float:
    n = float(Q.size)
    D1 = D2 = D3 = 0.0
    for i in range(Q.size):
        R, S = 0.5 * (below_x[i] + upto_x[i] + 1), 0.5 * (below[i] + upto[i] + 1)
        D1 += (Q[i] - 1) * (Q[i] - 2)
        D2 += (R - 1) * (R - 2) * (S - 1) * (S - 2)
        D3 += (R - 2) * (S - 2) * (Q[i] - 1)
    numerator = (n - 2) * (n - 3) * D1 + D2 - 2 * (n - 2) * D3
    return 30 * numerator / (n * (n - 1) * (n - 2) * (n - 3) * (n - 4))


_HOEFFDING_DIMENSIONS = 5  # with fewer the formula divides by zero


@_compile()
def _hoeffding_rows(x: Vector, order_x: Positions, Y: Matrix, orders: Positions) -> Vector:
    scores = np.zeros(Y.shape[0])
    below_x, upto_x, _ = _allocate_ranks(x.size)
    below, upto, slot = _allocate_ranks(x.size)
    words, tree = _allocate_slot_set(x.size)
    Q = np.empty(x.size)
    _rank(x, order_x, below_x, upto_x, slot)
    for row in range(Y.shape[0]):
        _rank(Y[row], orders[row], below, upto, slot)
        if _vary(upto_x, below_x) and _vary(upto, below):
            _fill_bivariate_ranks(order_x, upto_x, below, upto, slot, words, tree, Q)
            scores[row] = _combine_hoeffding(below_x, upto_x, below, upto, Q)
    return scores


def hoeffdings_d(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Hoeffding's D, 30 times the original: any kind of dependence, monotone or not.

    30 [(d-2)(d-3) D₁ + D₂ - 2(d-2) D₃] / [d(d-1)(d-2)(d-3)(d-4)], where D₁ = Σ (Qᵢ-1)(Qᵢ-2),
    D₂ = Σ (Rᵢ-1)(Rᵢ-2)(Sᵢ-1)(Sᵢ-2), D₃ = Σ (Rᵢ-2)(Sᵢ-2)(Qᵢ-1), R and S midranks, Q bivariate ranks.

    Range -0.5 to 1 without ties (1: each is a strictly monotone function of the other, rising or falling); ties pull
    the ends in or, in few dimensions, push the lower one out. Higher is more dependent, symmetric, O(d log d) where
    the definition is O(d²). Needs 5 dimensions; a constant vector gives 0.0.
    Query (d,), candidates (n, d), result float64 (n,). Sources: Hoeffding, Annals of Mathematical Statistics 19 (1948);
    ties as in Hollander and Wolfe, Nonparametric Statistical Methods, and SAS PROC CORR.
    """
    return _score_by_rank(_hoeffding_rows, query, candidates, _HOEFFDING_DIMENSIONS)


@_compile()
def _compare_with_median(below: int, upto: int, dimensions: int) -> int:
    """1 above the median, -1 below it, 0 on it: the signs of value minus median, by counts instead of arithmetic."""
    if 2 * below >= dimensions:
        return 1
    return -1 if 2 * upto <= dimensions else 0


@_compile()
def _correlate_median_signs(below_x: Positions, upto_x: Positions, below: Positions, upto: Positions) -> float:
    xy = xx = yy = 0
    for i in range(below.size):
        a = _compare_with_median(below_x[i], upto_x[i], below.size)
        b = _compare_with_median(below[i], upto[i], below.size)
        xy += a * b
        xx += a * a
        yy += b * b
    return xy / math.sqrt(float(xx) * float(yy)) if xx > 0 and yy > 0 else 0.0


@_compile()
def _blomqvist_rows(x: Vector, order_x: Positions, Y: Matrix, orders: Positions) -> Vector:
    scores = np.empty(Y.shape[0])
    below_x, upto_x, slot = _allocate_ranks(x.size)
    below, upto, _ = _allocate_ranks(x.size)
    _rank(x, order_x, below_x, upto_x, slot)
    for row in range(Y.shape[0]):
        _rank(Y[row], orders[row], below, upto, slot)
        scores[row] = _clip(_correlate_median_signs(below_x, upto_x, below, upto), -1.0, 1.0)
    return scores


def blomqvist_beta(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Blomqvist's β, the medial correlation: Σ sᵢ tᵢ / √(Σ sᵢ² Σ tᵢ²), s and t the signs of value minus median.

    Without values on a median it is Blomqvist's (agreeing - disagreeing) / all; a value on its median counts as
    neither. The norm keeps identical vectors at 1 for odd d and with ties.
    Range -1 to 1, higher is more similar, symmetric, O(d log d). A constant vector gives 0.0.
    Query (d,), candidates (n, d), result float64 (n,). Source: Blomqvist, Annals of Mathematical Statistics 21 (1950).
    """
    return _score_by_rank(_blomqvist_rows, query, candidates)


@_compile()
def _chatterjee(order_x: Positions, below: Positions, upto: Positions) -> float:
    n = below.size
    steps = spread = 0
    for place in range(1, n):
        steps += abs(upto[order_x[place]] - upto[order_x[place - 1]])
    for i in range(n):
        spread += below[i] * (n - below[i])
    return 1.0 - n * steps / (2.0 * spread) if spread > 0 else 0.0


@_compile()
def _chatterjee_rows(x: Vector, order_x: Positions, Y: Matrix, orders: Positions) -> Vector:
    scores = np.zeros(Y.shape[0])
    below, upto, slot = _allocate_ranks(x.size)
    if x[order_x[0]] == x[order_x[-1]]:
        return scores
    for row in range(Y.shape[0]):
        _rank(Y[row], orders[row], below, upto, slot)
        scores[row] = _chatterjee(order_x, below, upto)
    return scores


def chatterjee_xi(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Chatterjee's ξ: how far the candidate is a function of the query, of whatever shape.

    1 - d Σ |rᵢ₊₁ - rᵢ| / (2 Σ lᵢ (d - lᵢ)), the dimensions in order of the query's values, rᵢ the number of candidate
    values ≤ yᵢ and lᵢ the number ≥ yᵢ. Directed: ξ(x, y) is not ξ(y, x), and it is not symmetrised here. Equal query
    values keep the order of their dimensions, where the source breaks ties at random, so that results repeat.

    Range -1 to 1; near 0 for independence, and at most (d - 2) / (d + 1) without ties, which identical vectors reach
    (0.992 at d = 384). Higher is more dependent, O(d log d). A constant vector gives 0.0.
    Query (d,), candidates (n, d), result float64 (n,). Source: Chatterjee, Journal of the American Statistical
    Association 116 (2021).
    """
    return _score_by_rank(_chatterjee_rows, query, candidates)


# ---------------------------------------------------------------------------------------------------------------------
# Information
# ---------------------------------------------------------------------------------------------------------------------


@_compile()
def _choose_number_of_bins(dimensions: int) -> int:
    """The cube root of the sample size, rounded: 7 bins at 384 dimensions, some 8 observations in each of 49 cells."""
    return max(2, round(dimensions ** (1 / 3)))


@_compile()
def _fill_bins(below: Positions, upto: Positions, n_bins: int, bins: Positions) -> None:
    """Equal-frequency bins by midrank: equal values share a bin, and without ties no two bins differ by more than 1."""
    for i in range(bins.size):
        bins[i] = n_bins * (below[i] + upto[i]) // (2 * bins.size)


@_compile()
def _sum_k_log_k(counts: Positions) -> float:
    total = 0.0
    for count in counts:
        if count > 1:
            total += count * math.log(count)
    return total


@_compile()
def _normalised_information(bins_x: Positions, bins_y: Positions, n_bins: int) -> float:
    joint = np.zeros(n_bins * n_bins, np.int64)
    counts_x, counts_y = np.zeros(n_bins, np.int64), np.zeros(n_bins, np.int64)
    for i in range(bins_x.size):
        joint[bins_x[i] * n_bins + bins_y[i]] += 1
        counts_x[bins_x[i]] += 1
        counts_y[bins_y[i]] += 1
    whole = bins_x.size * math.log(bins_x.size)
    entropy_x, entropy_y = whole - _sum_k_log_k(counts_x), whole - _sum_k_log_k(counts_y)
    if counts_x.max() == bins_x.size or counts_y.max() == bins_x.size:
        return 0.0
    information = entropy_x + entropy_y - (whole - _sum_k_log_k(joint))
    return _clip(2.0 * information / (entropy_x + entropy_y), 0.0, 1.0)


@_compile()
def _information_rows(x: Vector, order_x: Positions, Y: Matrix, orders: Positions) -> Vector:
    scores = np.empty(Y.shape[0])
    below, upto, slot = _allocate_ranks(x.size)
    bins_x, bins_y = np.empty(x.size, np.int64), np.empty(x.size, np.int64)
    _rank(x, order_x, below, upto, slot)
    n_bins = _choose_number_of_bins(x.size)
    _fill_bins(below, upto, n_bins, bins_x)
    for row in range(Y.shape[0]):
        _rank(Y[row], orders[row], below, upto, slot)
        _fill_bins(below, upto, n_bins, bins_y)
        scores[row] = _normalised_information(bins_x, bins_y, n_bins)
    return scores


def mutual_information(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Normalised mutual information of the two vectors' values: 2 I(X; Y) / (H(X) + H(Y)).

    The plug-in estimate on equal-frequency bins, max(2, round(d^(1/3))) to a vector: by ranks, hence the same for any
    strictly increasing map of a vector, and with equal marginals, so that no bin is left nearly empty. Like every
    plug-in estimate it is biased upwards: independent vectors get about (b-1)² / (2 d ln b) for b bins, 0.024 at 384.

    Range 0 to 1, higher is more dependent, symmetric, O(d log d). A constant vector gives 0.0.
    Query (d,), candidates (n, d), result float64 (n,). Source: Cover and Thomas, Elements of Information Theory, ch. 2.
    """
    return _score_by_rank(_information_rows, query, candidates)


@_compile("reassoc", "contract")
def _sum_magnitudes(values: Vector) -> float:
    total = 0.0
    for value in values:
        total += abs(value)
    return total


@_compile()
def _divergence_term(p: float, q: float) -> float:
    """Contribution of one outcome, in bits, to twice the Jensen-Shannon divergence; exactly 0 where p equals q."""
    middle = 0.5 * (p + q)
    term = p * math.log2(p / middle) if p > 0.0 else 0.0
    return term + q * math.log2(q / middle) if q > 0.0 else term


@_compile()
def _jensen_shannon_divergence(x: Vector, y: Vector, mass_x: float, mass_y: float) -> float:
    total = 0.0
    for i in range(x.size):
        p, q = abs(x[i]) / mass_x, abs(y[i]) / mass_y
        # Opposite signs are two outcomes, each with mass in one distribution only: p log₂(p / (p/2)) = p bits.
        total += p + q if (x[i] < 0.0) != (y[i] < 0.0) else _divergence_term(p, q)
    return 0.5 * total


@_compile()
def _jensen_shannon_rows(x: Vector, Y: Matrix) -> Vector:
    scores = np.zeros(Y.shape[0])
    mass_x = _sum_magnitudes(x)
    for row in range(Y.shape[0]):
        mass_y = _sum_magnitudes(Y[row])
        if mass_x > 0.0 and mass_y > 0.0:
            scores[row] = _clip(1.0 - _jensen_shannon_divergence(x, Y[row], mass_x, mass_y), 0.0, 1.0)
    return scores


def jensen_shannon(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Jensen-Shannon similarity: 1 - JSD(p, q), the divergence in bits.

    A vector becomes a distribution over 2 d outcomes, "dimension i, positive" and "dimension i, negative": outcome
    (i, sign of xᵢ) has the mass |xᵢ| / Σ |x|, its opposite none. Nothing but the scale is lost. Magnitudes alone would
    call x and -x identical; a softmax has a free temperature and makes unit vectors of hundreds of dimensions all but
    uniform, and then every pair scores 0.999.

    Range 0 (no shared sign anywhere, as for x and -x) to 1 (the same up to a positive factor), higher is more similar,
    symmetric, O(d). A vector of zeros gives 0.0.
    Query (d,), candidates (n, d), result float64 (n,). Source: Lin, IEEE Transactions on Information Theory 37 (1991).
    """
    return _jensen_shannon_rows(*_check(query, candidates))


# ---------------------------------------------------------------------------------------------------------------------
# All rank measures in one pass
# ---------------------------------------------------------------------------------------------------------------------

# Rows of the scores that `_score_all_by_rank` fills.
_RANK_MEASURES = (
    "spearman_rho",
    "kendall_tau",
    "hoeffdings_d",
    "blomqvist_beta",
    "chatterjee_xi",
    "mutual_information",
)


@_compile()
def _all_rank_rows(x: Vector, order_x: Positions, Y: Matrix, orders: Positions, scores: Matrix) -> None:
    """Every rank measure of a block: the sorting and ranking, half of their time, is done once for the six."""
    below_x, upto_x, _ = _allocate_ranks(x.size)
    below, upto, slot = _allocate_ranks(x.size)
    words, tree = _allocate_slot_set(x.size)
    Q = np.empty(x.size)
    bins_x, bins_y = np.empty(x.size, np.int64), np.empty(x.size, np.int64)
    _rank(x, order_x, below_x, upto_x, slot)
    untied_x, n_bins = _count_untied_pairs(below_x, upto_x), _choose_number_of_bins(x.size)
    _fill_bins(below_x, upto_x, n_bins, bins_x)
    for row in range(Y.shape[0]):
        scores[:, row] = 0.0
        _rank(Y[row], orders[row], below, upto, slot)
        if not (_vary(upto_x, below_x) and _vary(upto, below)):
            continue
        scores[0, row] = _clip(_correlate_ranks(below_x, upto_x, below, upto), -1.0, 1.0)
        balance = _count_concordance(order_x, upto_x, below, upto, slot, words, tree)
        scores[1, row] = _normalise_balance(balance, untied_x, _count_untied_pairs(below, upto))
        _fill_bivariate_ranks(order_x, upto_x, below, upto, slot, words, tree, Q)
        scores[2, row] = _combine_hoeffding(below_x, upto_x, below, upto, Q)
        scores[3, row] = _clip(_correlate_median_signs(below_x, upto_x, below, upto), -1.0, 1.0)
        scores[4, row] = _chatterjee(order_x, below, upto)
        _fill_bins(below, upto, n_bins, bins_y)
        scores[5, row] = _normalised_information(bins_x, bins_y, n_bins)


def _score_all_by_rank(x: Vector, Y: Matrix) -> dict[str, Vector]:
    order_x = np.argsort(x, kind="stable")
    scores = np.empty((len(_RANK_MEASURES), Y.shape[0]))
    for start in range(0, Y.shape[0], _RANK_BLOCK_ROWS):
        block = Y[start : start + _RANK_BLOCK_ROWS]
        part = np.empty((len(_RANK_MEASURES), len(block)))
        _all_rank_rows(x, order_x, block, np.argsort(block, axis=1), part)
        scores[:, start : start + len(block)] = part
    return dict(zip(_RANK_MEASURES, scores, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Distances and kernels between dimensions
# ---------------------------------------------------------------------------------------------------------------------
# Both statistics are the same function of two d x d matrices A and B with zero diagonal: |xᵢ - xⱼ| for the distance
# correlation, 1 - k(xᵢ, xⱼ) for HSIC. The inner product of the U-centred matrices (Székely and Rizzo, Annals of
# Statistics 42 (2014)) needs no matrix, only Σ aᵢⱼ bᵢⱼ and the row sums:
#     Σ aᵢⱼ bᵢⱼ - 2/(d-2) Σ aᵢ. bᵢ. + a.. b.. / ((d-1)(d-2))

_SMALLEST_RELATIVE_VARIANCE = 1e-12
"""A U-centred norm below this share of its own first term is rounding of zero, as for a one-hot vector."""


@_compile()
def _u_product(sum_ab: float, dot_of_row_sums: float, sum_a: float, sum_b: float, n: int) -> float:
    return sum_ab - 2.0 * dot_of_row_sums / (n - 2) + (sum_a / (n - 1)) * (sum_b / (n - 2))


@_compile()
def _u_norm(sum_aa: float, row_sums: Vector) -> float:
    """Square root of the U-centred product of a matrix with itself, 0 where it is rounding of zero."""
    sum_a = row_sums.sum()
    squared = _u_product(sum_aa, _multiply_and_add(row_sums, row_sums), sum_a, sum_a, row_sums.size)
    return math.sqrt(squared) if squared > _SMALLEST_RELATIVE_VARIANCE * sum_aa else 0.0


@_compile()
def _distance_row_sums(values: Vector, row_sums: Vector) -> None:
    """Σⱼ |vᵢ - vⱼ| for values in descending order."""
    n = values.size
    total, passed = values.sum(), 0.0
    for i in range(n):
        row_sums[i] = values[i] * (n - 2 * i) + 2.0 * passed - total
        passed += values[i]


@_compile()
def _merge_blocks(source: Matrix, target: Matrix, start: int, middle: int, end: int) -> float:
    """Merge two blocks sorted by falling y; Σ (xⱼ - xᵢ)(yⱼ - yᵢ) over pairs i left, j right with yᵢ > yⱼ.

    Rows are y, x and a payload. Expanded, each right element needs four sums over the left ones already taken.
    """
    left, right = start, middle
    inversions = count = sum_x = sum_y = sum_xy = 0.0
    for place in range(start, end):
        if right >= end or (left < middle and source[0, left] > source[0, right]):
            y, x = source[0, left], source[1, left]
            target[2, place] = source[2, left]
            left += 1
            count += 1.0
            sum_x += x
            sum_y += y
            sum_xy += x * y
        else:
            y, x = source[0, right], source[1, right]
            target[2, place] = source[2, right]
            right += 1
            inversions += count * x * y - x * sum_y - y * sum_x + sum_xy
        target[0, place] = y
        target[1, place] = x
    return inversions


@_compile()
def _sort_and_sum_inversions(work: Matrix, spare: Matrix) -> tuple[float, Matrix]:
    """Merge sort by falling y; the sum over all inverted pairs, and whichever array holds the sorted rows."""
    n = work.shape[1]
    inversions = 0.0
    width = 1
    while width < n:
        for start in range(0, n, 2 * width):
            middle = min(start + width, n)
            inversions += _merge_blocks(work, spare, start, middle, min(start + 2 * width, n))
        work, spare = spare, work
        width *= 2
    return inversions, work


@_compile()
def _distance_correlation(
    x: Vector, row_sums_x: Vector, norm_x: float, y: Vector, work: Matrix, spare: Matrix
) -> float:
    """x and its row sums in falling order of x, y in the order of x and centred; `work` and `spare` (3, d)."""
    n = x.size
    sum_yy = _multiply_and_add(y, y)
    # Going through falling x from its end is rising x: left of a pair means smaller x.
    work[0], work[1], work[2] = y[::-1], x[::-1], row_sums_x[::-1]
    inversions, ordered = _sort_and_sum_inversions(work, spare)
    row_sums_y = np.empty(n)
    _distance_row_sums(ordered[0], row_sums_y)
    # |xj - xi| |yj - yi| is the product of the differences, its sign turned for inverted pairs.
    sum_ab = 2.0 * (n * _multiply_and_add(x, y) - 2.0 * inversions)
    norms = norm_x * _u_norm(2.0 * n * sum_yy, row_sums_y)
    if norms <= 0.0:
        return 0.0
    dot = _multiply_and_add(ordered[2], row_sums_y)
    product = _u_product(sum_ab, dot, row_sums_x.sum(), row_sums_y.sum(), n)
    return _clip(product / norms, -1.0, 1.0)


@_compile()
def _distance_correlation_rows(x: Vector, order_x: Positions, Y: Matrix) -> Vector:
    scores = np.zeros(Y.shape[0])
    centered, y = np.empty(x.size), np.empty(x.size)
    if not _center(x, centered):
        return scores
    falling = order_x[::-1].copy()
    a, row_sums = centered[falling], np.empty(x.size)
    _distance_row_sums(a, row_sums)
    norm_x = _u_norm(2.0 * x.size * _multiply_and_add(a, a), row_sums)
    work, spare = np.empty((3, x.size)), np.empty((3, x.size))
    for row in range(Y.shape[0]):
        if _center(Y[row], centered):
            for place in range(x.size):
                y[place] = centered[falling[place]]
            scores[row] = _distance_correlation(a, row_sums, norm_x, y, work, spare)
    return scores


def distance_correlation(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Bias-corrected distance correlation: the cosine of the U-centred matrices |xᵢ - xⱼ| and |yᵢ - yⱼ|.

    The statistic of `hyppo.independence.Dcorr()` with its defaults (`bias=False`): an unbiased estimate of the squared
    distance correlation, around 0 for independent vectors and therefore negative for some. Any kind of dependence.

    Range -1 to 1, higher is more dependent, symmetric, O(d log d) by merge sort where the definition is O(d²).
    Needs 4 dimensions. A constant vector gives 0.0, and so does one with all but one value the same.
    Query (d,), candidates (n, d), result float64 (n,). Sources: Székely and Rizzo, Annals of Statistics 42 (2014);
    Huo and Székely, Technometrics 58 (2016), and Chaudhuri and Hu, Computational Statistics and Data Analysis 135
    (2019), for sums of products of distances by sorting.
    """
    x, Y = _check(query, candidates, minimum_dimensions=4)
    return _distance_correlation_rows(x, np.argsort(x), Y)


@_compile()
def _count_pairs_within(ordered: Vector, distance: float) -> int:
    """Pairs of rising values at most this far apart, by two pointers."""
    pairs = first = 0
    for last in range(ordered.size):
        while ordered[last] - ordered[first] > distance:
            first += 1
        pairs += last - first
    return pairs


@_compile()
def _select_pair_distance(ordered: Vector, rank: int) -> float:
    """The distance with `rank` pairs below it in order (from 0), exactly, by halving on the float's own bits.

    Non-negative floats sort like their bits as whole numbers, so 63 halvings always end on one: O(d), no d² distances.
    """
    lowest, highest = np.int64(0), np.float64(ordered[-1] - ordered[0]).view(np.int64)
    while lowest < highest:
        middle = lowest + (highest - lowest) // 2
        if _count_pairs_within(ordered, np.int64(middle).view(np.float64)) > rank:
            highest = middle
        else:
            lowest = middle + 1
    return np.int64(lowest).view(np.float64)


@_compile()
def _median_pair_distance(ordered: Vector) -> float:
    n_pairs = ordered.size * (ordered.size - 1) // 2
    upper = _select_pair_distance(ordered, n_pairs // 2)
    return upper if n_pairs % 2 else 0.5 * (_select_pair_distance(ordered, n_pairs // 2 - 1) + upper)


_LOG2_E = 1.4426950408889634
_LN_2_HIGH = 6.93147180369123816490e-01  # ln 2 in two parts: the first has trailing zeros, so k times it is exact
_LN_2_LOW = 1.90821492927058770002e-10
_ROUNDING_MAGIC = 6755399441055744.0  # 1.5 * 2**52: adding it rounds to a whole number, left in the low bits
_INVERSE_FACTORIALS = tuple(1.0 / math.factorial(k) for k in range(14))


@_compile("contract")  # with "reassoc" the magic constant would be cancelled
def _fill_gaussian_row(value: float, others: Vector, gamma: float, row: Vector) -> None:
    """1 - exp(-γ (value - otherⱼ)²) into row (n,).

    The exponential is written out (e^t = 2^k e^r, |r| ≤ ln 2 / 2, a Taylor polynomial of degree 13, good to the
    last bit or so) because a loop of arithmetic becomes SIMD and one that calls the C library does not.
    """
    c = _INVERSE_FACTORIALS
    for j in range(row.size):
        t = -gamma * (value - others[j]) ** 2
        t = t if t > -700.0 else -700.0  # below it the result is 1 in float64 anyway, and 2^k would leave the range
        shifted = t * _LOG2_E + _ROUNDING_MAGIC
        k = shifted - _ROUNDING_MAGIC
        r = (t - k * _LN_2_HIGH) - k * _LN_2_LOW
        p = c[10] + r * (c[11] + r * (c[12] + r * c[13]))
        p = c[6] + r * (c[7] + r * (c[8] + r * (c[9] + r * p)))
        p = c[2] + r * (c[3] + r * (c[4] + r * (c[5] + r * p)))
        p = 1.0 + r * (1.0 + r * p)
        power_of_two = np.int64((np.float64(shifted).view(np.int64) + 1023) << 52).view(np.float64)
        row[j] = 1.0 - p * power_of_two


@_compile("reassoc", "contract")
def _add_row(row: Vector, column_sums: Vector) -> tuple[float, float]:
    """Add a row to the sums of its columns (n,); its own sum and the sum of its squares."""
    total = squares = 0.0
    for j in range(row.size):
        total += row[j]
        squares += row[j] * row[j]
        column_sums[j] += row[j]
    return total, squares


@_compile()
def _add_gaussian_row(values: Vector, i: int, gamma: float, row: Vector, row_sums: Vector) -> float:
    """Row i right of the diagonal into row (d - i - 1,) and into the row sums (d,); twice its sum of squares.

    The slices start at 0: with an offset in the index Numba tests every access for a negative one, and SIMD is lost.
    """
    _fill_gaussian_row(values[i], values[i + 1 :], gamma, row)
    total, squares = _add_row(row, row_sums[i + 1 :])
    row_sums[i] += total
    return 2.0 * squares


@_compile()
def _hsic_block(x: Vector, gamma: float, Y: Matrix, scores: Vector) -> None:
    """Scores of a few candidates. Each row of x's kernel is made once for all of them, and no matrix is kept."""
    n, n_candidates = x.size, Y.shape[0]
    space_x, space_y, sums_x, sums_y = np.empty(n), np.empty(n), np.zeros(n), np.zeros((n_candidates, n))
    sum_xx, sum_yy, sum_xy = 0.0, np.zeros(n_candidates), np.zeros(n_candidates)
    for i in range(n - 1):
        row_x, row_y = space_x[: n - i - 1], space_y[: n - i - 1]
        sum_xx += _add_gaussian_row(x, i, gamma, row_x, sums_x)
        for c in range(n_candidates):
            sum_yy[c] += _add_gaussian_row(Y[c], i, gamma, row_y, sums_y[c])
            sum_xy[c] += 2.0 * _multiply_and_add(row_x, row_y)
    norm_x = _u_norm(sum_xx, sums_x)
    for c in range(n_candidates):
        norms = norm_x * _u_norm(sum_yy[c], sums_y[c])
        if norms > 0.0:
            dot = _multiply_and_add(sums_x, sums_y[c])
            product = _u_product(sum_xy[c], dot, sums_x.sum(), sums_y[c].sum(), n)
            scores[c] = _clip(product / norms, -1.0, 1.0)


_HSIC_BLOCK_ROWS = 16  # the query's kernel is then a sixteenth of the work, and the block's row sums stay in the cache


@_compile()
def _hsic_rows(x: Vector, order_x: Positions, Y: Matrix) -> Vector:
    scores = np.zeros(Y.shape[0])
    bandwidth = _median_pair_distance(x[order_x])
    gamma = 1.0 / (2.0 * bandwidth * bandwidth) if bandwidth > 0.0 else 0.5
    for start in range(0, Y.shape[0], _HSIC_BLOCK_ROWS):
        end = min(start + _HSIC_BLOCK_ROWS, Y.shape[0])
        _hsic_block(x, gamma, Y[start:end], scores[start:end])
    return scores


def hsic(query: ArrayLike, candidates: ArrayLike) -> Vector:
    """Hilbert-Schmidt independence criterion, normalised: the cosine of the U-centred Gaussian kernel matrices.

    The statistic of `hyppo.independence.Hsic()` with its defaults (`bias=False`, Gaussian kernel). The two vectors are
    d samples of one dimension; k(u, v) = exp(-γ (u - v)²), γ = 1 / (2 m²), m the median of |xᵢ - xⱼ| over all pairs of
    the query (1 if that is 0). As in hyppo the query's bandwidth serves both kernels: hence directed, and made for
    vectors of one scale. Any kind of dependence.

    Range -1 to 1, around 0 for independent vectors, higher is more dependent, O(d²) time and O(d) memory.
    Needs 4 dimensions. A constant vector gives 0.0, and so does one with all but one value the same.
    Query (d,), candidates (n, d), result float64 (n,). Sources: Gretton et al., NIPS 20 (2007); Shen and Vogelstein,
    AStA Advances in Statistical Analysis 105 (2021), for the normalised form and its kinship with distances.
    """
    x, Y = _check(query, candidates, minimum_dimensions=4)
    return _hsic_rows(x, np.argsort(x), Y)


# ---------------------------------------------------------------------------------------------------------------------
# Token by token
# ---------------------------------------------------------------------------------------------------------------------


def _check_tokens(tokens: ArrayLike, role: str) -> Matrix:
    """Token embeddings (n_tokens, n_dims) scaled to unit length; a row of zeros stays one."""
    matrix = _convert(tokens)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"Expected {role} token embeddings (n_tokens, n_dims), got the shape {matrix.shape}.")
    _refuse_unusable(matrix, f"{role} token")
    norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
    return matrix / np.where(norms > 0.0, norms, 1.0)[:, np.newaxis]


def maxsim(query_tokens: ArrayLike, candidate_tokens: ArrayLike) -> float:
    """Late interaction: each query token's best cosine among the candidate's tokens, averaged over the query's tokens.

    ColBERT's score is the sum; the mean orders candidates the same way and compares across queries of any length.
    Range -1 to 1, higher is more similar, directed (swapping the texts changes it), O(n₁ n₂ d).
    float (n₁, d) and (n₂, d) in, float out. Source: Khattab and Zaharia, SIGIR 2020.
    """
    best = compute_token_cosines(query_tokens, candidate_tokens).max(axis=1)
    return float(np.clip(best.mean(), -1.0, 1.0))


def compute_token_cosines(query_tokens: ArrayLike, candidate_tokens: ArrayLike) -> Matrix:
    """The cosine of every token of one text with every token of the other, which `maxsim` sums up.

    float (n₁, d) and (n₂, d) in, float64 (n₁, n₂) out, O(n₁ n₂ d). Raises ValueError for input `maxsim` refuses.
    """
    queries, candidates = _check_tokens(query_tokens, "query"), _check_tokens(candidate_tokens, "candidate")
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"The token embeddings have different lengths: {queries.shape[1]} and {candidates.shape[1]}. "
            "Compare embeddings of one model only."
        )
    cosines: Matrix = np.clip(queries @ candidates.T, -1.0, 1.0)
    return cosines


# ---------------------------------------------------------------------------------------------------------------------
# Registry
# ---------------------------------------------------------------------------------------------------------------------


class MeasureKind(StrEnum):
    VECTOR = "vector"
    """query (d,) and candidates (n, d) give float64 (n,)."""
    TOKENS = "tokens"
    """query tokens (n1, d) and candidate tokens (n2, d) give one float."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure and what a caller has to know to read its results.

    `range` is what the results lie in, ±inf where there is no bound (ties can push Hoeffding's D below its range in few
    dimensions); `cost` is the time for one pair of vectors of d dimensions; `symmetric` says whether query and
    candidate can change places; `minimum_dimensions` is the least d for which the formula exists; `compare_pair`, where
    there is one, takes two float64 (d,) the quick way and gives NaN where a value is unusable.
    """

    name: str
    function: Callable[[ArrayLike, ArrayLike], Any]
    range: tuple[float, float]
    higher_is_more_similar: bool = True
    cost: str = "O(d)"
    aliases: tuple[str, ...] = ()
    kind: MeasureKind = MeasureKind.VECTOR
    symmetric: bool = True
    minimum_dimensions: int = 1
    compare_pair: Callable[[Vector, Vector], float] | None = None

    @property
    def summary(self) -> str:
        """The first line of the function's documentation."""
        return (self.function.__doc__ or "").partition("\n")[0]


class UnknownMeasure(ValueError):
    """No measure has this name; `known` lists those that exist."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(f"Unknown similarity measure {name!r}. Known: {', '.join(self.known)}.")


_CORRELATION = (-1.0, 1.0)
_DISTANCE = (0.0, math.inf)
_D_LOG_D = "O(d log d)"

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure("cosine_similarity", cosine_similarity, _CORRELATION, aliases=("cosine",), compare_pair=_cosine_pair),
        Measure(
            "dot_product", dot_product, (-math.inf, math.inf), aliases=("dot", "inner_product"), compare_pair=_dot_pair
        ),
        Measure(
            "euclidean_distance",
            euclidean_distance,
            _DISTANCE,
            False,
            aliases=("euclidean", "l2_distance"),
            compare_pair=_euclidean_pair,
        ),
        Measure(
            "manhattan_distance",
            manhattan_distance,
            _DISTANCE,
            False,
            aliases=("manhattan", "l1_distance"),
            compare_pair=_manhattan_pair,
        ),
        Measure(
            "chebyshev_distance",
            chebyshev_distance,
            _DISTANCE,
            False,
            aliases=("chebyshev",),
            compare_pair=_chebyshev_pair,
        ),
        Measure("pearson_correlation", pearson_correlation, _CORRELATION, aliases=("pearson",)),
        Measure("spearman_rho", spearman_rho, _CORRELATION, cost=_D_LOG_D, aliases=("spearman",)),
        Measure("kendall_tau", kendall_tau, _CORRELATION, cost=_D_LOG_D, aliases=("kendall", "kendall_tau_b")),
        Measure(
            "hoeffdings_d", hoeffdings_d, (-0.5, 1.0), cost=_D_LOG_D, aliases=("hoeffding_d",), minimum_dimensions=5
        ),
        Measure("hsic", hsic, _CORRELATION, cost="O(d²)", symmetric=False, minimum_dimensions=4),
        Measure(
            "distance_correlation",
            distance_correlation,
            _CORRELATION,
            cost=_D_LOG_D,
            aliases=("approximate_distance_correlation", "dcor"),
            minimum_dimensions=4,
        ),
        Measure(
            "mutual_information",
            mutual_information,
            (0.0, 1.0),
            cost=_D_LOG_D,
            aliases=("normalized_mutual_information", "normalised_mutual_information"),
        ),
        Measure(
            "jensen_shannon",
            jensen_shannon,
            (0.0, 1.0),
            aliases=("jensen_shannon_similarity", "jensen_shannon_dependency_measure"),
        ),
        Measure("blomqvist_beta", blomqvist_beta, _CORRELATION, cost=_D_LOG_D, aliases=("blomqvists_beta",)),
        Measure(
            "chatterjee_xi", chatterjee_xi, _CORRELATION, cost=_D_LOG_D, aliases=("chatterjees_xi",), symmetric=False
        ),
        Measure(
            "maxsim",
            maxsim,
            _CORRELATION,
            cost="O(n₁ n₂ d)",
            aliases=("max_sim", "late_interaction"),
            kind=MeasureKind.TOKENS,
            symmetric=False,
        ),
    )
}

_MEASURES_BY_SPELLING = {
    spelling: measure for measure in MEASURES.values() for spelling in (measure.name, *measure.aliases)
}


def resolve_measure(name: str) -> Measure:
    """The measure of this name or alias; case, hyphens, spaces and apostrophes do not matter. Raises UnknownMeasure."""
    measure = _MEASURES_BY_SPELLING.get(name)
    if measure is None:
        spelling = name.strip().lower().replace("-", "_").replace(" ", "_").replace("'", "").replace("’", "")
        measure = _MEASURES_BY_SPELLING.get(spelling)
    if measure is None:
        raise UnknownMeasure(name, MEASURES)
    return measure


_TOKENS = MeasureKind.TOKENS  # looking into an enum takes longer than an addition of vectors


def compute_similarity(name: str, vector1: ArrayLike, vector2: ArrayLike) -> float:
    """One measure for one pair: vectors (d,) and (d,), or token matrices (n1, d) and (n2, d) for a token measure.

    Raises UnknownMeasure, and ValueError for input the measure refuses.
    """
    measure = _MEASURES_BY_SPELLING.get(name) or resolve_measure(name)
    if measure.kind is _TOKENS:
        return float(measure.function(vector1, vector2))
    second = np.asarray(vector2, np.float64)
    if measure.compare_pair is not None:
        first = np.asarray(vector1, np.float64)
        if first.shape == second.shape and first.ndim == 1 <= first.size and first.flags.carray and second.flags.carray:
            quick: float = measure.compare_pair(first, second)
            if quick == quick:
                return quick
    if second.ndim != 1:
        raise ValueError(f"Expected two vectors (d,), got the shapes {np.shape(vector1)} and {second.shape}.")
    score: float = measure.function(vector1, second[None]).item()
    return score


VECTOR_MEASURES = tuple(name for name, measure in MEASURES.items() if measure.kind is MeasureKind.VECTOR)
"""Names of the measures that compare vectors: all but those that need the embeddings of tokens."""

QUICK_MEASURES = tuple(
    name for name in VECTOR_MEASURES if name not in ("hsic", "distance_correlation", "mutual_information")
)
"""Those of them that take a tenth of a second at most for 1,000 candidates of 384 dimensions."""


def compute_all(query: ArrayLike, candidates: ArrayLike, names: Iterable[str] = VECTOR_MEASURES) -> dict[str, Vector]:
    """Every vector measure, or those named, of one query (d,) with candidates (n, d): name to float64 (n,).

    The same values as from the measures' own functions. Measures on ranks share one sorting and ranking. The keys are
    the canonical names, in the registry's order. Needs 5 dimensions unless only measures are named that need fewer.
    Raises UnknownMeasure, and ValueError for a token measure or for input that a measure refuses.
    """
    wanted = {resolve_measure(name).name for name in names}
    if not wanted <= set(VECTOR_MEASURES):
        raise ValueError("A token measure compares the embeddings of tokens; it has no place among those of vectors.")
    x, Y = _check(query, candidates, max((MEASURES[name].minimum_dimensions for name in wanted), default=1))
    is_shared = len(wanted & set(_RANK_MEASURES)) > 1 and x.size >= _HOEFFDING_DIMENSIONS
    by_rank = _score_all_by_rank(x, Y) if is_shared else {}
    return {
        name: by_rank[name] if name in by_rank else MEASURES[name].function(x, Y)
        for name in VECTOR_MEASURES
        if name in wanted
    }


def warm_up() -> None:
    """Compile every measure, or load its machine code from the cache, so that no request waits for it.

    Seconds on a machine without a cache, a fraction of one with it. May run in a thread beside the server.
    """
    vectors = np.random.default_rng(0).standard_normal((2, 8))
    for measure in MEASURES.values():
        measure.function(vectors[:1] if measure.kind is MeasureKind.TOKENS else vectors[0], vectors)
        if measure.kind is MeasureKind.VECTOR:
            compute_similarity(measure.name, *vectors)
    compute_all(vectors[0], vectors)
