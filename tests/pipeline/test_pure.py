"""The small pure modules: random keys, learning rate, metrics, state."""

import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import rng
from pipeline.config import OptimConfig
from pipeline.metrics import CODE_COLUMNS, code_metrics, code_sums, is_better, merge, psnr
from pipeline.optim import learning_rate


def test_keys_are_stable_and_tell_parts_apart() -> None:
    """Golden: the streams of released runs must not move."""
    assert rng.key(1, 2, "shards") == GOLDEN_KEY
    assert rng.permutation(rng.key(0, "test"), 8).tolist() == GOLDEN_PERMUTATION
    assert (
        len({rng.key(1, 23), rng.key(12, 3), rng.key(123), rng.key("1", 23), rng.key(1, "23")}) == 5
    )
    assert rng.key(np.int64(7), "a") == rng.key(7, "a")
    assert 0 <= rng.torch_seed(5) < 2**63


def test_seeds_hashed_together_are_those_hashed_one_by_one() -> None:
    rests = [(0, 1, 23), (0, 12, 3), (2**40, "x", -1), ()]
    seeds = rng.torch_seeds((7, "augment"), rests)
    assert seeds == [rng.torch_seed(7, "augment", *rest) for rest in rests]
    assert len(set(seeds)) == len(rests)


@given(st.integers(0, 2**128 - 1), st.integers(0, 200))
def test_permutations_are_permutations(key: int, count: int) -> None:
    assert sorted(rng.permutation(key, count).tolist()) == list(range(count))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
def test_learning_rate_warms_up_and_decays(schedule: str) -> None:
    wsd = {"decay_steps": 50} if schedule == "wsd" else {}
    config = OptimConfig(lr=2.0, warmup_steps=10, schedule=schedule, **wsd)  # type: ignore[arg-type]
    rates = [learning_rate(step, config, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0 if schedule in ("linear", "cosine") else 2.0)
    assert rates[109] == pytest.approx(
        {"constant": 2.0, "linear": 0.02, "cosine": 0.0, "wsd": 0.04}[schedule], abs=1e-3
    )


def test_one_cycle_is_torch_s() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=30, schedule="onecycle")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, total_steps=100, pct_start=0.3)
    for step in range(100):
        assert learning_rate(step, config, 100) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        if step < 99:
            theirs.step()
    short = [learning_rate(step, config, 5) for step in range(5)]
    assert short == sorted(short)
    assert 0.08 <= short[0] <= short[-1] < 0.3


@pytest.mark.parametrize("warmup_steps", [1, 2, 10])
def test_one_cycle_reaches_its_peak(warmup_steps: int) -> None:
    config = OptimConfig(lr=2.0, warmup_steps=warmup_steps, schedule="onecycle")
    rates = [learning_rate(step, config, 10) for step in range(10)]
    assert rates[warmup_steps - 1] == max(rates) == 2.0
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)


def test_learning_rate_of_a_run_shorter_than_its_warm_up_is_finite() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10)
    assert [learning_rate(step, config, 5) for step in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]


@given(st.lists(st.lists(st.floats(-1e9, 1e9), min_size=3, max_size=3), min_size=1), st.randoms())
def test_merged_sums_do_not_depend_on_the_order_of_rows(
    rows: list[list[float]], random: Random
) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert merge(rows) == merge(shuffled)


def test_code_metrics_by_hand() -> None:
    truth = [[5, 6, 7], [5, 6, 7, 8], [4]]
    guess = [[5, 6, 7], [5, 7, 8], []]
    sums = code_sums(guess, truth)
    assert dict(zip(CODE_COLUMNS, sums, strict=True)) == {
        "exact": 1.0,
        "edits": 2.0,
        "reference_tokens": 8.0,
        "positional_errors": 3 / 4 + 1.0,
        "predicted_tokens": 6.0,
        "predicted_1grams": 6.0,
        "predicted_2grams": 4.0,
        "predicted_3grams": 2.0,
        "predicted_4grams": 0.0,
        "matching_1grams": 6.0,
        "matching_2grams": 3.0,
        "matching_3grams": 1.0,
        "matching_4grams": 0.0,
    }
    assert code_metrics(3, sums) == {
        "exact_match": 1 / 3,
        "token_error_rate": 0.25,
        "positional_error": pytest.approx(1.75 / 3),
        "bleu4": 0.0,
    }


def bleu_by_the_paper(guesses: list[list[int]], truths: list[list[int]]) -> float:
    """Papineni et al., 2002, section 2.3, the slow way."""
    product = 1.0
    for n in range(1, 5):
        clipped = total = 0
        for guess, truth in zip(guesses, truths, strict=True):
            found = [guess[at : at + n] for at in range(len(guess) - n + 1)]
            wanted = [truth[at : at + n] for at in range(len(truth) - n + 1)]
            total += len(found)
            for gram in found:
                if gram in wanted:
                    wanted.remove(gram)
                    clipped += 1
        product *= (clipped / total if total else 0.0) ** 0.25
    c, r = sum(map(len, guesses)), sum(map(len, truths))
    return product * (1.0 if c > r else math.exp(1 - r / c)) if c else 0.0


codes = st.lists(st.integers(4, 6), max_size=12)


@given(st.lists(st.tuples(codes, codes), min_size=1, max_size=5), st.randoms())
def test_bleu_is_that_of_the_paper_in_any_order(
    pairs: list[tuple[list[int], list[int]]], order: Random
) -> None:
    guesses, truths = [guess for guess, _ in pairs], [truth for _, truth in pairs]
    bleu = code_metrics(len(pairs), code_sums(guesses, truths))["bleu4"]
    assert bleu == pytest.approx(bleu_by_the_paper(guesses, truths))
    rows = [code_sums([guess], [truth]) for guess, truth in pairs]
    order.shuffle(rows)
    assert code_metrics(len(pairs), merge(rows))["bleu4"] == bleu


def test_better_knows_its_direction() -> None:
    assert is_better("exact_match", 0.5, 0.4)
    assert not is_better("exact_match", 0.4, 0.4)
    assert is_better("mse", 0.4, 0.5)
    assert is_better("mse", 0.4, None)
    assert not is_better("mse", math.nan, 0.5)


def test_psnr() -> None:
    assert psnr(0.01) == pytest.approx(20.0)
    assert psnr(0.0) == math.inf
    assert psnr(math.inf) == -math.inf
    # Of a model that has diverged: no checkpoint of it may be the best.
    assert math.isnan(psnr(math.nan))
    assert not is_better("psnr_of_mean_mse", psnr(math.nan), None)


GOLDEN_KEY = 263666187971425167825063204971014364294
GOLDEN_PERMUTATION = [5, 0, 1, 2, 7, 4, 3, 6]
