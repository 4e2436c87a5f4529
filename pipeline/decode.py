"""From images to token ids: how a trained `Seq2Seq` is read out.

Tensor names carry their shape: B batch, C channels, H height, W width, V vocabulary, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models import Seq2Seq
from shards.format import BOS, EOS, PAD


@torch.no_grad()
def greedy(model: Seq2Seq, image_BCHW: Tensor, max_tokens: int) -> list[list[int]]:
    """The likeliest next token, again and again, until `<eos>` or `max_tokens`.

    Decodes in the mode the model is in: call `model.eval()` first, or dropout blurs the result.

    Args:
        image_BCHW: float in [0,1], on the model's device.
        max_tokens: the longest code to write, `<bos>` and `<eos>` not counted, at least 1.

    Returns:
        A list of ids for every image, without `<bos>` and `<eos>`. Rows do not affect each other
        beyond the rounding of differently shaped products.
    """
    batch_size = len(image_BCHW)
    if not batch_size:
        return []
    memory = model.encode(image_BCHW)
    state = memory.start
    token_B = torch.full((batch_size,), BOS, device=image_BCHW.device)
    finished_B = torch.zeros_like(token_B, dtype=torch.bool)
    columns = []
    for _ in range(max_tokens):
        logits_BV, state = model.step(token_B, state, memory)
        token_B = logits_BV.argmax(dim=1)
        finished_B |= token_B == EOS
        if finished_B.all():
            break
        columns.append(token_B)
    if not columns:
        return [[] for _ in range(batch_size)]
    return [_until_eos(row) for row in torch.stack(columns, dim=1).tolist()]


@torch.no_grad()
def log_probabilities(
    model: Seq2Seq, image_BCHW: Tensor, codes: Sequence[Sequence[int]]
) -> list[float]:
    """How likely the model holds each code, `<eos>` behind it, to be its image's: at most 0.

    One teacher-forced pass, in the mode the model is in. `codes` have no `<bos>` and `<eos>`.
    """
    if not codes:
        return []
    rows = [torch.tensor([BOS, *code, EOS]) for code in codes]
    token_BT = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    token_BT = token_BT.to(image_BCHW.device)
    logits_BTV = model(image_BCHW, token_BT[:, :-1])
    nll_BT = functional.cross_entropy(
        logits_BTV.float().transpose(1, 2), token_BT[:, 1:], ignore_index=PAD, reduction="none"
    )
    return [-nll for nll in nll_BT.double().sum(dim=1).tolist()]


def _until_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens
