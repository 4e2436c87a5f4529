"""A decoder that is an LSTM or a GRU, and attends to the grid beside it.

Tensor names carry their shape: B batch, T token positions, V vocabulary, A attention heads,
K query and key features of a head, U value features of a head, L latent, E embedding, D hidden,
I and O what the output layer reads and mixes.
"""

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

TIME_DIM = 32
"""Features of a token's place in the code."""


class RecurrentSeq2Seq(Seq2Seq):
    """The summary of the image starts the LSTM or GRU, enters it at every step, and goes past it to
    the output, beside what multi-head attention finds. Attention does not feed back, so teacher
    forcing is one fused call.

    The state is (read_B, hidden_BD, cell_BD), a GRU's (read_B, hidden_BD): how many tokens it has
    read, int64, and the network's own.

    After "Show, Attend and Tell" (Xu et al., 2015, arXiv:1502.03044); the GRU is that of Cho et al.
    (2014, arXiv:1406.1078).
    """

    def __init__(
        self,
        config: Seq2SeqConfig,
        image_channels: int,
        image_height: int,
        image_width: int,
        vocab_size: int,
    ) -> None:
        super().__init__(config, image_channels, image_height, image_width, attention_layers=1)
        self.num_states = 2 if config.decoder == "lstm" else 1
        self.start = nn.Linear(config.latent_dim, self.num_states * config.hidden_dim)
        self.embedding = nn.Embedding(vocab_size, config.embed_dim)
        input_dim, hidden_dim = config.embed_dim + config.latent_dim, config.hidden_dim
        # Each under its own name: that is what checkpoints of LSTMs call it.
        if config.decoder == "lstm":
            self.lstm = nn.LSTM(input_dim, hidden_dim, batch_first=True)
        else:
            self.gru = nn.GRU(input_dim, hidden_dim, batch_first=True)
        known_dim = hidden_dim + config.latent_dim
        if self.attends:
            # What it writes in a row of code lies in a row of the image: by its place in the code
            # a query finds its place in the grid in a fraction of the steps that the state takes.
            query_dim = hidden_dim + config.num_heads * grid.POSITION_DIM
            self.query = nn.Linear(hidden_dim + TIME_DIM, query_dim)
            known_dim += hidden_dim
        self.combine = nn.Linear(known_dim, 2 * hidden_dim)
        self.head = nn.Linear(2 * hidden_dim, vocab_size)

    def _start(self, latent_BL: Tensor) -> State:
        parts = torch.tanh(self.start(latent_BL)).chunk(self.num_states, dim=1)
        read_B = torch.zeros(len(latent_BL), dtype=torch.int64, device=latent_BL.device)
        return (read_B, *(part_BD.contiguous() for part_BD in parts))

    def _decode(self, token_BT: Tensor, state: State, memory: Memory) -> Decoded:
        read_B, length = state[0], token_BT.shape[1]
        latent_BTL = memory.latent_BL[:, None].expand(-1, length, -1)
        embedding_BTE = self.dropout(self.embedding(token_BT))
        input_BTI = torch.cat([embedding_BTE, latent_BTL], dim=2)
        hidden_BTD, own = self._recur(input_BTI, state[1:])
        state = (read_B + length, *own)
        hidden_BTD = self.dropout(hidden_BTD)
        known, query_BATK = [hidden_BTD], None
        if self.attends:
            place_BT = read_B[:, None] + torch.arange(length, device=read_B.device)
            # Of the weights' type: under autocast the state's cannot count so far.
            time_BTD = sinusoids(place_BT.to(self.query.weight.dtype), TIME_DIM)
            query_BTD = self.query(torch.cat([hidden_BTD, time_BTD], dim=2))
            query_BATK = split_heads(query_BTD, self.num_heads)
            seen_BATU = attend(query_BATK, memory.key_BANK, memory.value_BANU)
            known.append(merge_heads(seen_BATU))
        known_BTI = torch.cat([*known, latent_BTL], dim=2)
        combined_BTO = functional.relu(self.combine(known_BTI))
        return Decoded(self.head(self.dropout(combined_BTO)), state, query_BATK)

    def _recur(self, input_BTI: Tensor, own: State) -> tuple[Tensor, State]:
        """The LSTM or GRU over `input_BTI`, from its own part of the state: what it gives out,
        (B, T, D), and that part after it.

        On a CPU it stays outside autocast: oneDNN has an LSTM in bf16 only for CPUs with AVX-512,
        and ends the run on others.
        """
        if input_BTI.is_cpu and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return self._recur(input_BTI.float(), tuple(part_BD.float() for part_BD in own))
        if self.config.decoder == "lstm":
            hidden_BTD, after = self.lstm(input_BTI, tuple(part_BD[None] for part_BD in own))
            return hidden_BTD, tuple(part_1BD[0] for part_1BD in after)
        hidden_BTD, after_1BD = self.gru(input_BTI, own[0][None])
        return hidden_BTD, (after_1BD[0],)
