"""A decoder that is a small Transformer.

Tensor names carry their shape: B batch, T token positions, V vocabulary, A attention heads,
K query and key features of a head, U value features of a head, L latent, E embedding, D hidden,
I what a layer reads.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models import grid
from pipeline.models.seq2seq import (
    Decoded,
    Memory,
    Seq2Seq,
    Seq2SeqConfig,
    State,
    attend,
    merge_heads,
    sinusoids,
    split_heads,
)


class Past(NamedTuple):
    """What a layer's self-attention keeps of the tokens read so far: T of them."""

    key_BATU: Tensor
    value_BATU: Tensor


class TransformerSeq2Seq(Seq2Seq):
    """Pre-norm layers of causal self-attention, attention to the grid, and a feed-forward network.

    A token enters as its embedding and the summary of the image, mixed, and the sinusoids of its
    position, which unlike learnt ones have no last. In the attention to the grid, each layer has
    its own keys and values, and its queries address a cell by content and place.

    The state is one `Past` a layer.

    "Attention Is All You Need" (Vaswani et al., 2017, arXiv:1706.03762), with the norms where
    Xiong et al. put them (2020, arXiv:2002.04745).
    """

    def __init__(
        self,
        config: Seq2SeqConfig,
        image_channels: int,
        image_height: int,
        image_width: int,
        vocab_size: int,
    ) -> None:
        super().__init__(
            config, image_channels, image_height, image_width, attention_layers=config.num_layers
        )
        self.embedding = nn.Embedding(vocab_size, config.embed_dim)
        self.enter = nn.Linear(config.embed_dim + config.latent_dim, config.hidden_dim)
        self.transformer = Layers(config)
        self.head = nn.Linear(config.hidden_dim, vocab_size)

    def _start(self, latent_BL: Tensor) -> State:
        heads, size = self.config.num_heads, self.config.hidden_dim // self.config.num_heads
        nothing_BATU = latent_BL.new_zeros(len(latent_BL), heads, 0, size)
        return (Past(nothing_BATU, nothing_BATU),) * self.config.num_layers

    def _decode(self, token_BT: Tensor, state: State, memory: Memory) -> Decoded:
        first, length = state[0].key_BATU.shape[2], token_BT.shape[1]
        latent_BTL = memory.latent_BL[:, None].expand(-1, length, -1)
        embedding_BTE = self.embedding(token_BT)
        position_T = torch.arange(
            first, first + length, device=token_BT.device, dtype=embedding_BTE.dtype
        )
        input_BTD = self.enter(torch.cat([embedding_BTE, latent_BTL], dim=2))
        input_BTD = self.dropout(input_BTD + sinusoids(position_T, self.config.hidden_dim))
        hidden_BTD, state, query_BATK = self.transformer(input_BTD, state, memory)
        return Decoded(self.head(hidden_BTD), state, query_BATK)


class Layers(nn.Module):
    """All layers, as one module: what is sharded together is gathered together."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(
        self, hidden_BTD: Tensor, state: State, memory: Memory
    ) -> tuple[Tensor, State, Tensor | None]:
        pasts, query_BATK = [], None
        grid_of = zip(
            memory.key_BANK.chunk(len(self.layers), dim=1),
            memory.value_BANU.chunk(len(self.layers), dim=1),
            strict=True,
        )
        for layer, past, (key_BANK, value_BANU) in zip(self.layers, state, grid_of, strict=True):
            hidden_BTD, past, query_BATK = layer(hidden_BTD, past, key_BANK, value_BANU)
            pasts.append(past)
        return self.norm(hidden_BTD), tuple(pasts), query_BATK


class Layer(nn.Module):
    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        size = config.hidden_dim
        self.num_heads = config.num_heads
        self.attends = config.memory == "spatial"
        self.norm_read, self.norm_think = nn.LayerNorm(size), nn.LayerNorm(size)
        self.read, self.read_out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        if self.attends:
            self.norm_look = nn.LayerNorm(size)
            self.look = nn.Linear(size, size + config.num_heads * grid.POSITION_DIM)
            self.look_out = nn.Linear(size, size)
        self.think, self.think_out = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_BTD: Tensor, past: Past, key_BANK: Tensor, value_BANU: Tensor
    ) -> tuple[Tensor, Past, Tensor | None]:
        query_BATU, key_BATU, value_BATU = (
            split_heads(part_BTD, self.num_heads)
            for part_BTD in self.read(self.norm_read(hidden_BTD)).chunk(3, dim=2)
        )
        if past.key_BATU.shape[2]:
            key_BATU = torch.cat([past.key_BATU, key_BATU], dim=2)
            value_BATU = torch.cat([past.value_BATU, value_BATU], dim=2)
        # One token may look at all before it; several are a whole prefix, each to look back.
        query_BATU = query_BATU / query_BATU.shape[3] ** 0.5
        read_BATU = attend(query_BATU, key_BATU, value_BATU, is_causal=hidden_BTD.shape[1] > 1)
        hidden_BTD = hidden_BTD + self.dropout(self.read_out(merge_heads(read_BATU)))
        query_BATK = None
        if self.attends:
            query_BATK = split_heads(self.look(self.norm_look(hidden_BTD)), self.num_heads)
            seen_BATU = attend(query_BATK, key_BANK, value_BANU)
            hidden_BTD = hidden_BTD + self.dropout(self.look_out(merge_heads(seen_BATU)))
        wide_BTI = functional.gelu(self.think(self.norm_think(hidden_BTD)))
        hidden_BTD = hidden_BTD + self.dropout(self.think_out(wide_BTI))
        return hidden_BTD, Past(key_BATU, value_BATU), query_BATK
