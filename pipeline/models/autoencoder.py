"""Image to latent to image: a convolutional autoencoder for any size and channel count.

The latent is a vector or a map; `variational = true` makes it a distribution. The module holds the
network alone; the losses named by `AutoencoderConfig` are computed in `pipeline.tasks`.

Tensor names carry their shape: B batch, C channels, H height, W width, F features of the grid;
D latent, which is (latent_dim) for a vector and (latent_dim, rows, columns) for a map.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The section `[model]` of an autoencoder run."""

    name: Literal["autoencoder"] = "autoencoder"
    """Chooses this model."""
    latent: Literal["vector", "map"] = "vector"
    """vector: model.latent_dim numbers an image, by a linear layer; map: as many a cell of the
    coarsest grid, by a 1x1 convolution, so that what is where stays where it is."""
    latent_dim: int = 128
    """Size of the vector that an image is squeezed into; of a map, its channels."""
    channels: tuple[int, ...] = (32, 64, 128)
    """Channels of the encoder's stages, each halving height and width; the decoder mirrors them."""
    blocks: int = 0
    """Residual blocks of two convolutions after each of the encoder's stages, and before each of
    the decoder's."""
    linear: bool = False
    """Of a latent vector: adds a linear map from pixels to latent, and one from latent to pixels,
    to what the convolutions do."""
    range: Literal["unit", "symmetric"] = "unit"
    """The decoder's last activation, with the scale that images have against it: unit: a sigmoid,
    of range [0,1]; symmetric: tanh, of range [-1,1]. Outside the model images are in [0,1] with
    either, and losses are measured there."""
    loss: Literal["mse", "l1", "bce", "ssim"] = "mse"
    """What training minimises: squared or absolute error of pixels in [0,1]; binary cross-entropy,
    pixels taken as probabilities (range = unit); or 1 - SSIM."""
    variational: bool = False
    """Makes it a VAE: the encoder gives a mean and a variance for each latent number, training
    decodes a draw, and the KL divergence to N(0,1) is added to the loss. Everywhere else the mean
    is decoded."""
    kl_weight: float = 1.0
    """beta: what an image's KL, summed over the latent in nats, weighs beside its reconstruction
    error, summed over all its channels and pixels. Per-pixel means of the error would be a beta
    of channels x height x width times this one. A plain autoencoder has none."""
    kl_warmup: float = 0.0
    """Share of the run's steps, in [0,1], over which beta grows linearly from 0, of a VAE."""

    def __post_init__(self) -> None:
        if self.latent_dim < 1:
            raise ValueError(f"model.latent_dim = {self.latent_dim} is not positive")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(
                f"model.channels = {self.channels} needs at least one entry, all of them positive"
            )
        if self.blocks < 0:
            raise ValueError(f"model.blocks = {self.blocks} is negative")
        if self.linear and self.latent == "map":
            raise ValueError(
                'model.linear = true needs a vector: set model.latent = "vector", or drop it'
            )
        if self.loss == "bce" and self.range != "unit":
            raise ValueError(
                f'model.loss = "bce" takes pixels for probabilities, and model.range = '
                f'"{self.range}" gives others: set model.range = "unit"'
            )
        if not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"model.kl_weight = {self.kl_weight} is negative or not finite")
        if not 0 <= self.kl_warmup <= 1:
            raise ValueError(f"model.kl_warmup = {self.kl_warmup} is outside [0,1]")
        for key in ("kl_weight", "kl_warmup"):
            if not self.variational and getattr(self, key) != getattr(AutoencoderConfig, key):
                raise ValueError(
                    f"model.{key} = {getattr(self, key)} is for the KL divergence of a VAE: set "
                    "model.variational = true, or drop it"
                )


class Output(NamedTuple):
    """What the losses of a batch are computed from. Row b of every tensor belongs to sample b."""

    reconstruction_BCHW: Tensor
    """in [0,1]"""
    raw_BCHW: Tensor
    """the decoder's last layer, before its activation: of range = unit, logits"""
    mean_BD: Tensor
    log_variance_BD: Tensor | None
    """of a variational model"""


class Autoencoder(nn.Module):
    """Strided convolutions to a grid, a linear map to the latent, and the mirror image.

    The grid is rounded up to cover the image, and the reconstruction is cropped back to its size,
    so no size needs padding or a multiple of the stride.

    There is no normalisation layer: BatchNorm would tie a sample to its batch, and GroupNorm made
    reconstructions worse, probably because it removes the brightness and contrast that are to be
    reproduced. On CIFAR-10 at latent 128, after 1500 steps of 64, the test error was .0083 with
    GroupNorm and ReLU, and .0048 with SiLU alone.

    At large latents the convolutions take long to learn what a linear map has at once. On CIFAR-10
    at latent 256, after 2 minutes, the test error was .0035 without the linear branch, and .0025
    with it. PCA has .0023; with the branch, 12 minutes gave .0021.

    The variational one is that of Kingma and Welling (2013, arXiv:1312.6114), its KL term weighed
    as in the beta-VAE (Higgins et al., 2017).
    """

    def __init__(
        self, config: AutoencoderConfig, image_channels: int, image_height: int, image_width: int
    ) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (image_channels, image_height, image_width)
        stride = 2 ** len(config.channels)
        self.grid_shape = (
            config.channels[-1],
            math.ceil(image_height / stride),
            math.ceil(image_width / stride),
        )
        self.latent_shape: tuple[int, ...] = (config.latent_dim,)
        if config.latent == "map":
            self.latent_shape += self.grid_shape[1:]
        # Of a variational model, means, then logarithms of variances.
        coded_dim = config.latent_dim * (2 if config.variational else 1)
        self.encoder = _encoder(image_channels, config.channels, config.blocks)
        self.to_latent: nn.Module
        self.from_latent: nn.Module
        if config.latent == "map":
            self.to_latent = nn.Conv2d(config.channels[-1], coded_dim, 1)
            self.from_latent = nn.Conv2d(config.latent_dim, config.channels[-1], 1)
        else:
            self.to_latent = nn.Linear(math.prod(self.grid_shape), coded_dim)
            self.from_latent = nn.Linear(config.latent_dim, math.prod(self.grid_shape))
        self.decoder = _decoder(config.channels, image_channels, config.blocks)
        self.linear_to: nn.Linear | None = None
        self.linear_from: nn.Linear | None = None
        if config.linear:
            self.linear_to = nn.Linear(math.prod(self.image_shape), coded_dim, bias=False)
            self.linear_from = nn.Linear(config.latent_dim, math.prod(self.image_shape), bias=False)

    @overload
    def forward(self, image_BCHW: Tensor) -> Tensor: ...

    @overload
    def forward(self, image_BCHW: Tensor, *, for_loss: Literal[True]) -> Output: ...

    def forward(self, image_BCHW: Tensor, *, for_loss: bool = False) -> Tensor | Output:
        """Reconstruction of images in [0,1]: `reconstruction_BCHW`, same shape, in [0,1].

        `for_loss` gives what losses need besides. A variational model in training mode draws its
        latent, from torch's default generator; in eval mode it takes the mean.
        """
        mean_BD, log_variance_BD = self.posterior(image_BCHW)
        latent_BD = mean_BD
        if self.training and log_variance_BD is not None:
            latent_BD = mean_BD + torch.randn_like(mean_BD) * (log_variance_BD / 2).exp()
        raw_BCHW = self._raw(latent_BD)
        reconstruction_BCHW = self._activate(raw_BCHW)
        if for_loss:
            return Output(reconstruction_BCHW, raw_BCHW, mean_BD, log_variance_BD)
        return reconstruction_BCHW

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """`latent_BD`, unbounded, of images in [0,1]; of a variational model, its mean.

        Raises:
            ValueError: the images are not of the shape given at construction.
        """
        return self.posterior(image_BCHW)[0]

    def posterior(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and logarithm of the variance of the latent, both BD; no variance without one.

        Raises:
            ValueError: the images are not of the shape given at construction.
        """
        if image_BCHW.shape[1:] != self.image_shape:
            raise ValueError(
                f"images of shape {tuple(image_BCHW.shape[1:])} for a model built for "
                f"{self.image_shape} (channels, height, width)"
            )
        centred_BCHW = 2 * image_BCHW - 1
        grid_BFHW = self.encoder(centred_BCHW)
        if self.config.latent == "vector":
            grid_BFHW = grid_BFHW.flatten(1)
        coded_BD: Tensor = self.to_latent(grid_BFHW)
        if self.linear_to is not None:
            coded_BD = coded_BD + self.linear_to(centred_BCHW.flatten(1))
        if not self.config.variational:
            return coded_BD, None
        # Under autocast too: what the exponential is taken of needs all its digits.
        mean_BD, log_variance_BD = coded_BD.to(image_BCHW.dtype).chunk(2, dim=1)
        return mean_BD, log_variance_BD.clamp(-30, 20)

    def decode(self, latent_BD: Tensor) -> Tensor:
        """`reconstruction_BCHW` in [0,1] of latents as `encode` gives them."""
        return self._activate(self._raw(latent_BD))

    def _raw(self, latent_BD: Tensor) -> Tensor:
        _, height, width = self.image_shape
        grid_BFHW = self.from_latent(latent_BD)
        if self.config.latent == "vector":
            grid_BFHW = grid_BFHW.unflatten(1, self.grid_shape)
        raw_BCHW: Tensor = self.decoder(grid_BFHW)[:, :, :height, :width]
        if self.linear_from is not None:
            raw_BCHW = raw_BCHW + self.linear_from(latent_BD).unflatten(1, self.image_shape)
        return raw_BCHW

    def _activate(self, raw_BCHW: Tensor) -> Tensor:
        # Each onto the range of the images: a sigmoid against images in [-1,1] would leave an
        # error that no training removes.
        if self.config.range == "unit":
            return torch.sigmoid(raw_BCHW)
        return (torch.tanh(raw_BCHW) + 1) / 2


class _Block(nn.Module):
    """Adds what two convolutions make of a grid to it; the shape stays (B, F, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, grid_BFHW: Tensor) -> Tensor:
        inner_BFHW = self.first(functional.silu(grid_BFHW))
        added_BFHW: Tensor = grid_BFHW + self.second(functional.silu(inner_BFHW))
        return added_BFHW


def _encoder(image_channels: int, channels: tuple[int, ...], blocks: int) -> nn.Sequential:
    stages: list[nn.Module] = []
    for in_channels, out_channels in pairwise((image_channels, *channels)):
        stages += [nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)]
        stages += [_Block(out_channels) for _ in range(blocks)]
        stages += [nn.SiLU()]
    return nn.Sequential(*stages)


def _decoder(channels: tuple[int, ...], image_channels: int, blocks: int) -> nn.Sequential:
    stages: list[nn.Module] = []
    for in_channels, out_channels in pairwise((*reversed(channels), image_channels)):
        stages += [_Block(in_channels) for _ in range(blocks)]
        stages += [nn.SiLU(), nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1)]
    return nn.Sequential(*stages)
