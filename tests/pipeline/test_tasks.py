"""How images are prepared: the shift that augments them."""

from collections import Counter

import numpy as np
import pytest
import torch

from pipeline import rng
from pipeline.batch import Batch
from pipeline.tasks import prepare_images

CHANNELS, HEIGHT, WIDTH = 3, 5, 7
PIXELS_CHW = np.arange(CHANNELS * HEIGHT * WIDTH, dtype=np.uint8).reshape(CHANNELS, HEIGHT, WIDTH)
"""each another value"""


def batch_of(keys: list[int]) -> Batch:
    return Batch(
        image_BCHW=torch.from_numpy(PIXELS_CHW).repeat(len(keys), 1, 1, 1),
        token_BT=torch.empty(len(keys), 0, dtype=torch.int64),
        weight_B=torch.ones(len(keys)),
        augment_key_B=torch.tensor(keys),
        keys=tuple(map(str, keys)),
        step=0,
        micro=0,
        first_place=0,
        bad=(),
    )


def shifted(keys: list[int], shift_px: int) -> list[bytes]:
    """The pixels of the image, as each key moves it."""
    image_BCHW = prepare_images(batch_of(keys), torch.float32, shift_px)
    assert image_BCHW.shape == (len(keys), CHANNELS, HEIGHT, WIDTH)
    assert image_BCHW.is_contiguous(memory_format=torch.channels_last)
    return [one.numpy().tobytes() for one in (image_BCHW * 255).round().to(torch.uint8)]


def moved(down: int, right: int) -> bytes:
    """The same by NumPy: a wide border that repeats the edge, and a window in it."""
    room = 3
    wide = np.pad(PIXELS_CHW, ((0, 0), (room, room), (room, room)), mode="edge")
    top, left = room - down, room - right
    return wide[:, top : top + HEIGHT, left : left + WIDTH].tobytes()


@pytest.mark.parametrize(
    ("shift_px", "key", "down", "right"),
    [
        (1, 0, -1, -1),
        (1, 4, 0, 0),  # 11 in base 3
        (1, 5, 1, 0),  # 12
        (1, 7, 0, 1),  # 21
        (1, 8, 1, 1),  # 22
        (1, 9, -1, -1),  # 100
        (2, 22, 0, 2),  # 42 in base 5
        (2, 2**63 - 1, 0, -1),  # ends in 12
        (3, 24, 0, 0),  # 33 in base 7
        (3, 6, 3, -3),  # 06
    ],
)
def test_a_key_gives_its_shift(shift_px: int, key: int, down: int, right: int) -> None:
    """Golden: the augmentation of released runs must not move."""
    assert shifted([key], shift_px) == [moved(down, right)]


def test_a_shift_by_hand() -> None:
    """One down, two to the left: what moves in repeats the border, and channels stay apart."""
    key = 3 + 0 * 5
    image_CHW = prepare_images(batch_of([key]), torch.float64, 2)[0] * 255
    assert image_CHW[0].round().int().tolist() == [
        [2, 3, 4, 5, 6, 6, 6],
        [2, 3, 4, 5, 6, 6, 6],
        [9, 10, 11, 12, 13, 13, 13],
        [16, 17, 18, 19, 20, 20, 20],
        [23, 24, 25, 26, 27, 27, 27],
    ]
    for channel in range(CHANNELS):
        expected_HW = image_CHW[0] + channel * HEIGHT * WIDTH
        torch.testing.assert_close(image_CHW[channel], expected_HW)


@pytest.mark.parametrize("shift_px", [1, 2])
def test_all_shifts_are_drawn_evenly(shift_px: int) -> None:
    offsets = range(-shift_px, shift_px + 1)
    expected = {moved(down, right) for down in offsets for right in offsets}
    assert len(expected) == len(offsets) ** 2
    mean = 200
    keys = [rng.torch_seed(0, "augment", 0, 0, at) for at in range(mean * len(expected))]
    counts = Counter(shifted(keys, shift_px))
    assert counts.keys() == expected
    # Of a binomial with this mean, 5 standard deviations are 70.
    assert all(abs(count - mean) < 70 for count in counts.values())


def test_without_a_shift_nothing_moves() -> None:
    assert set(shifted([0, 5, 2**63 - 1], 0)) == {PIXELS_CHW.tobytes()}
