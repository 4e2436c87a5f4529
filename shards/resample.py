"""Lanczos resampling in half of Pillow's time, to the same pixels on any machine.

Each of the two passes is a product with a banded matrix, and is computed as small dense products
of float32 by BLAS, which has vector instructions for them; Pillow has none. Pixels are bytes and
weights whole numbers in units of 2**-15, so every sum is a whole number below 2**24: exact in
float32, in whatever order a processor adds it up.

Legend of shape suffixes: H height, C channels, W width. In planes (HCW) a row of one channel
follows that of another: then both passes are products without a copy in another order.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels"""

_UNIT = 2**15
_LOBES = 3
# How many times too large an image stays, at least, when it is averaged first.
_GAP = 3
# Pillow averages more pixels than 16 x 16 less exactly.
_MAX_REDUCTION = 16
# Outputs that share a dense block: wider ones hold more zeros, narrower ones need more calls.
_BLOCK = 16
# float32 values at a time, 1 MB: they stay in a processor's cache, and memory is bounded.
_CHUNK = 2**18

_Block = tuple[slice, slice, NDArray[np.float32]]
"""Outputs, the inputs that they need, and the weights: (inputs, outputs)"""


def resize(image: Image.Image, size: tuple[int, int], box: Box | None = None) -> Image.Image:
    """`box` of a grey, RGB or RGBA image, or all of it, scaled to `size`, (width, height).

    As Pillow's `resize(size, LANCZOS, box, reducing_gap=3)`, which begins with either axis, this
    with the width: in pictures a level more or less, in noise a few.
    """
    if image.mode == "RGBA":  # What cannot be seen has no colour.
        return resize(image.convert("RGBa"), size, box).convert("RGBA")
    left, top, right, bottom = box or (0.0, 0.0, float(image.width), float(image.height))
    # What is many times too large is averaged over whole pixels first, which takes far less time.
    scales = (right - left) / size[0], (bottom - top) / size[1]
    across, down = (min(max(1, int(scale / _GAP)), _MAX_REDUCTION) for scale in scales)
    if across > 1 or down > 1:
        image = image.reduce((across, down))
        left, top, right, bottom = left / across, top / down, right / across, bottom / down
    planes_HCW = _lanczos(_planes(image), size, (left, top, right, bottom))
    bands = [Image.fromarray(planes_HCW[:, channel]) for channel in range(planes_HCW.shape[1])]
    return Image.merge(image.mode, bands)


def inside(size: tuple[int, int], within: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the largest image of the aspect ratio of `size` that `within` can hold."""
    scale = min(within[0] / size[0], within[1] / size[1])
    return (
        min(within[0], max(1, round(size[0] * scale))),
        min(within[1], max(1, round(size[1] * scale))),
    )


def _planes(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "RGB":
        rows = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8)
        return rows.reshape(image.height, 3, image.width)
    pixels_HWC = np.asarray(image).reshape(image.height, image.width, -1)
    return pixels_HWC.transpose(0, 2, 1)


def _lanczos(planes_HCW: NDArray[np.uint8], size: tuple[int, int], box: Box) -> NDArray[np.uint8]:
    height, channels, width = planes_HCW.shape
    new_width, new_height = size
    left, top, right, bottom = box
    across = _blocks(width, new_width, left, right)
    down = _blocks(height, new_height, top, bottom)
    narrow = np.empty((height, channels, new_width), np.uint8)
    rows = max(1, _CHUNK // (channels * width))
    for start in range(down[0][1].start, down[-1][1].stop, rows):
        chunk = planes_HCW[start : start + rows].astype(np.float32).reshape(-1, width)
        sums = np.empty((len(chunk), new_width), np.float32)
        for outputs, inputs, weights in across:
            np.matmul(chunk[:, inputs], weights, out=sums[:, outputs])
        narrow[start : start + rows] = _to_bytes(sums).reshape(-1, channels, new_width)
    flat = narrow.reshape(height, channels * new_width)
    result = np.empty((new_height, channels * new_width), np.uint8)
    for outputs, inputs, weights in down:
        columns = max(1, _CHUNK // len(weights))
        for start in range(0, flat.shape[1], columns):
            part = slice(start, start + columns)
            result[outputs, part] = _to_bytes(weights.T @ flat[inputs, part].astype(np.float32))
    return result.reshape(new_height, channels, new_width)


def _to_bytes(sums: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Rounded and cut to [0, 255]; changes `sums`."""
    sums *= 1 / _UNIT
    np.rint(sums, out=sums)
    np.clip(sums, 0, 255, out=sums)
    return sums.astype(np.uint8)


@lru_cache(maxsize=64)
def _blocks(num_inputs: int, num_outputs: int, start: float, stop: float) -> tuple[_Block, ...]:
    """The weights of [start, stop) of so many inputs, as dense blocks along the diagonal."""
    scale = (stop - start) / num_outputs
    stretch = max(scale, 1.0)
    centres = start + (np.arange(num_outputs) + 0.5) * scale
    firsts = np.clip(np.floor(centres - _LOBES * stretch + 0.5), 0, None).astype(np.int64)
    lasts = np.clip(np.floor(centres + _LOBES * stretch + 0.5), None, num_inputs).astype(np.int64)
    at = firsts[:, None] + np.arange((lasts - firsts).max())
    x = (at + 0.5 - centres[:, None]) / stretch
    used = (at < lasts[:, None]) & (np.abs(x) < _LOBES)
    weights = np.where(used, np.sinc(x) * np.sinc(x / _LOBES), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    # Sums are rounded, not weights: so those of an output are 1 together, and flat areas stay flat.
    sums = np.rint(np.cumsum(weights, axis=1) * _UNIT)
    whole = np.diff(sums, axis=1, prepend=0)
    blocks = []
    for first in range(0, num_outputs, _BLOCK):
        outputs = slice(first, min(first + _BLOCK, num_outputs))
        inputs = slice(int(firsts[first]), int(lasts[outputs.stop - 1]))
        block = np.zeros((inputs.stop - inputs.start, outputs.stop - first), np.float32)
        output, tap = np.nonzero(used[outputs])
        block[at[outputs][output, tap] - inputs.start, output] = whole[outputs][output, tap]
        blocks.append((outputs, inputs, block))
    return tuple(blocks)
