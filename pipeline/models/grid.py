"""An image as a grid of features: the small convolutional encoder, and the places of its cells.

Tensor names carry their shape: B batch, C image channels, H height, W width, N grid cells,
P position features, S cells of the summary.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

SUMMARY_ROWS, SUMMARY_COLUMNS = 6, 5
NUM_FREQUENCIES = 8
POSITION_DIM = 4 * NUM_FREQUENCIES


def convolutions(image_channels: int, channels: tuple[int, ...]) -> nn.Sequential:
    """Convolutions of stride 2; each turns a height or width of n into ceil(n / 2)."""
    stages: list[nn.Module] = []
    for in_channels, out_channels in pairwise((image_channels, *channels)):
        stages += [
            nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False),
            # GroupNorm, not BatchNorm: a sample's result must not depend on its batch.
            nn.GroupNorm(math.gcd(out_channels, 8), out_channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*stages)


def standardise(image_BCHW: Tensor) -> Tensor:
    """Brightness and each channel's difference from it, of zero mean and unit variance each.

    A screen is mostly grey background. In [0,1] the few pixels of a coloured button are a small
    signal and their colours are learnt last; as standardised differences they are a large one.
    One channel more than the image has; for one channel the difference is zero.
    """
    bright_B1HW = image_BCHW.mean(dim=1, keepdim=True)
    plane_BCHW = torch.cat([bright_B1HW, image_BCHW - bright_B1HW], dim=1)
    var_BC11, mean_BC11 = torch.var_mean(plane_BCHW, dim=(2, 3), correction=0, keepdim=True)
    return (plane_BCHW - mean_BC11) * torch.rsqrt(var_BC11 + 1e-4)


def coordinates(height: int, width: int) -> Tensor:
    """Two channels that tell a convolution where it is, in [-1,1] (arXiv:1807.03247): 1x2xHxW."""
    row_H, column_W = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(row_H, column_W, indexing="ij"))[None]


def fourier_features(rows: int, columns: int) -> Tensor:
    """Sines and cosines of each cell's row and column: NxP, row-major."""
    frequency_P = math.pi * torch.arange(1, NUM_FREQUENCIES + 1)
    row_N = torch.linspace(0, 1, rows).repeat_interleave(columns)
    column_N = torch.linspace(0, 1, columns).repeat(rows)
    phase_NP = torch.cat([row_N[:, None] * frequency_P, column_N[:, None] * frequency_P], dim=1)
    return torch.cat([phase_NP.sin(), phase_NP.cos()], dim=1)


def pool_matrix(rows: int, columns: int) -> Tensor:
    """SxN matrix that averages a row-major grid into the summary's cells.

    Adaptive average pooling as one product: it takes any grid, smaller ones too, and has a
    deterministic backward on CUDA, which `adaptive_avg_pool2d` has not.
    """
    row_SN = _pool_weights(rows, SUMMARY_ROWS)
    column_SN = _pool_weights(columns, SUMMARY_COLUMNS)
    return torch.kron(row_SN, column_SN)


def _pool_weights(size: int, bins: int) -> Tensor:
    weight_SN = torch.zeros(bins, size)
    for index in range(bins):
        begin, end = index * size // bins, -(-(index + 1) * size // bins)
        weight_SN[index, begin:end] = 1 / (end - begin)
    return weight_SN
