import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import tokens
from shards.format import BOS, EOS, SPECIAL_TOKENS, UNK, FormatError
from shards.storage import UserError


def train(counts: dict[str, int], min_frequency: int = 1) -> str:
    return tokens.train_word_tokenizer(counts, min_frequency)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("row {\nbtn-green,btn-red\n}", ["row", "{", "btn-green", ",", "btn-red", "}"]),
        (r"\frac{a_1}{2}", ["\\frac", "{", "a_1", "}", "{", "2", "}"]),
        ("<p class='x'>", ["<", "p", "class", "=", "'", "x", "'", ">"]),
        ("  \t\n ", []),
    ],
)
def test_words(code: str, words: list[str]) -> None:
    assert tokens.words(code) == words


def test_ids_follow_frequency_then_code_point() -> None:
    tokenizer = tokens.load_tokenizer(train({"b": 2, "a": 2, "z": 9, "rare": 1}, 2), "here")
    names = [tokenizer.id_to_token(at) for at in range(tokenizer.get_vocab_size())]
    assert names == [*SPECIAL_TOKENS, "z", "a", "b"]
    assert tokens.encode(tokenizer, "a rare z") == [BOS, 5, UNK, 4, EOS]
    assert tokenizer.decode([BOS, 5, 4, EOS]) == "a z"


def test_the_file_does_not_depend_on_the_order_of_counting() -> None:
    assert train({"a": 1, "b": 1, "c": 2}) == train({"c": 2, "b": 1, "a": 1})


def test_code_that_spells_a_special_token_is_text() -> None:
    tokenizer = tokens.load_tokenizer(train({"<": 1, "eos": 1, ">": 1}), "here")
    assert tokens.encode(tokenizer, "<eos>")[1:-1] == [4, 6, 5]


@given(st.text())
def test_every_word_of_a_text_is_in_the_vocabulary_trained_on_it(text: str) -> None:
    words = tokens.words(text)
    tokenizer = tokens.load_tokenizer(train(dict.fromkeys(words, 1)), "here")
    ids = tokens.encode(tokenizer, text)
    assert UNK not in ids
    assert len(ids) == len(words) + 2
    assert tokenizer.decode(ids) == " ".join(words)


@pytest.mark.parametrize("text", ["", "{}", "not json", '{"version": "1.0"}'])
def test_other_files_are_named(text: str) -> None:
    with pytest.raises(UserError, match=r"here\.json"):
        tokens.load_tokenizer(text, "here.json")


def test_a_tokenizer_without_the_special_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models

    other = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(UserError, match="<pad>"):
        tokens.load_tokenizer(other.to_str(), "here")


@given(st.lists(st.integers(0, 70_000)), st.sampled_from([65_536, 70_001]))
def test_npy_round_trip(ids: list[int], vocab_size: int) -> None:
    ids = [one % vocab_size for one in ids]
    data = tokens.to_npy(ids, vocab_size)
    back = tokens.from_npy(data, "here")
    assert back.tolist() == ids
    assert tokens.count_npy(data, "here") == len(ids)
    assert back.flags.writeable
    assert back.dtype == np.dtype("<u2" if vocab_size == 65_536 else "<u4")


def saved(array: np.ndarray, **options: bool) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


TWO_IDS = tokens.to_npy([1, 2], 9)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        TWO_IDS[:-1],
        TWO_IDS + b"x",
        TWO_IDS[:40],
        b"PK\x03\x04 is no archive",
        TWO_IDS.replace(b"(2,), }" + b" " * 12, b"(999999999999,), }" + b" "),
        TWO_IDS.replace(b"(2,)", b"(-2,)").replace(b"}  ", b"} "),
        TWO_IDS[:8] + b"\xff\xff" + TWO_IDS[10:],
        saved(np.zeros((2, 2), "<u2")),
        saved(np.zeros(2, "<f4")),
        saved(np.array([{}, None]), allow_pickle=True),
    ],
)
def test_other_npy_files_are_named(data: bytes) -> None:
    for read in (tokens.from_npy, tokens.count_npy):
        with pytest.raises(FormatError, match="here"):
            read(data, "here")
