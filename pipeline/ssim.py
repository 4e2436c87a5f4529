"""Structural similarity of images, one number a sample, as a metric and as a loss.

Legend of shape suffixes: B batch, C channels, H height, W width, K places of the window along one
axis.
"""

import torch
from torch import Tensor

WINDOW = 11
"""Places of the Gaussian window along each axis."""
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


def ssim(first_BCHW: Tensor, second_BCHW: Tensor) -> Tensor:
    """`ssim_B` of images in [0,1], at most 1, which equal images have.

    The mean over all places where the window fits and over the channels, each compared alone. The
    window is Gaussian, 11 x 11, sigma 1.5; where an image has fewer than 11 pixels along an axis,
    it has the largest odd number that fits there. In float32 at least, whatever autocast says.

    "Image quality assessment: from error visibility to structural similarity" (Wang et al., 2004),
    with its constants for a range of 1.
    """
    _, _, height, width = first_BCHW.shape
    dtype = torch.promote_types(first_BCHW.dtype, torch.float32)
    with torch.autocast(first_BCHW.device.type, enabled=False):
        # Less half the range: a variance is then a difference of smaller numbers.
        one = first_BCHW.to(dtype).contiguous() - 0.5
        two = second_BCHW.to(dtype).contiguous() - 0.5
        planes = torch.stack([one, two, one * one, two * two, one * two])
        # Products of matrices, not convolutions: those round to TF32 on a GPU unless told not to.
        rows_KH, columns_KW = (_band(size, planes) for size in (height, width))
        filtered = rows_KH @ planes @ columns_KW.T
        mean1, mean2, square1, square2, product = filtered
        variances = square1 - mean1 * mean1 + square2 - mean2 * mean2
        covariance = product - mean1 * mean2
        mean1, mean2 = mean1 + 0.5, mean2 + 0.5
        brightness = (2 * mean1 * mean2 + _C1) / (mean1 * mean1 + mean2 * mean2 + _C1)
        structure = (2 * covariance + _C2) / (variances + _C2)
        ssim_B: Tensor = (brightness * structure).flatten(1).mean(1)
        return ssim_B


def _band(size: int, like: Tensor) -> Tensor:
    """Kx`size`: the window at each of the places where it fits."""
    width = min(WINDOW, size - 1 + size % 2)
    offset = torch.arange(width, dtype=like.dtype, device=like.device) - width // 2
    weight = (-0.5 * (offset / _SIGMA) ** 2).exp()
    places = size - width + 1
    band = like.new_zeros(places, size + 1)
    band[:, :width] = weight / weight.sum()
    # A row too long by one: laid end to end, each row begins one place further right.
    return band.flatten()[: places * size].view(places, size)
