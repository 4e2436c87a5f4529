"""Image to code tokens: a convolutional encoder, and an LSTM decoder that attends to its grid.

The module holds the network alone: a pure function of images in [0,1] and token ids. Losses
and augmentation live in `pipeline.tasks`, search in `pipeline.decode`.

Tensor names carry their shape:
B batch, C image channels, H height, W width, T token positions, V vocabulary, N grid cells,
F grid features, P position features, S cells of the summary, A attention heads, K query and key
features of a head, U value features of a head, L latent, E embedding, D hidden,
I and O what the output layer reads and mixes.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models import backbone
from pipeline.models.backbone import Backbone

_SUMMARY_ROWS, _SUMMARY_COLUMNS = 6, 5
_NUM_FREQUENCIES = 8
_POSITION_DIM = 4 * _NUM_FREQUENCIES


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """The section `[model]` of an image-to-code run."""

    name: Literal["seq2seq"] = "seq2seq"
    """Chooses this model."""
    encoder: Literal["cnn", "resnet18", "resnet50", "efficientnet_b0"] = "cnn"
    """What sees the image: cnn, a small network of `model.channels`; or a torchvision model, whose
    weights run.init names."""
    channels: tuple[int, ...] = (24, 48, 96, 128)
    """Output channels of the cnn encoder's convolutions; each halves height and width."""
    embed_dim: int = 64
    """Size of a token's embedding."""
    latent_dim: int = 256
    """Size of the image summary that the decoder sees at every step."""
    hidden_dim: int = 192
    """Size of the LSTM's state and of the attention."""
    num_heads: int = 8
    """Attention heads; they divide `hidden_dim`."""
    dropout: float = 0.1
    """Share of embedding and hidden features dropped in training, in [0,1)."""
    latent_dropout: float = 0.5
    """Share of the image summary dropped in training, in [0,1): what is left to find by attention
    generalises, what is read off the summary is learnt sooner and by heart."""
    max_tokens: int = 256
    """The longest code that decoding writes, `<bos>` and `<eos>` not counted."""

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(
                f"model.channels = {self.channels} needs at least one entry, all of them positive"
            )
        for key in ("embed_dim", "latent_dim", "hidden_dim", "num_heads", "max_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} = {getattr(self, key)} is not positive")
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} does not divide model.hidden_dim = "
                f"{self.hidden_dim}: every head takes an equal share, change one of the two"
            )
        for key in ("dropout", "latent_dropout"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"model.{key} = {getattr(self, key)} is outside [0,1)")


class DecoderState(NamedTuple):
    """The LSTM's state between two tokens. Row b belongs to sample b."""

    hidden_BD: Tensor
    cell_BD: Tensor


class Memory(NamedTuple):
    """What the decoder knows of a batch of images. Row b of every tensor belongs to sample b."""

    key_BANK: Tensor
    value_BANU: Tensor
    latent_BL: Tensor
    start: DecoderState


class Seq2Seq(nn.Module):
    """LSTM decoder with multi-head attention over a convolutional grid.

    Such models stall with the structure of the code right and every detail a guess, because no
    query knows where to look and nothing worth seeing is found where it looks. Three things ended
    the stall early on pix2code's screens, where the details are the colours of buttons:
    colour enters as a difference from brightness, standardised (`_standardise`); a query addresses
    a cell by its content and, directly, by the Fourier features of its place; and a pooled summary
    of the grid, its layout kept, starts the LSTM, enters it at every step, and goes past it to the
    output. Attention does not feed back into the LSTM, so teacher forcing is one fused LSTM call.

    After "Show, Attend and Tell" (Xu et al., 2015, arXiv:1502.03044), with scaled dot-product
    attention (Vaswani et al., 2017, arXiv:1706.03762).
    """

    def __init__(
        self,
        config: Seq2SeqConfig,
        image_channels: int,
        image_height: int,
        image_width: int,
        vocab_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (image_channels, image_height, image_width)
        if config.encoder == "cnn":
            stride, feature_dim = 2 ** len(config.channels), config.channels[-1]
        else:
            stride, feature_dim = backbone.STRIDE, backbone.FEATURE_DIMS[config.encoder]
        rows, columns = math.ceil(image_height / stride), math.ceil(image_width / stride)
        # Constants of the size, which no checkpoint needs to hold.
        self.coordinates_1CHW = nn.Buffer(_coordinates(image_height, image_width), persistent=False)
        self.position_NP = nn.Buffer(_fourier_features(rows, columns), persistent=False)
        self.pool_SN = nn.Buffer(_pool_matrix(rows, columns), persistent=False)

        if config.encoder == "cnn":
            # Brightness, each channel's difference from it, and two channels of coordinates.
            self.encoder = _encoder(image_channels + 3, config.channels)
        else:
            self.encoder = Backbone(config.encoder, image_channels)
        self.position = nn.Linear(_POSITION_DIM, feature_dim)
        self.key = nn.Linear(feature_dim, config.hidden_dim)
        self.value = nn.Linear(feature_dim, config.hidden_dim)
        self.summary = nn.Linear(_SUMMARY_ROWS * _SUMMARY_COLUMNS * feature_dim, config.latent_dim)
        self.start = nn.Linear(config.latent_dim, 2 * config.hidden_dim)

        self.embedding = nn.Embedding(vocab_size, config.embed_dim)
        self.lstm = nn.LSTM(
            config.embed_dim + config.latent_dim, config.hidden_dim, batch_first=True
        )
        self.query = nn.Linear(
            config.hidden_dim, config.hidden_dim + config.num_heads * _POSITION_DIM
        )
        self.combine = nn.Linear(2 * config.hidden_dim + config.latent_dim, 2 * config.hidden_dim)
        self.head = nn.Linear(2 * config.hidden_dim, vocab_size)
        self.dropout = nn.Dropout(config.dropout)
        self.latent_dropout = nn.Dropout(config.latent_dropout)

    def forward(self, image_BCHW: Tensor, token_BT: Tensor) -> Tensor:
        """Teacher-forced logits.

        Args:
            image_BCHW: float in [0,1], of the size given at construction.
            token_BT: int64 inputs, `<bos>` first, padded with 0 at the end. The decoder is
                causal, so padding changes no logits before it.

        Returns:
            logits_BTV: position t scores the token after `token_BT[:, t]`.
        """
        memory = self.encode(image_BCHW)
        logits_BTV, _ = self._decode(token_BT, memory.start, memory)
        return logits_BTV

    def encode(self, image_BCHW: Tensor) -> Memory:
        """What the decoder needs of images in [0,1]; computed once, read at every step.

        Raises:
            ValueError: the images are not of the shape given at construction.
        """
        if image_BCHW.shape[1:] != self.image_shape:
            raise ValueError(
                f"images of shape {tuple(image_BCHW.shape[1:])} for a model built for "
                f"{self.image_shape} (channels, height, width)"
            )
        if self.config.encoder == "cnn":
            coordinates_BCHW = self.coordinates_1CHW.expand(len(image_BCHW), -1, -1, -1)
            image_BCHW = torch.cat([_standardise(image_BCHW), coordinates_BCHW], dim=1)
        grid_BFHW = self.encoder(image_BCHW)
        feature_BNF = grid_BFHW.flatten(2).transpose(1, 2)
        # Dropped once for all tokens of a sample, or the decoder would average over them.
        latent_BL = self.latent_dropout(self.summary((self.pool_SN @ feature_BNF).flatten(1)))
        hidden_BD, cell_BD = torch.tanh(self.start(latent_BL)).chunk(2, dim=1)

        placed_BNF = feature_BNF + self.position(self.position_NP)
        content_BANK = self._split_heads(self.key(placed_BNF))
        place_BANP = self.position_NP.expand(*content_BANK.shape[:2], -1, -1)
        return Memory(
            # The usual scale, but for the content alone: the place keeps its full gradient.
            key_BANK=torch.cat([content_BANK / content_BANK.shape[3] ** 0.5, place_BANP], dim=3),
            value_BANU=self._split_heads(self.value(placed_BNF)),
            latent_BL=latent_BL,
            start=DecoderState(hidden_BD.contiguous(), cell_BD.contiguous()),
        )

    def step(
        self, token_B: Tensor, state: DecoderState, memory: Memory
    ) -> tuple[Tensor, DecoderState]:
        """One token on: `logits_BV` after the int64 `token_B`, and the state that follows.

        Starts with `<bos>` and `memory.start`; equals `forward` position by position.
        """
        logits_BTV, state = self._decode(token_B[:, None], state, memory)
        return logits_BTV[:, 0], state

    def _decode(
        self, token_BT: Tensor, state: DecoderState, memory: Memory
    ) -> tuple[Tensor, DecoderState]:
        latent_BTL = memory.latent_BL[:, None].expand(-1, token_BT.shape[1], -1)
        embedding_BTE = self.dropout(self.embedding(token_BT))
        hidden_BTD, (hidden_1BD, cell_1BD) = self.lstm(
            torch.cat([embedding_BTE, latent_BTL], dim=2),
            (state.hidden_BD[None], state.cell_BD[None]),
        )
        hidden_BTD = self.dropout(hidden_BTD)
        query_BATK = self._split_heads(self.query(hidden_BTD))
        seen_BATU = _attend(query_BATK, memory.key_BANK, memory.value_BANU)
        seen_BTD = seen_BATU.transpose(1, 2).flatten(2)
        known_BTI = torch.cat([hidden_BTD, seen_BTD, latent_BTL], dim=2)
        combined_BTO = functional.relu(self.combine(known_BTI))
        return self.head(self.dropout(combined_BTO)), DecoderState(hidden_1BD[0], cell_1BD[0])

    def _split_heads(self, feature_BTD: Tensor) -> Tensor:
        batch_size, length, _ = feature_BTD.shape
        return feature_BTD.view(batch_size, length, self.config.num_heads, -1).transpose(1, 2)


def _attend(query_BATK: Tensor, key_BANK: Tensor, value_BANU: Tensor) -> Tensor:
    if query_BATK.shape[2] > 1:
        return functional.scaled_dot_product_attention(query_BATK, key_BANK, value_BANU, scale=1.0)
    # On a CPU the fused form copies the keys in order to scale them: for the one query of a
    # decoding step that takes four times as long as all the rest of it.
    return (query_BATK @ key_BANK.transpose(2, 3)).softmax(dim=3) @ value_BANU


def _encoder(image_channels: int, channels: tuple[int, ...]) -> nn.Sequential:
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


def _standardise(image_BCHW: Tensor) -> Tensor:
    """Brightness and each channel's difference from it, of zero mean and unit variance each.

    A screen is mostly grey background. In [0,1] the few pixels of a coloured button are a small
    signal and their colours are learnt last; as standardised differences they are a large one.
    One channel more than the image has; for one channel the difference is zero.
    """
    bright_B1HW = image_BCHW.mean(dim=1, keepdim=True)
    plane_BCHW = torch.cat([bright_B1HW, image_BCHW - bright_B1HW], dim=1)
    var_BC11, mean_BC11 = torch.var_mean(plane_BCHW, dim=(2, 3), correction=0, keepdim=True)
    return (plane_BCHW - mean_BC11) * torch.rsqrt(var_BC11 + 1e-4)


def _coordinates(height: int, width: int) -> Tensor:
    """Two channels that tell a convolution where it is, in [-1,1] (arXiv:1807.03247): 1x2xHxW."""
    row_H, column_W = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(row_H, column_W, indexing="ij"))[None]


def _fourier_features(rows: int, columns: int) -> Tensor:
    """Sines and cosines of each cell's row and column: NxP, row-major."""
    frequency_P = math.pi * torch.arange(1, _NUM_FREQUENCIES + 1)
    row_N = torch.linspace(0, 1, rows).repeat_interleave(columns)
    column_N = torch.linspace(0, 1, columns).repeat(rows)
    phase_NP = torch.cat([row_N[:, None] * frequency_P, column_N[:, None] * frequency_P], dim=1)
    return torch.cat([phase_NP.sin(), phase_NP.cos()], dim=1)


def _pool_matrix(rows: int, columns: int) -> Tensor:
    """SxN matrix that averages a row-major grid into the summary's cells.

    Adaptive average pooling as one product: it takes any grid, smaller ones too, and has a
    deterministic backward on CUDA, which `adaptive_avg_pool2d` has not.
    """
    row_SN = _pool_weights(rows, _SUMMARY_ROWS)
    column_SN = _pool_weights(columns, _SUMMARY_COLUMNS)
    return torch.kron(row_SN, column_SN)


def _pool_weights(size: int, bins: int) -> Tensor:
    weight_SN = torch.zeros(bins, size)
    for index in range(bins):
        begin, end = index * size // bins, -(-(index + 1) * size // bins)
        weight_SN[index, begin:end] = 1 / (end - begin)
    return weight_SN
