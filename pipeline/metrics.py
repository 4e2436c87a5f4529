"""Metrics as sums and counts: rows per batch, merged without rounding, divided at the end.

A validation pass is a matrix, one row a batch. Ranks fill their own rows and leave zeros in the
others', so adding the matrices is exact, and `math.fsum` rounds each column once: the result does
not depend on the number of processes, to the last bit.
"""

import math
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

HIGHER_IS_BETTER = frozenset(
    {"exact_match", "token_accuracy", "psnr_of_mean_mse", "mean_psnr", "ssim"}
)


def merge(rows: Sequence[Sequence[float]]) -> list[float]:
    """Column sums of per-batch rows, each rounded once."""
    return [math.fsum(column) for column in zip(*rows, strict=True)]


def is_better(metric: str, value: float, than: float | None) -> bool:
    """Whether `value` is strictly better; anything is better than None, nothing is with NaN."""
    if math.isnan(value):
        return False
    if than is None:
        return True
    return value > than if metric in HIGHER_IS_BETTER else value < than


CODE_COLUMNS = ("exact", "edits", "reference_tokens", "positional_errors")


def code_sums(
    predicted: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]
) -> list[float]:
    """`CODE_COLUMNS` summed over pairs of token sequences, without <bos> and <eos>.

    `positional_errors` adds up each pair's share of places that differ, a missing or surplus
    token counting as one, over the longer of the two: the error of the pix2code paper
    (Beltramelli, 2017).
    """
    sums = [0.0] * len(CODE_COLUMNS)
    for guess, truth in zip(predicted, reference, strict=True):
        longer = max(len(guess), len(truth))
        same = sum(a == b for a, b in zip(guess, truth, strict=False))
        values = (
            float(list(guess) == list(truth)),
            float(Levenshtein.distance(guess, truth)),
            float(len(truth)),
            (longer - same) / longer if longer else 0.0,
        )
        sums = [total + value for total, value in zip(sums, values, strict=True)]
    return sums


def code_metrics(samples: float, sums: Sequence[float]) -> dict[str, float]:
    """`exact_match`, `token_error_rate` (edits a reference token), `positional_error`."""
    exact, edits, tokens, positional = sums
    return {
        "exact_match": exact / samples,
        "token_error_rate": edits / max(tokens, 1.0),
        "positional_error": positional / samples,
    }


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on [0, 1] images."""
    return -10 * math.log10(mse) if mse > 0 else math.inf
