"""Images to one size, at the time of loading: stretch, crop or pad, with antialiasing.

The result is a function of the image's bytes and the target alone: neither the batch nor the
process nor the number of threads reaches it. What a sample's bytes are is `pipeline.batch`'s
business, and the size that a dataset was packed with that of `shards.images`.

Legend of shape suffixes: C channels, H height, W width.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from shards import images
from shards.arrays import backgrounds
from shards.resample import inside

FitKind = Literal["stretch", "crop", "pad"]


@dataclass(frozen=True)
class Fit:
    """How an image of any size becomes one of (height, width) pixels.

    `stretch` ignores the aspect ratio, `crop` cuts the longer side to it around the middle, `pad`
    keeps all of the image and fills up with `background` (RGB) on both sides: with its grey in
    channels beyond the third of an array, and in all of 2.
    """

    height: int
    width: int
    kind: FitKind = "stretch"
    background: tuple[int, int, int] = (255, 255, 255)


def decode_fitted(data: bytes, fit: Fit, out_HWC: NDArray[np.uint8]) -> None:
    """Decodes an image into `out_HWC`, uint8, whose height and width are the fit's.

    A JPEG of twice the size or more is decoded at 1/2, 1/4 or 1/8 first. The rest is the bilinear
    filter with antialiasing, within 1 level of Pillow's.

    Raises:
        ImageRefused: the bytes are damaged or of no format that shards hold.
    """
    least = (fit.width, fit.height)
    if fit.kind == "pad" and data.startswith(b"\xff\xd8"):
        least = inside(images.read_size(data), least)  # one side may be far shorter than the fit's
    pixels = images.decode(data, out_HWC.shape[2], least=least, out=out_HWC)
    if pixels is out_HWC:
        return
    height, width, channels = pixels.shape
    if fit.kind == "crop":
        scale = min(width / fit.width, height / fit.height)
        kept_W = min(width, max(1, round(fit.width * scale)))
        kept_H = min(height, max(1, round(fit.height * scale)))
        top, left = (height - kept_H) // 2, (width - kept_W) // 2
        pixels = pixels[top : top + kept_H, left : left + kept_W]
    elif fit.kind == "pad":
        inner_W, inner_H = inside((width, height), (fit.width, fit.height))
        top, left = (fit.height - inner_H) // 2, (fit.width - inner_W) // 2
        out_HWC[...] = _paint(channels, fit.background)
        out_HWC = out_HWC[top : top + inner_H, left : left + inner_W]
    out_HWC[...] = _resized(pixels, (out_HWC.shape[0], out_HWC.shape[1]))


def _resized(pixels_HWC: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    if pixels_HWC.shape[:2] == size:
        return pixels_HWC
    if not pixels_HWC.flags.writeable:
        pixels_HWC = pixels_HWC.copy()  # torch takes no others; Pillow's are not
    # The batch axis first: so the strides are those of channels last, which is twice as fast.
    image_1CHW = torch.from_numpy(pixels_HWC)[None].permute(0, 3, 1, 2)
    resized_1CHW = functional.interpolate(image_1CHW, size, mode="bilinear", antialias=True)
    resized: NDArray[np.uint8] = resized_1CHW[0].permute(1, 2, 0).numpy()
    return resized


def _paint(channels: int, background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The background in the image's channels; grey as Rec. 601 weighs it, alpha opaque."""
    if channels == 4:
        return np.array([*background, 255], dtype=np.uint8)
    return np.array(backgrounds(channels, background), dtype=np.uint8)
