"""Pages of web programs: real ones look like their screenshots, others say what is wrong."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
from browser import visit
from numpy.typing import NDArray
from PIL import Image

from pipeline import web
from shards import synth

PROGRAM = """header {
btn-inactive, btn-active
}
row {
single {
small-title, text, btn-green
}
}
"""


def test_every_leaf_has_its_element() -> None:
    rng = random.Random(0)
    for _ in range(50):
        code = synth.draw_program(rng).to_gui()
        page = web.render(code)
        for name in ("green", "orange", "red"):
            assert page.count(f'class="btn {name}"') == code.count(f"btn-{name}")
        for name in ("active", "inactive"):
            assert page.count(f'<span class="{name}"') == len(re.findall(rf"btn-{name}\b", code))
        for name in ("single", "double", "quadruple"):
            assert page.count(f'class="card {name}"') == code.count(name)
        assert page.count("<h3>") == page.count("<p>") == code.count("small-title")


def test_white_space_is_of_no_account() -> None:
    one_line = " ".join(re.sub(r"([{},])", r" \1 ", PROGRAM).split())
    assert web.render(one_line) == web.render(PROGRAM.replace("\n", "\r\n")) == web.render(PROGRAM)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "empty, a program has a header or a row"),
        ("header { btn-active, <unk> }", "line 1, column 22: unknown token '<unk>'; in 'header' "),
        ("header {\n text }", "line 2, column 2: misplaced 'text'; in 'header' btn-active or "),
        ("row {\n single {\n text\n", "line 2, column 2: 'single' is never closed"),
        ("header", "line 1, column 1: 'header' is never closed"),
        ("row { single } }", "line 1, column 14: '}' where '{' of 'single' belongs"),
        ("header { btn-active } }", "line 1, column 23: '}' closes nothing"),
        ("header { btn-active btn-active }", "line 1, column 21: 'btn-active' without ',' before"),
        ("header { btn-active, }", "line 1, column 22: '}' where btn-active or"),
        ("header { , btn-active }", "line 1, column 10: ',' where btn-active or"),
        ("row { }", "line 1, column 7: '}' where single or double or quadruple belongs"),
        ("text", "line 1, column 1: misplaced 'text'; outside of all blocks header or row"),
        ("<script>", "line 1, column 1: unknown token '<script>'"),
    ],
)
def test_what_is_no_program_is_named_with_its_place(code: str, message: str) -> None:
    with pytest.raises(web.WebError, match="^" + re.escape(message)) as error:
        web.parse(code)
    assert "\n" not in str(error.value)


def test_a_million_blocks_are_no_danger() -> None:
    with pytest.raises(web.WebError, match="misplaced 'row'"):
        web.parse("row { " * 1_000_000)


def test_a_title_is_text() -> None:
    page = web.render(PROGRAM, '</title><script>alert("1")</script>')
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("name", ["0000", "0001", "0102"])
def test_a_real_program_looks_like_its_screenshot(
    name: str, screens_of_pix2code: Path, tmp_path: Path
) -> None:
    """Buttons of the same colours stand where they stand, but for lines of text more or less."""
    code = (screens_of_pix2code / f"{name}.gui").read_text()
    page = tmp_path / "page.html"
    page.write_text(web.render(code))
    seen = visit(page, tmp_path, web.WIDTH, web.HEIGHT)
    assert seen.complaints == []
    with Image.open(screens_of_pix2code / f"{name}.png") as image:
        expected = buttons(np.asarray(image.convert("RGB")))
    found = buttons(seen.pixels)
    assert [colour for colour, _, _ in found] == [colour for colour, _, _ in expected]
    assert len(found) == len(re.findall(r"btn-(?:green|orange|red|active)\b", code))
    for (colour, top, left), (_, expected_top, expected_left) in zip(found, expected, strict=True):
        assert abs(top - expected_top) <= 45
        if colour != "active":  # how far right depends on the words before it
            assert abs(left - expected_left) <= 3


def buttons(pixels: NDArray[np.uint8]) -> list[tuple[str, int, int]]:
    """Colour, top and left edge of each button, row by row."""
    red, green, blue = (pixels[..., channel].astype(int) for channel in range(3))
    masks = {
        "green": (green > red + 50) & (green > blue + 50),
        "orange": (red > 200) & (green > 120) & (blue < 120),
        "red": (red > green + 90) & (red > blue + 90) & (green < 110),
        "active": (blue > red + 80) & (blue > 150),
    }
    found = []
    for colour, mask in masks.items():
        for top, bottom in runs(mask.sum(axis=1) > 20):
            if bottom - top < 25:  # blue words
                continue
            for left, right in runs(mask[top:bottom].sum(axis=0) > 15):
                if right - left > 20:
                    found.append((colour, top, left))
    return sorted(found, key=lambda one: (round(one[1] / 20), one[2]))


def runs(line: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and end of each run of True; gaps of less than 4 are none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]]).astype(int)))
    found: list[tuple[int, int]] = []
    for start, end in edges.reshape(-1, 2).tolist():
        if found and start - found[-1][1] < 4:
            start = found.pop()[0]
        found.append((start, end))
    return found
