"""Heat maps: any script and size is drawn, labels are short and thinned, and nothing global is touched."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from llama_embeddings import heat_maps
from llama_embeddings.errors import ServiceError
from llama_embeddings.heat_maps import BOX, HeatMap, Painter, choose_labelled, draw, measure_side, prepare_label
from tests.serving import PROJECT_DIRECTORY

LABELS = (
    "I feel extremely chilly",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\ud55c\uad6d\uc5b4",
    "crab \U0001f980 family \U0001f469\u200d\U0001f469\u200d\U0001f467",
    "$\\frac{1",
    "a" * 5_000,
    "two\nlines\tand a bell \a",
    "z\u0300\u0301\u0302\u0303 stacked",
    "\u202e override",
    " ",
)


def read_picture(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def make_map(n_rows: int, n_columns: int, **options: object) -> HeatMap:
    scores = np.random.default_rng(0).random((n_rows, n_columns))
    rows, columns = (tuple(f"label {number}" for number in range(n)) for n in (n_rows, n_columns))
    return HeatMap(scores, rows, columns, "a title", **options)  # type: ignore[arg-type]


def test_labels_of_every_script_are_drawn_without_a_warning() -> None:
    """CJK, emoji, right-to-left, broken formulas, control characters, 5,000 letters."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = read_picture(draw(HeatMap(np.eye(len(LABELS)), LABELS, LABELS, "$x_", marks=np.arange(len(LABELS)))))
    assert max(picture.shape) < 1_500


@pytest.mark.parametrize("label", LABELS)
def test_label_is_one_short_line_the_fonts_can_show(label: str) -> None:
    """Nothing is left that the fonts lack, and never nothing at all."""
    shown = prepare_label(label)
    assert 0 < len(shown) <= heat_maps.LONGEST_LABEL
    assert len(shown.splitlines()) == 1
    assert set(shown) <= heat_maps._find_characters()


def test_characters_no_font_has_become_boxes_and_are_not_lost_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """The label is numbered, so that it can be told which text it is."""
    monkeypatch.setattr(heat_maps, "_find_characters", lambda: frozenset("abc "))
    assert prepare_label("a\u4f60b") == f"a{BOX}b"
    assert heat_maps._number_if_boxed(2, f"a{BOX}b") == f"3. a{BOX}b"
    assert heat_maps._number_if_boxed(2, "ab") == "ab"


@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 1), (300, 200), (1, 20_000), (2_000, 1)])
def test_pictures_are_bounded_whatever_the_matrix(n_rows: int, n_columns: int) -> None:
    """No side beyond 3,000 dots."""
    assert max(read_picture(draw(make_map(n_rows, n_columns))).shape) <= 3_000


@pytest.mark.parametrize("n_cells", [1, 2, 61, 62, 199, 200, 201, 1_000, 99_999])
def test_labels_are_thinned_before_they_touch(n_cells: int) -> None:
    """Each that is shown has room, and the first is always there."""
    labelled = choose_labelled(n_cells)
    assert labelled[0] == 0
    assert measure_side(n_cells) / len(labelled) >= heat_maps.INCHES_PER_LABEL
    assert len(choose_labelled(100)) == 100


def test_bright_is_similar_in_either_direction() -> None:
    """The greatest similarity and the smallest distance have the same colour."""
    scores = np.array([[0.0, 1.0]])
    corners = []
    for higher_is_better in (True, False):
        picture = HeatMap(scores, ("",), ("", ""), "", higher_is_better)
        pixels = read_picture(draw(picture)).reshape(-1, 3)
        corners.append({tuple(color) for color in pixels.tolist()})
    yellow, violet = (253, 231, 36), (68, 1, 84)
    assert all(yellow in corner and violet in corner for corner in corners)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30, 1e30])
def test_matrix_of_one_value_is_drawn(value: float) -> None:
    """Where there is no range to spread colours over."""
    assert draw(HeatMap(np.full((3, 3), value), ("a",) * 3, ("b",) * 3, "flat"))


def test_wrong_number_of_labels_is_refused() -> None:
    """Rather than labels beside the wrong rows."""
    with pytest.raises(ValueError, match="1 x 2 labels"):
        draw(HeatMap(np.eye(2), ("a",), ("b", "c"), ""))


def test_threads_draw_what_one_draws() -> None:
    """Calls from many threads are answered with the same bytes as alone."""
    pictures = [make_map(size, size) for size in (2, 3, 4)]
    alone = [draw(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, pictures * 3)) == alone * 3


def test_matplotlib_is_loaded_at_the_first_picture_and_pyplot_never() -> None:
    """Starting the server does not wait for it."""
    code = (
        "import sys, numpy as np, llama_embeddings_server; from llama_embeddings import heat_maps as h; "
        "before = 'matplotlib' in sys.modules; h.draw(h.HeatMap(np.eye(2), ('a', 'b'), ('c', 'd'), 't')); "
        "print(before, 'matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT_DIRECTORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert completed.stdout.split() == ["False", "True", "False"]


async def test_painter_draws_in_another_process_and_survives_its_death() -> None:
    """The same picture as in this process; one that dies costs one picture an error, and the next is drawn again."""
    painter = Painter()
    try:
        assert await painter.draw(make_map(2, 2)) == draw(make_map(2, 2))
        assert painter._pool is not None
        [process] = painter._pool._processes.values()
        assert process.pid != os.getpid()
        process.kill()
        process.join()
        with pytest.raises(ServiceError, match="could not be drawn"):
            await painter.draw(make_map(2, 2))
        assert await painter.draw(make_map(2, 2)) == draw(make_map(2, 2))
    finally:
        painter.close()


def test_painter_that_never_drew_is_closed_without_a_process() -> None:
    """Nothing is started for nothing."""
    Painter().close()


def test_drawing_process_does_not_outlive_a_killed_server(tmp_path: Path) -> None:
    """`kill -9` gives the server no chance to end it; it ends by itself."""
    program = (
        "import asyncio, os, numpy as np\n"
        "from llama_embeddings.heat_maps import HeatMap, Painter\n"
        "if __name__ == '__main__':\n"
        "    painter = Painter()\n"
        "    asyncio.run(painter.draw(HeatMap(np.eye(2), ('a', 'b'), ('a', 'b'), title='t')))\n"
        "    [child] = painter._pool._processes\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    script = tmp_path / "killed.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(PROJECT_DIRECTORY)}
    ended = subprocess.run(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=False
    )
    child = psutil.Process(int(ended.stdout)) if psutil.pid_exists(int(ended.stdout)) else None
    assert ended.returncode == -signal.SIGKILL
    if child is not None:
        child.wait(timeout=20)
