"""Resampling: against Pillow's, against whole-number arithmetic, and at the limits of sizes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from shards import resample
from shards.limits import MAX_SIDE
from shards.resample import Box

ROOT = Path(__file__).parents[2]
LANCZOS = Image.Resampling.LANCZOS
RANDOM = np.random.default_rng(0)


def picture(width: int, height: int, channels: int) -> Image.Image:
    """Waves with noise over them."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(x / (7 + c) + y / 11) for c in range(channels)]
    noise = RANDOM.normal(0, 9, (height, width, channels))
    pixels = np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)


def in_whole_numbers(
    planes_HCW: NDArray[np.uint8], size: tuple[int, int], box: Box
) -> NDArray[np.uint8]:
    """What `resample` computes, by integers of 64 bits, and every weight by itself."""
    height, _, width = planes_HCW.shape
    unit = resample._UNIT

    def dense(inputs: int, outputs: int, start: float, stop: float) -> NDArray[np.int64]:
        matrix = np.zeros((inputs, outputs), np.int64)
        for out, used, weights in resample._blocks(inputs, outputs, start, stop):
            assert np.array_equal(weights, np.rint(weights))
            assert np.abs(weights).sum(axis=0).max() * 255 < 2**24
            matrix[used, out] = weights
        assert (matrix.sum(axis=0) == unit).all()
        return matrix

    def to_bytes(sums: NDArray[np.int64]) -> NDArray[np.int64]:
        half_to_even = sums // unit + (sums % unit * 2 + sums // unit % 2 > unit)
        return np.clip(half_to_even, 0, 255)

    across = dense(width, size[0], box[0], box[2])
    down = dense(height, size[1], box[1], box[3])
    narrow = to_bytes(planes_HCW.astype(np.int64) @ across)
    return to_bytes(np.einsum("hcw,ho->ocw", narrow, down)).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((256, 147), None),
        ((33, 17), None),
        ((480, 300), None),
        ((1500, 800), None),
        ((40, 200), None),
        ((64, 64), (13.25, 20.5, 600.7, 300.3)),
    ],
)
def test_it_is_within_a_level_of_pillow(
    channels: int, size: tuple[int, int], box: Box | None
) -> None:
    image = picture(640, 400, channels)
    ours = np.asarray(resample.resize(image, size, box)).astype(int)
    pillows = np.asarray(image.resize(size, LANCZOS, box, reducing_gap=3)).astype(int)
    assert np.abs(ours - pillows).max() <= 1


def test_colour_that_cannot_be_seen_is_not_mixed_in() -> None:
    pixels = np.zeros((64, 96, 4), np.uint8)
    pixels[:, :50] = (10, 200, 30, 255)
    pixels[:, 50:] = (255, 0, 255, 0)
    image = Image.fromarray(pixels)
    found = np.asarray(resample.resize(image, (31, 20))).astype(int)
    expected = np.asarray(image.resize((31, 20), LANCZOS)).astype(int)
    seen = found[..., 3] > 32
    assert np.abs(found - expected)[..., 3].max() <= 1
    assert np.abs(found - expected)[seen].max() <= 8  # a level of 32 is 8 of 255
    assert np.abs(found[seen][:, :3] - (10, 200, 30)).max() <= 8
    assert 0 < np.mean(seen) < 1


sides = st.integers(1, 90)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(sides, sides),
    st.tuples(sides, sides),
    st.sampled_from([1, 3, 5]),
    st.tuples(*[st.floats(0, 0.45)] * 4),
    st.sampled_from(["noise", "ends"]),
)
def test_sums_are_those_of_whole_numbers(
    before: tuple[int, int],
    after: tuple[int, int],
    channels: int,
    cut: tuple[float, float, float, float],
    what: str,
) -> None:
    width, height = before
    high = 256 if what == "noise" else 2
    planes = RANDOM.integers(0, high, (height, channels, width), dtype=np.uint8)
    if what == "ends":
        planes *= 255
    left, top, right, bottom = cut
    box = (left * width, top * height, width - right * width, height - bottom * height)
    found = resample._lanczos(planes, after, box)
    assert np.array_equal(found, in_whole_numbers(planes, after, box))


def test_sums_of_large_images_too_whatever_is_done_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planes = RANDOM.integers(0, 256, (690, 3, 1200), dtype=np.uint8)
    box = (0.0, 0.0, 1200.0, 690.0)
    expected = in_whole_numbers(planes, (256, 147), box)
    assert np.array_equal(resample._lanczos(planes, (256, 147), box), expected)
    monkeypatch.setattr(resample, "_CHUNK", 1)
    assert np.array_equal(resample._lanczos(planes, (256, 147), box), expected)


def test_threads_change_no_pixel() -> None:
    program = (
        "import hashlib, numpy as np; from PIL import Image; from shards import resample;"
        "pixels = np.random.default_rng(0).integers(0, 256, (1400, 2000, 3), dtype=np.uint8);"
        "small = resample.resize(Image.fromarray(pixels), (700, 500));"
        "print(hashlib.sha256(small.tobytes()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "OMP_NUM_THREADS": number, "OPENBLAS_NUM_THREADS": number},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for number in ("1", "2", "5")
    }
    assert len(found) == 1


@pytest.mark.parametrize("size", [(MAX_SIDE, 1), (1, MAX_SIDE), (MAX_SIDE, 3), (2000, 1500)])
@pytest.mark.parametrize("after", [(1, 1), (300, 1), (1, 300), (17, 256)])
@pytest.mark.parametrize("level", [0, 3, 255])
def test_what_is_flat_stays_flat(size: tuple[int, int], after: tuple[int, int], level: int) -> None:
    found = resample.resize(Image.new("RGB", size, (level,) * 3), after)
    assert found.size == after
    assert found.getextrema() == ((level, level),) * 3
