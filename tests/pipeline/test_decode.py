"""Greedy and beam search against brute force, teacher forcing and themselves, in fp64."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.decode import Hypothesis, beam_search, greedy
from pipeline.grammar import Grammar, TokenGrammar
from pipeline.models import Seq2Seq, Seq2SeqConfig, build_model
from shards import tokens
from shards.format import BOS, EOS, PAD

seeds = st.integers(0, 10_000)


def seq2seq(seed: int, vocab_size: int, scale: float = 2.0) -> Seq2Seq:
    """Random weights, large enough that samples differ, end early and repeat less. The seed
    chooses the decoder and its memory too."""
    torch.manual_seed(seed)
    config = Seq2SeqConfig(
        channels=(4, 8), embed_dim=6, latent_dim=8, hidden_dim=8, num_heads=2, dropout=0.1,
        decoder=("lstm", "gru", "transformer")[seed % 3], num_layers=2,
        memory=("spatial", "vector")[seed // 3 % 2],
    )  # fmt: skip
    model = build_model(
        config, image_channels=3, image_height=12, image_width=16, vocab_size=vocab_size
    )
    assert isinstance(model, Seq2Seq)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
        model.head.bias[EOS] += 1
    return model


def images(seed: int, batch_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch_size, 3, 12, 16, dtype=torch.float64, generator=generator)


def log_probs(model: Seq2Seq, image_1CHW: Tensor, tokens: list[int]) -> Tensor:
    """TxV, of what follows `<bos>` and each of the tokens."""
    with torch.no_grad():
        return model(image_1CHW, torch.tensor([[BOS, *tokens]]))[0].log_softmax(dim=1)


def rescored(model: Seq2Seq, image_1CHW: Tensor, one: Hypothesis) -> float:
    log_prob_TV = log_probs(model, image_1CHW, one.tokens)
    next_T = [*one.tokens, EOS] if one.finished else one.tokens
    return sum(float(log_prob_TV[at, token]) for at, token in enumerate(next_T))


def every_code(
    model: Seq2Seq, image_1CHW: Tensor, vocab_size: int, max_tokens: int
) -> list[Hypothesis]:
    """All there are, unordered; those of `max_tokens` end where `<eos>` is likeliest."""
    allowed = [token for token in range(vocab_size) if token not in (PAD, BOS, EOS)]
    found = []
    for length in range(max_tokens + 1):
        for words in itertools.product(allowed, repeat=length):
            after_V = log_probs(model, image_1CHW, list(words))[-1].clone()
            after_V[[PAD, BOS]] = -math.inf
            finished = length < max_tokens or int(after_V.argmax()) == EOS
            found.append(Hypothesis(list(words), 0.0, 0.0, finished))
    return [one._replace(score=rescored(model, image_1CHW, one)) for one in found]


@settings(max_examples=12, deadline=None)
@given(seed=seeds, alpha=st.sampled_from([0.0, 0.6, 2.0]))
def test_a_wide_beam_is_brute_force(seed: int, alpha: float) -> None:
    vocab_size, max_tokens = 6, 3  # two words and <unk>
    model, image_BCHW = seq2seq(seed, vocab_size), images(seed, 2)
    found = beam_search(model, image_BCHW, max_tokens, beam_size=40, length_penalty=alpha)
    for image_1CHW, hypotheses in zip(image_BCHW.split(1), found, strict=True):
        everything = every_code(model, image_1CHW, vocab_size, max_tokens)
        assert len(everything) == len(hypotheses) == 1 + 3 + 9 + 27
        expected = []
        for one in everything:
            scored = len(one.tokens) + one.finished
            expected.append(one._replace(rank_score=one.score / ((5 + scored) / 6) ** alpha))
        expected.sort(key=lambda one: (not one.finished, -one.rank_score))
        assert [one.tokens for one in hypotheses] == [one.tokens for one in expected]
        assert [one.finished for one in hypotheses] == [one.finished for one in expected]
        for name in ("score", "rank_score"):
            assert [getattr(one, name) for one in hypotheses] == pytest.approx(
                [getattr(one, name) for one in expected], abs=1e-9
            )


@settings(max_examples=25, deadline=None)
@given(seed=seeds, max_tokens=st.integers(1, 14), scale=st.sampled_from([0.5, 2.0, 4.0]))
def test_a_beam_of_one_is_greedy(seed: int, max_tokens: int, scale: float) -> None:
    model, image_BCHW = seq2seq(seed, 9, scale), images(seed, 7)
    found = beam_search(model, image_BCHW, max_tokens, beam_size=1)
    assert all(len(hypotheses) == 1 for hypotheses in found)
    assert [hypotheses[0].tokens for hypotheses in found] == greedy(model, image_BCHW, max_tokens)


@settings(max_examples=15, deadline=None)
@given(
    seed=seeds,
    beam_size=st.integers(1, 6),
    alpha=st.sampled_from([0.0, 0.8]),
    scale=st.sampled_from([1.0, 3.0]),
)
def test_a_batch_gives_what_one_by_one_gives(
    seed: int, beam_size: int, alpha: float, scale: float
) -> None:
    model, image_BCHW = seq2seq(seed, 9, scale), images(seed, 9)
    together = beam_search(model, image_BCHW, 16, beam_size=beam_size, length_penalty=alpha)
    for image_1CHW, hypotheses in zip(image_BCHW.split(1), together, strict=True):
        (alone,) = beam_search(model, image_1CHW, 16, beam_size=beam_size, length_penalty=alpha)
        assert [one.tokens for one in alone] == [one.tokens for one in hypotheses]
        assert [one.finished for one in alone] == [one.finished for one in hypotheses]
        assert [one.score for one in alone] == pytest.approx([one.score for one in hypotheses])


@settings(max_examples=15, deadline=None)
@given(seed=seeds, beam_size=st.integers(1, 6), max_tokens=st.integers(1, 12))
def test_scores_are_those_of_teacher_forcing(seed: int, beam_size: int, max_tokens: int) -> None:
    model, image_BCHW = seq2seq(seed, 9), images(seed, 4)
    found = beam_search(model, image_BCHW, max_tokens, beam_size=beam_size, length_penalty=0.5)
    for image_1CHW, hypotheses in zip(image_BCHW.split(1), found, strict=True):
        assert 1 <= len(hypotheses) <= beam_size
        for one in hypotheses:
            assert one.score == pytest.approx(rescored(model, image_1CHW, one), abs=1e-9)
            assert one.finished or len(one.tokens) == max_tokens
            assert not {PAD, BOS, EOS} & set(one.tokens)
        assert len({tuple(one.tokens) for one in hypotheses}) == len(hypotheses)
        ends = [one.finished for one in hypotheses]
        assert ends == sorted(ends, reverse=True)
        for finished in (True, False):
            ranks = [one.rank_score for one in hypotheses if one.finished == finished]
            assert ranks == sorted(ranks, reverse=True)


def char_tokenizer(chars: str) -> Tokenizer:
    return tokens.load_tokenizer(tokens.train_char_tokenizer(Counter(chars)), "it")


LISTS = (
    'list = "[" (item ("," item)*)? "]" ; item = "a" | "b"{2,3} | list2 ; list2 = "[" "a"* "]" ;'
)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 9999),
    max_tokens=st.integers(2, 9),
    beam_size=st.integers(1, 6),
    scale=st.sampled_from([1.0, 4.0]),
)
def test_all_that_is_written_under_a_mask_can_be_parsed(
    seed: int, max_tokens: int, beam_size: int, scale: float
) -> None:
    tokenizer = char_tokenizer("[a,b]")
    known = TokenGrammar(Grammar.parse(LISTS, "g"), tokenizer, max_tokens)
    model, image_BCHW = seq2seq(seed, tokenizer.get_vocab_size(), scale), images(seed, 5)
    codes = greedy(model, image_BCHW, max_tokens, mask=known.mask)
    found = beam_search(model, image_BCHW, max_tokens, beam_size=beam_size, mask=known.mask)
    for code, hypotheses in zip(codes, found, strict=True):
        if beam_size == 1:
            assert hypotheses[0].tokens == code
        for written in (code, *(one.tokens for one in hypotheses)):
            assert known.accepts(written)
            assert len(written) <= max_tokens
        assert all(one.finished for one in hypotheses)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 9999))
def test_a_mask_leaves_the_scores_of_what_it_lets_pass(seed: int) -> None:
    """A wide beam under a mask is a wide beam, less what the grammar does not accept."""
    tokenizer = char_tokenizer("ab")
    known = TokenGrammar(Grammar.parse('c = ("a" | "b" "a"?){1,2} ;', "g"), tokenizer, 4)
    model, image_BCHW = seq2seq(seed, tokenizer.get_vocab_size()), images(seed, 2)
    masked = beam_search(model, image_BCHW, 4, beam_size=130, mask=known.mask)
    everything = beam_search(model, image_BCHW, 4, beam_size=130)
    for some, found in zip(masked, everything, strict=True):
        expected = [
            one
            for one in found
            if known.accepts(one.tokens) and (one.finished or len(one.tokens) == 4)
        ]
        short = [one for one in some if len(one.tokens) < 4]
        assert short
        wanted = {tuple(one.tokens): one.score for one in expected if len(one.tokens) < 4}
        assert {tuple(one.tokens): one.score for one in short} == pytest.approx(wanted)


def test_a_model_that_has_diverged_is_decoded_all_the_same() -> None:
    tokenizer = char_tokenizer("[a,b]")
    known = TokenGrammar(Grammar.parse(LISTS, "g"), tokenizer, 6)
    model, image_BCHW = seq2seq(0, tokenizer.get_vocab_size()), images(0, 3)
    with torch.no_grad():
        model.head.bias.fill_(math.nan)
    assert greedy(model, image_BCHW, 6) == [[], [], []]
    assert [one[0].tokens for one in beam_search(model, image_BCHW, 6, beam_size=4)] == [[], [], []]
    masked = [
        one[0].tokens for one in beam_search(model, image_BCHW, 6, beam_size=4, mask=known.mask)
    ]
    assert all(map(known.accepts, [*masked, *greedy(model, image_BCHW, 6, mask=known.mask)]))
