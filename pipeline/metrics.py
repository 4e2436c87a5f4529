"""Metrics as sums and counts: rows per batch, merged without rounding, divided at the end.

A validation pass is a matrix, one row a batch. Ranks fill their own rows and leave zeros in the
others', so adding the matrices is exact, and `math.fsum` rounds each column once: the result does
not depend on the number of processes, to the last bit.
"""

import math
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

HIGHER_IS_BETTER = frozenset(
    {"exact_match", "token_accuracy", "bleu4", "validity", "skeleton_match"}
    | {"psnr_of_mean_mse", "mean_psnr", "ssim"}
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


_ORDERS = range(1, 5)
CODE_COLUMNS = (
    *("exact", "edits", "reference_tokens", "positional_errors", "predicted_tokens"),
    *(f"predicted_{n}grams" for n in _ORDERS),
    *(f"matching_{n}grams" for n in _ORDERS),
)


def code_sums(
    predicted: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]
) -> list[float]:
    """`CODE_COLUMNS` summed over pairs of token sequences, without <bos> and <eos>.

    `positional_errors` adds up each pair's share of places that differ, a missing or surplus
    token counting as one, over the longer of the two: the error of the pix2code paper
    (Beltramelli, 2017), which does not say what it divides by, nor published its program.
    An n-gram matches as often as it is in the reference at most.
    """
    sums = [0.0] * len(CODE_COLUMNS)
    for guess, truth in zip(predicted, reference, strict=True):
        longer = max(len(guess), len(truth))
        same = sum(a == b for a, b in zip(guess, truth, strict=False))
        grams = [(_ngrams(guess, n), _ngrams(truth, n)) for n in _ORDERS]
        values = (
            float(list(guess) == list(truth)),
            float(Levenshtein.distance(guess, truth)),
            float(len(truth)),
            (longer - same) / longer if longer else 0.0,
            float(len(guess)),
            *(float(found.total()) for found, _ in grams),
            *(float((found & wanted).total()) for found, wanted in grams),
        )
        sums = [total + value for total, value in zip(sums, values, strict=True)]
    return sums


def code_metrics(samples: float, sums: Sequence[float]) -> dict[str, float]:
    """`exact_match`, `token_error_rate` (edits a reference token), `positional_error`, `bleu4`.

    BLEU is that of Papineni et al. (2002): of the whole split, over token ids, up to four tokens
    long, one reference each, nothing smoothed: 0 where no four tokens in a row match.
    """
    exact, edits, tokens, positional, predicted, *grams = sums
    return {
        "exact_match": exact / samples,
        "token_error_rate": edits / max(tokens, 1.0),
        "positional_error": positional / samples,
        "bleu4": _bleu(predicted, tokens, grams[: len(_ORDERS)], grams[len(_ORDERS) :]),
    }


def _ngrams(tokens: Sequence[int], length: int) -> Counter[tuple[int, ...]]:
    return Counter(zip(*(tokens[start:] for start in range(length)), strict=False))


def _bleu(
    predicted: float, reference: float, found: Sequence[float], matching: Sequence[float]
) -> float:
    if not min(matching):
        return 0.0
    shares = [math.log(m / f) for m, f in zip(matching, found, strict=True)]
    brevity = min(1 - reference / predicted, 0.0)
    return math.exp(brevity + math.fsum(shares) / len(shares))


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on [0, 1] images; of NaN, NaN."""
    return math.inf if mse == 0 else -10 * math.log10(mse)
