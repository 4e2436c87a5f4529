"""Against exposure bias: training that shows a model its own mistakes, not true prefixes alone.

Scheduled sampling (Bengio et al., 2015, arXiv:1506.03099) in two passes (Mihaylova and Martins,
2019, arXiv:1906.07651), and minimum risk (Shen et al., 2016, arXiv:1512.02433). What the model
would write is found without gradients by the bare model, without dropout, for it is decoded without
any; the one forward pass that is differentiated is the caller's, through whatever wraps the model.

Legend of shape suffixes: B batch, C channels, H height, W width, T tokens, V vocabulary, J codes of
an image: the true one, and those found by beam search.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn
from torch.nn import functional

from pipeline.decode import beam_search
from pipeline.models import Seq2Seq, Seq2SeqConfig
from shards.format import BOS, EOS, PAD


def sampling_share(config: Seq2SeqConfig, progress: float) -> float:
    """What share of the input tokens to replace at `progress`, the part of the run that is done."""
    risen = (progress - config.sampling_start) / (config.sampling_end - config.sampling_start)
    return config.sampling_share * min(max(risen, 0.0), 1.0)


@torch.no_grad()
def sample_inputs(bare: nn.Module, image_BCHW: Tensor, input_BT: Tensor, share: float) -> Tensor:
    """`input_BT` with a share of its tokens replaced by the model's own, from true prefixes.

    The model's token is drawn from its distribution: the likeliest one is nearly always the true
    one on what was trained on, and a draw makes each mistake as often as the model believes in it.
    `<bos>`, `<eos>` and padding are neither replaced nor put in.

    Args:
        bare: called once, as in teacher forcing.
        input_BT: begins with `<bos>`.
    """
    with _evaluating(bare):
        logits_BTV = bare(image_BCHW, input_BT)
    # The largest of the logits plus Gumbel noise is a draw from their softmax.
    own_BT = (logits_BTV - torch.empty_like(logits_BTV).exponential_().log()).argmax(dim=2)
    own_BT = own_BT.roll(1, dims=1)  # what is written after one token is read as the next
    chosen_BT = torch.rand(input_BT.shape, device=input_BT.device) < share
    return torch.where(chosen_BT & (input_BT > EOS) & (own_BT > EOS), own_BT, input_BT)


class Candidates(NamedTuple):
    """Codes of each image, the true one first."""

    token_BJT: Tensor
    """int64, with `<bos>` and `<eos>`, padded"""
    edits_BJ: Tensor
    """Levenshtein distance to the true code, in tokens"""
    found_BJ: Tensor
    """bool; False for rows that stand in where the search found fewer codes"""


@torch.no_grad()
def find_candidates(
    bare: nn.Module, image_BCHW: Tensor, codes: Sequence[Sequence[int]], beam_size: int
) -> Candidates:
    """The true `codes`, and up to `beam_size` others of each image by beam search.

    Codes are token ids without `<bos>` and `<eos>`. None grows beyond the longest true one of the
    batch by more than two tokens: an untrained model would not end.
    """
    assert isinstance(bare, Seq2Seq)
    longest = max(map(len, codes)) + 2
    with _evaluating(bare):
        found = beam_search(bare, image_BCHW, longest, beam_size=beam_size)
    rows, edits, numbers = [], [], []
    for code, hypotheses in zip(codes, found, strict=True):
        others = [one.tokens for one in hypotheses if one.tokens != list(code)][:beam_size]
        numbers.append(1 + len(others))
        for one in (code, *others, *[code] * (beam_size - len(others))):
            rows.append(torch.tensor([BOS, *one, EOS]))
            edits.append(float(Levenshtein.distance(code, one)))
    token_MT = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    found_BJ = torch.arange(1 + beam_size) < torch.tensor(numbers)[:, None]
    return Candidates(
        token_BJT=token_MT.view(*found_BJ.shape, -1).to(image_BCHW.device),
        edits_BJ=torch.tensor(edits).view(found_BJ.shape).to(image_BCHW),
        found_BJ=found_BJ.to(image_BCHW.device),
    )


def expected_edits(logits_BJTV: Tensor, candidates: Candidates, alpha: float) -> Tensor:
    """`edits_B`: edits to the true code, expected over the candidates.

    Their distribution is the softmax of `alpha` times their log-probabilities. Divided by the true
    code's length this is the expected cost of Shen et al.; a sample whose cost counts as often as
    it has tokens, as all losses here do, counts with its edits.

    Args:
        logits_BJTV: of `candidates.token_BJT` without its last column, teacher-forced.
    """
    target_BJT = candidates.token_BJT[:, :, 1:]
    log_p_BJ = -functional.cross_entropy(
        logits_BJTV.flatten(0, 2), target_BJT.flatten(), ignore_index=PAD, reduction="none"
    )
    log_p_BJ = log_p_BJ.view_as(target_BJT).sum(dim=2)
    share_BJ = (alpha * log_p_BJ).masked_fill(~candidates.found_BJ, -torch.inf).softmax(dim=1)
    return (share_BJ * candidates.edits_BJ).sum(dim=1)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
