"""A predicted code beside the true one: where they differ, what is taken for what, as HTML."""

import collections
from collections.abc import Iterable, Sequence, Set

from rapidfuzz.distance import Levenshtein

from pipeline.markup import Html, join, tag

MOST_TOKENS = 800
"""of one code that are shown"""

Confusions = collections.Counter[tuple[int | None, int | None]]
"""how often (true token, predicted token) came; None where there is none on that side"""


def differing(truth: Sequence[int], guess: Sequence[int]) -> tuple[set[int], set[int]]:
    """The places of `truth`, and those of `guess`, that a shortest edit of one to the other
    touches."""
    places: tuple[set[int], set[int]] = (set(), set())
    for edit in Levenshtein.opcodes(truth, guess):
        if edit.tag != "equal":
            places[0].update(range(edit.src_start, edit.src_end))
            places[1].update(range(edit.dest_start, edit.dest_end))
    return places


def confusions(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Confusions:
    """The edits that turn each true code into its prediction, counted over (truth, guess)."""
    found: Confusions = collections.Counter()
    for truth, guess in pairs:
        for edit in Levenshtein.editops(truth, guess):
            true = truth[edit.src_pos] if edit.tag != "insert" else None
            predicted = guess[edit.dest_pos] if edit.tag != "delete" else None
            found[true, predicted] += 1
    return found


def code_block(
    texts: Sequence[str], marked: Set[int], why: str, label: str, keeps_white_space: bool
) -> Html:
    """A code by its tokens; those at the places in `marked` are marked, which `why` explains.

    Braces set the lines where white space is not in the tokens. `label` names it to readers who
    do not see it.
    """
    parts: list[object] = []
    depth = 0
    for place, text in enumerate(texts[:MOST_TOKENS]):
        if not keeps_white_space:
            depth = max(0, depth - (text == "}"))
            starts_line = place and (text == "}" or texts[place - 1] in "{}")
            if starts_line:
                parts.append("\n" + "  " * depth)
            elif place and text != ",":
                parts.append(" ")
            depth += text == "{"
        parts.append(tag("mark", text, title=why) if place in marked else text)
    if len(texts) > MOST_TOKENS:
        parts.append(f"\n... and {len(texts) - MOST_TOKENS} tokens more")
    return tag("pre", join(parts), tabindex=0, role="group", aria_label=label)


def visible(text: str) -> str:
    """A token's text by itself: white space, which would not be seen, as signs."""
    return text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5") or "\u2205"
