"""From images to token ids: how a trained model is read out, greedily or by beam search.

Of the model it takes `encode(image_BCHW)`, a memory with the first state as `.start`, and
`step(token_B, state, memory) -> (logits_BV, state)`. Memory and state are tensors, or tuples of
such trees; dimension 0 of every tensor is the batch. `step` takes a memory of fewer rows than
tokens and state, each for several of these in succession: an image's hypotheses share its memory.

Tensor names carry their shape: B samples, K hypotheses of a sample, R = B * K rows of the model,
C channels, H height, W width, V vocabulary, T tokens, S states of a grammar.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pipeline.grammar import Mask, TokenGrammar
from shards.format import BOS, EOS, PAD

_Tree = TypeVar("_Tree")

_FULL_ENOUGH = 0.9
"""share of samples still being decoded below which the others' rows are dropped: it copies the
memory of those that stay"""


_NO_NUMBER = -1e9
"""in place of a log-probability that is NaN: a model that has diverged still gives some code"""


class Decodable(Protocol):
    """What decoding takes of a model."""

    def encode(self, image_BCHW: Tensor) -> Any: ...

    def step(self, token_B: Tensor, state: Any, memory: Any) -> tuple[Tensor, Any]: ...


class Hypothesis(NamedTuple):
    """One code that beam search found."""

    tokens: list[int]
    """without `<bos>` and `<eos>`"""
    score: float
    """log-probability of the tokens, and of `<eos>` where it is finished: a sum, at most 0"""
    rank_score: float
    """`score` over the length penalty: what the finished ones are ordered by, best first"""
    finished: bool
    """False: cut off at `max_tokens`"""


@dataclass(frozen=True)
class Decoding:
    """How codes are read out of a model: the keys of `[validate]` that say so."""

    beam: int = 1
    """hypotheses that beam search keeps; 1: greedy"""
    length_penalty: float = 0.0
    grammar: TokenGrammar | None = None
    masked: bool = True
    """whether only what the grammar takes is written"""

    def codes(self, model: Decodable, image_BCHW: Tensor, max_tokens: int) -> list[list[int]]:
        """The best code of each image, as `greedy` or `beam_search` finds it."""
        if self.beam == 1:
            return greedy(model, image_BCHW, max_tokens, mask=self._mask(image_BCHW))
        return [found[0].tokens for found in self.hypotheses(model, image_BCHW, max_tokens)]

    def hypotheses(
        self, model: Decodable, image_BCHW: Tensor, max_tokens: int
    ) -> list[list[Hypothesis]]:
        """`beam_search`, the greedy code with its score for a beam of 1."""
        return beam_search(
            model,
            image_BCHW,
            max_tokens,
            beam_size=self.beam,
            length_penalty=self.length_penalty if self.beam > 1 else 0.0,
            mask=self._mask(image_BCHW),
        )

    def _mask(self, image_BCHW: Tensor) -> Mask | None:
        if self.grammar is None or not self.masked:
            return None
        return self.grammar.mask.to(image_BCHW.device)


@torch.no_grad()
def greedy(
    model: Decodable, image_BCHW: Tensor, max_tokens: int, *, mask: Mask | None = None
) -> list[list[int]]:
    """The likeliest next token, again and again, until `<eos>` or `max_tokens`.

    Decodes in the mode the model is in: call `model.eval()` first, or dropout blurs the result.

    Args:
        image_BCHW: float in [0,1], on the model's device.
        max_tokens: the longest code to write, `<bos>` and `<eos>` not counted, at least 1.
        mask: writes only what a grammar takes, on the model's device. Its shortest code has
            `max_tokens` tokens at most.

    Returns:
        A list of ids for every image, without `<bos>` and `<eos>`, never with `<pad>`. Rows do not
        affect each other beyond the rounding of differently shaped products.
    """
    batch_size, device = len(image_BCHW), image_BCHW.device
    if not batch_size:
        return []
    sample_B = torch.arange(batch_size, device=device)
    memory = select_rows(model.encode(image_BCHW), sample_B)  # a copy, in one piece
    state = memory.start
    token_B = torch.full((batch_size,), BOS, device=device)
    place_B = torch.zeros_like(token_B)  # in the grammar
    running_B = torch.ones_like(token_B, dtype=torch.bool)
    found_BT = torch.full((batch_size, max_tokens), EOS, device=device)
    for position in range(max_tokens):
        logits_BV, state = model.step(token_B, state, memory)
        barred_BV = _barred(logits_BV, place_B, mask, max_tokens - 1 - position)
        token_B = logits_BV.masked_fill(barred_BV, -torch.inf).argmax(dim=1)
        found_BT[sample_B, position] = token_B
        running_B &= token_B != EOS
        if mask is not None:
            place_B = mask.next_SV[place_B, token_B]
        num_running = int(running_B.sum())
        if not num_running:
            break
        if num_running < _FULL_ENOUGH * len(sample_B):
            kept = running_B.nonzero()[:, 0]
            sample_B, running_B = sample_B[kept], running_B[kept]
            token_B, place_B = token_B[kept], place_B[kept]
            state, memory = select_rows(state, kept), select_rows(memory, kept)
    return [_until_eos(row) for row in found_BT.tolist()]


@torch.no_grad()
def beam_search(
    model: Decodable,
    image_BCHW: Tensor,
    max_tokens: int,
    *,
    beam_size: int,
    length_penalty: float = 0.0,
    mask: Mask | None = None,
) -> list[list[Hypothesis]]:
    """The likeliest codes of every image that a beam of `beam_size` finds, best first.

    At every token the `2 * beam_size` best continuations are looked at: `<eos>` among the first
    `beam_size` ends a hypothesis, which is set aside; the best `beam_size` of the others go on. A
    sample is done when none of these can still beat the last of `beam_size` finished ones. Codes
    of `max_tokens` tokens are finished where `<eos>` is likeliest to follow, else cut off.

    Ranks are `score / ((5 + n) / 6) ** length_penalty` for n tokens, `<eos>` counted (Wu et al.,
    2016, arXiv:1609.08144, without their coverage penalty): above 0 it favours longer codes. Equal
    ones are ordered by the rank of what they continue, then by token id. With a mask the scores
    are still the model's own log-probabilities. A beam of 1 without a length penalty is `greedy`.

    Decodes in the mode the model is in: call `model.eval()` first.

    Args:
        image_BCHW: float in [0,1], on the model's device.
        max_tokens: the longest code to write, `<bos>` and `<eos>` not counted, at least 1.
        mask: writes only what a grammar takes, on the model's device. Its shortest code has
            `max_tokens` tokens at most.

    Returns:
        At most `beam_size` hypotheses an image, at least 1: those that are finished, best first,
        then the likeliest of those cut off. Fewer where there are no more codes.
    """
    if beam_size < 1 or length_penalty < 0:
        raise ValueError(f"{beam_size=} must be at least 1, {length_penalty=} at least 0")
    batch_size, device = len(image_BCHW), image_BCHW.device
    if not batch_size:
        return []
    sample_B = torch.arange(batch_size, device=device)
    memory = select_rows(model.encode(image_BCHW), sample_B)  # a copy, in one piece
    state = select_rows(memory.start, sample_B.repeat_interleave(beam_size))
    found = _Found(batch_size, beam_size, max_tokens, device)
    token_R = torch.full((batch_size * beam_size,), BOS, device=device)
    place_R = torch.zeros_like(token_R)  # in the grammar
    written_BKT = token_R.new_zeros(batch_size, beam_size, max_tokens)
    # All hypotheses of a sample begin alike: one of them is enough.
    score_BK = torch.full((batch_size, beam_size), -torch.inf, dtype=torch.float64, device=device)
    score_BK[:, 0] = 0

    for position in range(max_tokens + 1):
        logits_RV, state = model.step(token_R, state, memory)
        if logits_RV.dtype != torch.float64:
            logits_RV = logits_RV.float()
        barred_RV = _barred(logits_RV, place_R, mask, max_tokens - 1 - position)
        log_prob_RV = logits_RV.log_softmax(dim=1)
        log_prob_RV = log_prob_RV.nan_to_num(nan=_NO_NUMBER, neginf=-torch.inf)
        log_prob_RV = log_prob_RV.masked_fill(barred_RV, -torch.inf)
        penalty = _length_penalty(position + 1, length_penalty)
        if position == max_tokens:
            ends_BK = (log_prob_RV.argmax(dim=1) == EOS).view_as(score_BK)
            ended_BK = score_BK + log_prob_RV[:, EOS].view_as(score_BK)
            ended_BK = ended_BK.masked_fill(~ends_BK, -torch.inf)
            found.add(sample_B, ended_BK, ended_BK / penalty, written_BKT)
            cut_BK = score_BK.masked_fill(ends_BK, -torch.inf)
            penalty = _length_penalty(max_tokens, length_penalty)
            found.add_cut(sample_B, cut_BK, cut_BK / penalty, written_BKT)
            break

        vocab_size = log_prob_RV.shape[1]
        candidate_BN = (score_BK[:, :, None] + log_prob_RV.view(*score_BK.shape, -1)).flatten(1)
        best_BN, index_BN = _top(candidate_BN, 2 * beam_size)
        parent_BN, next_BN = index_BN // vocab_size, index_BN % vocab_size
        ends_BN = next_BN == EOS

        ended_BK = best_BN.masked_fill(~ends_BN, -torch.inf)[:, :beam_size]
        num_B = (ended_BK != -torch.inf).sum(dim=1)
        if num_B.any():
            some = num_B.nonzero()[:, 0]
            parent_BK = parent_BN[some, :beam_size]
            tokens_BKT = _take(written_BKT[some, :, :position], parent_BK)
            found.add(sample_B[some], ended_BK[some], ended_BK[some] / penalty, tokens_BKT)

        going_BK = ends_BN.to(torch.uint8).argsort(dim=1, stable=True)[:, :beam_size]
        score_BK = best_BN.masked_fill(ends_BN, -torch.inf).gather(1, going_BK)
        parent_BK, next_BK = parent_BN.gather(1, going_BK), next_BN.gather(1, going_BK)
        # A score never rises, and is never divided by more than at the very end.
        hope_BK = score_BK / _length_penalty(max_tokens + 1, length_penalty)
        score_BK = score_BK.masked_fill(hope_BK <= found.worst(sample_B), -torch.inf)

        running_B = (score_BK != -torch.inf).any(dim=1)
        num_running = int(running_B.sum())
        if not num_running:
            break
        row_BK = torch.arange(len(sample_B), device=device)[:, None] * beam_size + parent_BK
        written_BKT[:, :, :position] = _take(written_BKT[:, :, :position], parent_BK)
        written_BKT[:, :, position] = next_BK
        if num_running < _FULL_ENOUGH * len(sample_B):
            kept = running_B.nonzero()[:, 0]
            sample_B, score_BK, written_BKT = sample_B[kept], score_BK[kept], written_BKT[kept]
            row_BK, next_BK = row_BK[kept], next_BK[kept]
            memory = select_rows(memory, kept)
        token_R, row_R = next_BK.flatten(), row_BK.flatten()
        state = select_rows(state, row_R)
        if mask is not None:
            place_R = mask.next_SV[place_R[row_R], token_R]
    return found.hypotheses()


class _Found:
    """The best finished hypotheses of every sample, and those cut off at the end."""

    def __init__(
        self, batch_size: int, beam_size: int, max_tokens: int, device: torch.device
    ) -> None:
        shape = (batch_size, beam_size)
        self.rank_BK = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self.score_BK = self.rank_BK.clone()
        self.length_BK = torch.zeros(shape, dtype=torch.int64, device=device)
        self.tokens_BKT = self.length_BK.new_zeros(*shape, max_tokens)
        self.cut: list[list[tuple[float, float, list[int]]]] = [[] for _ in range(batch_size)]

    def add(self, sample_B: Tensor, score_BK: Tensor, rank_BK: Tensor, tokens_BKT: Tensor) -> None:
        """Hypotheses of equally many tokens that ended; a rank of -inf is none."""
        length = tokens_BKT.shape[2]
        rank_BN = torch.cat([self.rank_BK[sample_B], rank_BK], dim=1)
        best_BN, order_BN = rank_BN.sort(dim=1, descending=True, stable=True)
        order_BK = order_BN[:, : rank_BK.shape[1]]
        self.rank_BK[sample_B] = best_BN[:, : rank_BK.shape[1]]
        score_BN = torch.cat([self.score_BK[sample_B], score_BK], dim=1)
        self.score_BK[sample_B] = score_BN.gather(1, order_BK)
        length_BK = self.length_BK[sample_B]
        length_BN = torch.cat([length_BK, torch.full_like(length_BK, length)], dim=1)
        self.length_BK[sample_B] = length_BN.gather(1, order_BK)
        old_BKT = self.tokens_BKT[sample_B, :, :length]
        tokens_BNT = torch.cat([old_BKT, tokens_BKT], dim=1)
        self.tokens_BKT[sample_B, :, :length] = _take(tokens_BNT, order_BK)

    def add_cut(
        self, sample_B: Tensor, score_BK: Tensor, rank_BK: Tensor, tokens_BKT: Tensor
    ) -> None:
        rows = (sample_B, score_BK, rank_BK, tokens_BKT)
        for sample, *columns in zip(*(row.tolist() for row in rows), strict=True):
            self.cut[sample] = list(zip(*columns, strict=True))

    def worst(self, sample_B: Tensor) -> Tensor:
        """Rank of the last finished hypothesis, Bx1; -inf while there are fewer."""
        return self.rank_BK[sample_B, -1:]

    def hypotheses(self) -> list[list[Hypothesis]]:
        columns = (self.score_BK, self.rank_BK, self.length_BK, self.tokens_BKT)
        rows = zip(self.cut, *(column.tolist() for column in columns), strict=True)
        hypotheses = []
        for cut, *sample in rows:
            both = [
                Hypothesis(tokens[:length], score, rank, True)
                for score, rank, length, tokens in zip(*sample, strict=True)
            ]
            both += [Hypothesis(tokens, score, rank, False) for score, rank, tokens in cut]
            both = [one for one in both if one.score != -torch.inf]
            hypotheses.append(both[: self.score_BK.shape[1]])
        return hypotheses


def select_rows(tree: _Tree, row_N: Tensor) -> _Tree:
    """The tree of tensors, with rows `row_N` of each along dimension 0."""
    if isinstance(tree, Tensor):
        return tree.index_select(0, row_N)  # type: ignore[return-value]
    assert isinstance(tree, tuple)
    parts = [select_rows(part, row_N) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)  # type: ignore[return-value]


def _barred(logits_RV: Tensor, place_R: Tensor, mask: Mask | None, num_left: int) -> Tensor:
    if mask is not None:
        return mask.barred(place_R, num_left)
    token_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    return (token_V == PAD) | (token_V == BOS)


def _length_penalty(num_tokens: int, alpha: float) -> float:
    return float(((5 + num_tokens) / 6) ** alpha)


def _top(value_BN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row and their places; of equal ones the first, and in order."""
    least_B1 = value_BN.topk(count, dim=1).values[:, -1:]
    surely_BN, maybe_BN = value_BN > least_B1, value_BN == least_B1
    room_B1 = count - surely_BN.sum(dim=1, keepdim=True)
    taken_BN = surely_BN | (maybe_BN & (maybe_BN.cumsum(dim=1) <= room_B1))
    place_BN = taken_BN.nonzero()[:, 1].view(-1, count)
    best_BN, order_BN = value_BN.gather(1, place_BN).sort(dim=1, descending=True, stable=True)
    return best_BN, place_BN.gather(1, order_BN)


def _take(tokens_BNT: Tensor, place_BK: Tensor) -> Tensor:
    return tokens_BNT.gather(1, place_BK[:, :, None].expand(-1, -1, tokens_BNT.shape[2]))


def _until_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens
