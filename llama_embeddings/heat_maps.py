"""Matrices as pictures: a PNG heat map with a label for each row and column.

The only importer of `matplotlib`, which is loaded at the first picture, and by the server in a process of its own: it
holds the interpreter's lock for up to a quarter of a second at a time. Only its objects are used, never the state of
`pyplot`. Knows no measures, no models and no HTTP.

Labels come from users: any script, any length. They are shaped and ordered by matplotlib (right-to-left scripts
included), shortened, never read as formulas, and a character that no font of this machine has becomes a box, as the
picture then says.
"""

from __future__ import annotations

import asyncio
import io
import logging
import multiprocessing
import os
import threading
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from llama_embeddings.errors import ServiceError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

logger = logging.getLogger(__name__)

LONGEST_LABEL, LONGEST_TITLE = 40, 120
MOST_NUMBERS_SHOWN = 400
DOTS_PER_INCH = 100
NICENESS = 10
INCHES_PER_CELL = 0.36
LONGEST_SIDE_INCHES, SHORTEST_SIDE_INCHES = 22.0, 1.4
# Labels closer together than this cannot be read; then only every second, third, … is shown.
INCHES_PER_LABEL = 0.11
BOX = "□"
BOX_NOTE = f"{BOX}: a character that no font of this machine has"

# matplotlib's own font, then those of these families that are installed, in the order in which glyphs are looked for.
OWN_FAMILY = "DejaVu Sans"
OTHER_FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "Noto Sans SC",
    "Noto Sans JP",
    "Noto Sans KR",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Droid Sans Fallback",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Sans Bengali",
    "Noto Sans Tamil",
    "Noto Emoji",
    "Symbola",
    "Unifont",
    "Arial Unicode MS",
)

# matplotlib's caches of fonts are shared and not made for several threads.
_drawing = threading.Lock()


@dataclass(frozen=True, slots=True)
class HeatMap:
    """What to draw. `scores`: float (n, m), finite; n row and m column labels.

    Bright is similar: `higher_is_better` says which end that is. `marks`: for each row the column to outline.
    """

    scores: np.ndarray
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    title: str
    higher_is_better: bool = True
    marks: np.ndarray | None = None


class Painter:
    """Has pictures drawn by a process of its own, one at a time; it is started for the first one."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    async def draw(self, picture: HeatMap) -> bytes:
        """See the function of this name. Raises ServiceError if the process died."""
        if self._pool is None:
            # A forked child would inherit the engine's locks in whatever state they are.
            self._pool = ProcessPoolExecutor(
                max_workers=1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_drawing,
            )
        pool = self._pool
        try:
            # On a thread: the first submission starts the process, which takes its time.
            future = await asyncio.to_thread(pool.submit, draw, picture)
            return await asyncio.wrap_future(future)
        except BrokenProcessPool:
            if self._pool is pool:
                self._pool = None
            logger.exception("The process that draws died; the next picture gets a new one")
            raise ServiceError("The picture could not be drawn: its process died. Ask for JSON, or again.") from None

    def close(self) -> None:
        """End the process; a picture that is being drawn is given up."""
        if self._pool is not None:
            # The pool has no public way to stop a task that is running.
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)


def _begin_drawing() -> None:
    """In the new process: let embeddings come first, and do not outlive the server, however that ends."""
    os.nice(NICENESS)
    server = multiprocessing.parent_process()
    assert server is not None

    def end_with_the_server() -> None:
        server.join()
        os._exit(1)

    threading.Thread(target=end_with_the_server, name="end-with-the-server", daemon=True).start()


def draw(picture: HeatMap) -> bytes:
    """A PNG, at most some 3,000 dots a side whatever the matrix. Takes 0.1 to 2 s of a core; safe in any thread."""
    if picture.scores.shape != (len(picture.row_labels), len(picture.column_labels)):
        raise ValueError(
            f"{len(picture.row_labels)} x {len(picture.column_labels)} labels for scores of {picture.scores.shape}"
        )
    with _drawing:
        return _draw(picture)


def _draw(picture: HeatMap) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    families = list(_find_families())
    with matplotlib.rc_context({"font.family": families, "text.parse_math": False, "axes.unicode_minus": False}):
        n_rows, n_columns = picture.scores.shape
        figure = Figure(figsize=(measure_side(n_columns), measure_side(n_rows)), dpi=DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        image = axes.imshow(picture.scores, cmap="viridis" if picture.higher_is_better else "viridis_r", aspect="auto")
        _label_sides(axes, picture)
        _show_numbers(axes, image, picture.scores)
        _outline(axes, picture.marks)
        bar = figure.add_axes((1.0 + 0.15 / measure_side(n_columns), 0.0, 0.15 / measure_side(n_columns), 1.0))
        figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7)
        output = io.BytesIO()
        figure.savefig(output, format="png", bbox_inches="tight", pad_inches=0.15)
        return output.getvalue()


def measure_side(n_cells: int) -> float:
    """Length of a side in inches."""
    return min(max(n_cells * INCHES_PER_CELL, SHORTEST_SIDE_INCHES), LONGEST_SIDE_INCHES)


def choose_labelled(n_cells: int) -> range:
    """The rows or columns that get a label: all, or every so many if they would touch."""
    most = int(measure_side(n_cells) / INCHES_PER_LABEL)
    return range(0, n_cells, max(1, -(-n_cells // most)))


def prepare_label(text: str, longest: int = LONGEST_LABEL) -> str:
    """A text as one short line that the fonts can show."""
    line = " ".join("".join(" " if _is_control(character) else character for character in text).split())
    if len(line) > longest:
        line = line[: longest - 1].rstrip() + "…"
    shown = _find_characters()
    return "".join(character if character in shown else _stand_in(character) for character in line) or "␣"


def _stand_in(character: str) -> str:
    """A box; nothing for what is invisible anyway."""
    return "" if unicodedata.category(character) == "Cf" else BOX


def _is_control(character: str) -> bool:
    # Joiners and marks of direction belong to the text; they are invisible and shape what is around them.
    return unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")


@cache
def _find_families() -> tuple[str, ...]:
    """The families to draw with, of which the first is always there."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return (OWN_FAMILY, *(family for family in OTHER_FAMILIES if family in installed))


@cache
def _find_characters() -> frozenset[str]:
    """Every character that some font of these families has, and those that are not drawn at all."""
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    paths = [fontManager.findfont(FontProperties(family=[family])) for family in _find_families()]
    codes = {code for path in paths for code in get_font(path).get_charmap()}
    return frozenset(map(chr, codes)) | {" "}


def _label_sides(axes: Axes, picture: HeatMap) -> None:
    """Title and labels of rows and columns; the title says so if some characters could not be shown."""
    n_rows, n_columns = picture.scores.shape
    rows, columns = choose_labelled(n_rows), choose_labelled(n_columns)
    row_labels = [_number_if_boxed(place, prepare_label(picture.row_labels[place])) for place in rows]
    column_labels = [_number_if_boxed(place, prepare_label(picture.column_labels[place])) for place in columns]
    axes.set_yticks(list(rows), labels=row_labels, fontsize=_choose_font_size(n_rows))
    axes.set_xticks(list(columns), labels=column_labels, fontsize=_choose_font_size(n_columns), rotation=90)
    axes.tick_params(length=2)
    is_boxed = any(BOX in label for label in (*row_labels, *column_labels))
    title = prepare_label(picture.title, LONGEST_TITLE) + (f"\n{BOX_NOTE}" if is_boxed else "")
    axes.set_title(title, fontsize=9, loc="left")


def _number_if_boxed(place: int, label: str) -> str:
    """Its position from 1 in front of a label that cannot be read in full."""
    return f"{place + 1}. {label}" if BOX in label else label


def _choose_font_size(n_cells: int) -> float:
    """In points, to fit the space that a label has."""
    inches = measure_side(n_cells) / len(choose_labelled(n_cells))
    return min(max(inches * 72 * 0.7, 4.5), 8.5)


def _show_numbers(axes: Axes, image: AxesImage, scores: np.ndarray) -> None:
    """Write each score into its cell where there are few, dark on bright and bright on dark."""
    if scores.size > MOST_NUMBERS_SHOWN or max(scores.shape) * INCHES_PER_CELL > LONGEST_SIDE_INCHES:
        return
    brightness = image.to_rgba(scores)[..., :3] @ np.array([0.3, 0.59, 0.11])
    pattern = ".2f" if np.abs(scores).max() < 10 else ".3g"
    for (row, column), score in np.ndenumerate(scores):
        color = "black" if brightness[row, column] > 0.5 else "white"
        axes.text(column, row, format(score, pattern), ha="center", va="center", fontsize=6.5, color=color)


def _outline(axes: Axes, marks: Sequence[int] | np.ndarray | None) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    if marks is not None:
        boxes = [Rectangle((column - 0.5, row - 0.5), 1, 1) for row, column in enumerate(marks)]
        axes.add_collection(PatchCollection(boxes, facecolor="none", edgecolor="red", linewidth=1.2), autolim=False)
