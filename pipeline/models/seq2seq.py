"""Image to code tokens: what all such models share, from the image to what a decoder is shown.

A `Seq2Seq` is a pure function of images in [0,1] and token ids. Its decoder is a subclass:
`pipeline.models.recurrent`, `pipeline.models.transformer`. Losses and augmentation live in
`pipeline.tasks`, search in `pipeline.decode`.

Tensor names carry their shape:
B batch, C image channels, H height, W width, T token positions, V vocabulary, N grid cells,
M rows of code (one or more an image), F grid features, A attention heads, K query and key features
of a head, U value features of a head, P position features, L latent, D hidden.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models import backbone, grid
from pipeline.models.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """The section `[model]` of an image-to-code run."""

    name: Literal["seq2seq"] = "seq2seq"
    """Chooses this model."""
    encoder: Literal["cnn", "resnet18", "resnet50", "efficientnet_b0"] = "cnn"
    """What sees the image: cnn, a small network of `model.channels`; or a torchvision model, to
    fine-tune from the weights that run.init names."""
    channels: tuple[int, ...] = (24, 48, 96, 128)
    """Output channels of the cnn encoder's convolutions; each halves height and width."""
    decoder: Literal["lstm", "gru", "transformer"] = "lstm"
    """What writes the code."""
    memory: Literal["spatial", "vector"] = "spatial"
    """What the decoder knows of the image: the grid of features, by attention, and its summary; or
    the summary alone, a vector of `model.latent_dim`."""
    embed_dim: int = 64
    """Size of a token's embedding."""
    latent_dim: int = 256
    """Size of the image summary that the decoder sees at every step."""
    hidden_dim: int = 192
    """Size of the decoder's state and of the attention."""
    num_layers: int = 3
    """Layers of the transformer; the others have one."""
    num_heads: int = 8
    """Attention heads; where there is attention, they divide `hidden_dim`."""
    dropout: float = 0.1
    """Share of embedding and hidden features, and of a vector memory, dropped in training, in
    [0,1)."""
    latent_dropout: float = 0.5
    """Spatial memory: share of training samples that are decoded without the image summary, in
    [0,1): what must be found by attention generalises, what is read off the summary is learnt
    sooner and by heart."""
    max_tokens: int = 256
    """The longest code that decoding writes, `<bos>` and `<eos>` not counted."""
    label_smoothing: float = 0.0
    """Share of a target's probability that the training loss spreads over the vocabulary, in [0,1).
    The validation loss stays plain."""
    sampling_share: float = 0.0
    """Scheduled sampling: at most so large a share of the input tokens is replaced by what the
    model itself would have written, in [0,1]; 0: teacher forcing alone."""
    sampling_start: float = 0.25
    """Part of the run, in [0,1), after which that share rises from 0."""
    sampling_end: float = 0.75
    """Part of the run, above sampling_start and up to 1, after which it is whole."""
    risk_weight: float = 0.0
    """Minimum risk: weight of the expected edits to the true code, over codes that the model finds
    by beam search, beside cross-entropy; 0: none. For fine-tuning: name a trained export in
    run.init."""
    risk_beam: int = 4
    """Codes found by beam search; the true one is added."""
    risk_alpha: float = 1.0
    """Sharpness of the distribution over them: 1 is the model's own, smaller ones are flatter."""

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(
                f"model.channels = {self.channels} needs at least one entry, all of them positive"
            )
        for key in ("embed_dim", "latent_dim", "hidden_dim", "num_layers", "num_heads",
                    "max_tokens", "risk_beam"):  # fmt: skip
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key} = {getattr(self, key)} is not positive")
        attends = self.memory == "spatial" or self.decoder == "transformer"
        if attends and self.hidden_dim % self.num_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} does not divide model.hidden_dim = "
                f"{self.hidden_dim}: every head takes an equal share, change one of the two"
            )
        for key in ("dropout", "latent_dropout", "label_smoothing"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"model.{key} = {getattr(self, key)} is outside [0,1)")
        if not 0 <= self.sampling_share <= 1:
            raise ValueError(f"model.sampling_share = {self.sampling_share} is outside [0,1]")
        if not 0 <= self.sampling_start < self.sampling_end <= 1:
            raise ValueError(
                f"model.sampling_start = {self.sampling_start}, model.sampling_end = "
                f"{self.sampling_end}: need 0 <= start < end <= 1"
            )
        if not 0 <= self.risk_weight < math.inf:
            raise ValueError(f"model.risk_weight = {self.risk_weight} is negative or infinite")
        if not 0 < self.risk_alpha < math.inf:
            raise ValueError(f"model.risk_alpha = {self.risk_alpha} is not positive and finite")


State: TypeAlias = "tuple[Any, ...]"
"""A decoder's state between two tokens: a tuple of tensors, or of such tuples. Row b of each tensor
belongs to sample b."""


class Memory(NamedTuple):
    """What the decoder knows of a batch of images. Row b of every tensor belongs to sample b."""

    key_BANK: Tensor
    """of all its attention layers, one after the other along A; N = 0 for a vector memory"""
    value_BANU: Tensor
    latent_BL: Tensor
    start: State


class Decoded(NamedTuple):
    """What a decoder makes of some tokens."""

    logits_BTV: Tensor
    state: State
    query_BATK: Tensor | None
    """what its last attention layer asked the grid; None for a vector memory"""


class Seq2Seq(nn.Module):
    """An encoder, its grid of features and their summary; the decoder is the subclass's.

    Such models stall with the structure of the code right and every detail a guess, because no
    query knows where to look and nothing worth seeing is found where it looks. Three things ended
    the stall early on pix2code's screens, where the details are the colours of buttons:
    colour enters as a difference from brightness, standardised (`grid.standardise`); a query
    addresses a cell by its content and, directly, by the Fourier features of its place; and a
    pooled summary of the grid, its layout kept, enters the decoder at every step.

    Scaled dot-product attention is that of Vaswani et al. (2017, arXiv:1706.03762).
    """

    def __init__(
        self,
        config: Seq2SeqConfig,
        image_channels: int,
        image_height: int,
        image_width: int,
        *,
        attention_layers: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_shape = (image_channels, image_height, image_width)
        if config.encoder == "cnn":
            stride, feature_dim = 2 ** len(config.channels), config.channels[-1]
        else:
            stride, feature_dim = backbone.STRIDE, backbone.FEATURE_DIMS[config.encoder]
        self.grid_shape = (math.ceil(image_height / stride), math.ceil(image_width / stride))
        # Constants of the size, which no checkpoint needs to hold.
        self.coordinates_1CHW = nn.Buffer(
            grid.coordinates(image_height, image_width), persistent=False
        )
        self.position_NP = nn.Buffer(grid.fourier_features(*self.grid_shape), persistent=False)
        self.pool_SN = nn.Buffer(grid.pool_matrix(*self.grid_shape), persistent=False)

        if config.encoder == "cnn":
            # Brightness, each channel's difference from it, and two channels of coordinates.
            self.encoder = grid.convolutions(image_channels + 3, config.channels)
        else:
            self.encoder = Backbone(config.encoder, image_channels)
        self.attends = config.memory == "spatial"
        if self.attends:
            self.position = nn.Linear(grid.POSITION_DIM, feature_dim)
            self.key = nn.Linear(feature_dim, attention_layers * config.hidden_dim)
            self.value = nn.Linear(feature_dim, attention_layers * config.hidden_dim)
        cells = grid.SUMMARY_ROWS * grid.SUMMARY_COLUMNS
        self.summary = nn.Linear(cells * feature_dim, config.latent_dim)
        self.num_heads = attention_layers * config.num_heads
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, image_BCHW: Tensor, token_MT: Tensor) -> Tensor:
        """Teacher-forced logits.

        Args:
            image_BCHW: float in [0,1], of the size given at construction.
            token_MT: int64 inputs, `<bos>` first, padded with 0 at the end. The decoder is
                causal, so padding changes no logits before it. M is B; or a multiple of it, k
                codes an image: row b * k + j is then one of image b, which is encoded once.

        Returns:
            logits_MTV: position t scores the token after `token_MT[:, t]`.
        """
        memory = self.encode(image_BCHW)
        codes = len(token_MT) // max(len(image_BCHW), 1)
        start = _repeat_rows(memory.start, codes) if codes > 1 else memory.start
        return self._decode(token_MT, start, _for_rows(memory, len(token_MT))).logits_BTV

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
            image_BCHW = torch.cat([grid.standardise(image_BCHW), coordinates_BCHW], dim=1)
        grid_BFHW = self.encoder(image_BCHW)
        feature_BNF = grid_BFHW.flatten(2).transpose(1, 2)
        latent_BL = self.summary((self.pool_SN @ feature_BNF).flatten(1))
        if not self.attends:
            latent_BL = self.dropout(latent_BL)
        elif self.training and self.config.latent_dropout:
            # All of it or nothing: from a half of it, the decoder could still read what it wants.
            chance_B1 = torch.rand(len(latent_BL), 1, device=latent_BL.device)
            latent_BL = latent_BL * (chance_B1 >= self.config.latent_dropout)
        start = self._start(latent_BL)
        if not self.attends:
            nothing_BANU = latent_BL.new_zeros(len(latent_BL), self.num_heads, 0, 1)
            return Memory(nothing_BANU, nothing_BANU, latent_BL, start)

        placed_BNF = feature_BNF + self.position(self.position_NP)
        content_BANK = split_heads(self.key(placed_BNF), self.num_heads)
        place_BANP = self.position_NP.expand(*content_BANK.shape[:2], -1, -1)
        return Memory(
            # The usual scale, but for the content alone: the place keeps its full gradient.
            key_BANK=torch.cat([content_BANK / content_BANK.shape[3] ** 0.5, place_BANP], dim=3),
            value_BANU=split_heads(self.value(placed_BNF), self.num_heads),
            latent_BL=latent_BL,
            start=start,
        )

    def step(self, token_B: Tensor, state: State, memory: Memory) -> tuple[Tensor, State]:
        """One token on: `logits_BV` after the int64 `token_B`, and the state that follows.

        Starts with `<bos>` and `memory.start`; equals `forward` position by position. As there,
        several rows of tokens and state in succession may be those of one image, of which the
        memory has one row.
        """
        decoded = self._decode(token_B[:, None], state, _for_rows(memory, len(token_B)))
        return decoded.logits_BTV[:, 0], decoded.state

    def attention(self, image_BCHW: Tensor, token_BT: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Where the decoder looks while it reads these tokens, by its last attention layer.

        Returns:
            attention_BATN, which sums to 1 over N, and (rows, columns) of the grid whose cells N
            counts row by row.

        Raises:
            ValueError: the model has a vector memory.
        """
        memory = self.encode(image_BCHW)
        query_BATK = self._decode(token_BT, memory.start, memory).query_BATK
        if query_BATK is None:
            raise ValueError('model.memory = "vector" has no attention to show')
        key_BANK = memory.key_BANK[:, -query_BATK.shape[1] :]
        return (query_BATK @ key_BANK.transpose(2, 3)).softmax(dim=3), self.grid_shape

    def _start(self, latent_BL: Tensor) -> State:
        """The decoder's state before the first token."""
        raise NotImplementedError

    def _decode(self, token_BT: Tensor, state: State, memory: Memory) -> Decoded:
        """Reads T tokens: one, or from `memory.start` any number of them."""
        raise NotImplementedError


def split_heads(feature_BTD: Tensor, num_heads: int) -> Tensor:
    """BxTxD to BxAxTx(D/A), as a view."""
    batch_size, length, _ = feature_BTD.shape
    return feature_BTD.view(batch_size, length, num_heads, -1).transpose(1, 2)


def attend(
    query_BATK: Tensor, key_BANK: Tensor, value_BANU: Tensor, *, is_causal: bool = False
) -> Tensor:
    """`seen_BATU`: scaled dot-product attention of queries or keys that are scaled already.

    Where there are fewer rows of keys than of queries, each is for several of these in succession.
    """
    length, together = query_BATK.shape[2], len(query_BATK) // max(len(key_BANK), 1)
    if together > 1:  # as more queries of one row: keys and values are then read once
        shape = (len(key_BANK), together, *query_BATK.shape[1:])
        query_BATK = query_BATK.reshape(shape).transpose(1, 2).flatten(2, 3)
    if length > 1:
        seen_BATU = functional.scaled_dot_product_attention(
            query_BATK, key_BANK, value_BANU, is_causal=is_causal, scale=1.0
        )
    else:
        # On a CPU the fused form copies the keys in order to scale them: for the one query of a
        # decoding step that takes four times as long as all the rest of it.
        seen_BATU = (query_BATK @ key_BANK.transpose(2, 3)).softmax(dim=3) @ value_BANU
    if together > 1:
        shape = (*seen_BATU.shape[:2], together, length, seen_BATU.shape[3])
        seen_BATU = seen_BATU.reshape(shape).transpose(1, 2).flatten(0, 1)
    return seen_BATU


def merge_heads(feature_BATU: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return feature_BATU.transpose(1, 2).flatten(2)


def sinusoids(position: Tensor, size: int) -> Tensor:
    """Sines and cosines of floating positions, `size` of them along a new last dimension.

    Their wavelengths go from 2 pi to 10000 * 2 pi in geometric steps.
    """
    half = -(-size // 2)
    place = torch.arange(half, device=position.device, dtype=position.dtype)
    phase = position[..., None] * torch.exp(place * (-math.log(10000) / half))
    return torch.cat([phase.sin(), phase.cos()], dim=-1)[..., :size]


def _for_rows(memory: Memory, num_rows: int) -> Memory:
    """With `latent_BL` repeated to that many rows; `attend` shares the others."""
    codes = num_rows // max(len(memory.latent_BL), 1)
    if codes > 1:
        memory = memory._replace(latent_BL=_repeat_rows(memory.latent_BL, codes))
    return memory


def _repeat_rows(rows: Any, times: int) -> Any:
    """Of a tensor, or a tuple of such things: every row `times` times in succession."""
    if isinstance(rows, Tensor):
        # Not `repeat_interleave`, whose gradient on CUDA adds in any order.
        return rows[:, None].expand(-1, times, *rows.shape[1:]).flatten(0, 1)
    repeated = [_repeat_rows(one, times) for one in rows]
    # A NamedTuple takes its fields one by one.
    return type(rows)(*repeated) if hasattr(rows, "_fields") else type(rows)(repeated)
