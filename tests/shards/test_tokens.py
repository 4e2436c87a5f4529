import io
import json
import random
from collections.abc import Iterator

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


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_those_of_the_tokenizer(text: str) -> None:
    assert tokens.words(text) == [word for word, _ in tokens._SPLIT.pre_tokenize_str(text)]


@given(st.text(alphabet="a\u00e9\u20ac\U0001f600 "), st.randoms(use_true_random=False))
def test_characters_of_several_byte_tokens_come_out_whole(text: str, rng: random.Random) -> None:
    tokenizer = tokens.load_tokenizer(
        tokens.train_bpe_tokenizer(["\u20ac\u00e9"] * 2, 2, 263), "it"
    )
    ids = tokens.encode(tokenizer, text)[1:-1]
    pieces = tokens.decode_apart(tokenizer, ids)
    assert "".join(piece for _, piece in pieces) == text
    assert sum(count for count, _ in pieces) == len(ids)
    rng.shuffle(ids)  # bytes that are no text
    pieces = tokens.decode_apart(tokenizer, ids)
    assert sum(count for count, _ in pieces) == len(ids)


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


KNOWN = "ab {}\n\t<eos>é\u3042\U0001f600\r\u2028"


@given(st.text(st.sampled_from(KNOWN)))
def test_characters_give_back_every_text_of_known_ones(text: str) -> None:
    file = tokens.train_char_tokenizer(dict.fromkeys(KNOWN, 1))
    tokenizer = tokens.load_tokenizer(file, "here")
    ids = tokens.encode(tokenizer, text)
    assert len(ids) == len(text) + 2
    assert min([*ids[1:-1], 4]) > UNK
    assert tokens.decode(tokenizer, ids[1:-1]) == text
    assert tokens.keeps_white_space(tokenizer)


def test_other_characters_are_unknown_one_by_one() -> None:
    tokenizer = tokens.load_tokenizer(tokens.train_char_tokenizer({"a": 2, "b": 1}), "here")
    ids = tokens.encode(tokenizer, "axyb")
    assert ids == [BOS, 4, UNK, UNK, 5, EOS]
    assert tokens.decode(tokenizer, ids[1:-1]) == "a<unk><unk>b"


PROGRAMS = ["row {\n  <eos> <eos>\n}\n", "row { <unk><unk> é é }", "row\r\n\t{x}{x}"] * 3
BPE_FILE = tokens.train_bpe_tokenizer(PROGRAMS, 1, 400)


@given(st.one_of(st.text(), st.sampled_from(PROGRAMS), st.text(st.sampled_from(KNOWN))))
def test_byte_pairs_give_back_every_text(text: str) -> None:
    tokenizer = tokens.load_tokenizer(BPE_FILE, "here")
    ids = tokens.encode(tokenizer, text)
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert min([*ids[1:-1], 4]) > UNK
    assert tokens.decode(tokenizer, ids[1:-1]) == text


def test_frequent_byte_pairs_are_one_token() -> None:
    tokenizer = tokens.load_tokenizer(BPE_FILE, "here")
    names = [tokenizer.id_to_token(at) for at in range(len(SPECIAL_TOKENS))]
    assert names == list(SPECIAL_TOKENS)
    assert 260 < tokenizer.get_vocab_size() <= 400
    assert len(tokens.encode(tokenizer, "row {")) == 2 + 2
    rare = tokens.load_tokenizer(tokens.train_bpe_tokenizer(["ab", "ab", "cd"], 2, 400), "here")
    assert rare.get_vocab_size() == 260 + 1
    small = tokens.load_tokenizer(tokens.train_bpe_tokenizer(PROGRAMS, 1, 260), "here")
    assert small.get_vocab_size() == 260


def test_byte_pairs_of_code_take_the_sign_before_a_word_and_the_line_end_after_one() -> None:
    code = "\\frac{a}\n.btn-green {\n<eos>\n}\n"
    tokenizer = tokens.load_tokenizer(tokens.train_bpe_tokenizer([code] * 2, 2, 400), "here")
    pieces = [
        text for _, text in tokens.decode_apart(tokenizer, tokens.encode(tokenizer, code)[1:-1])
    ]
    assert pieces == ["\\frac", "{a", "}\n", ".btn", "-green", " {\n", "<eos", ">\n", "}\n"]


# Few letters, all about equally frequent: the trainer meets ties at nearly every pair.
@given(st.lists(st.text("abc d"), max_size=12), st.randoms(use_true_random=False))
def test_the_order_of_texts_changes_no_byte_pair(texts: list[str], rng: random.Random) -> None:
    shuffled = list(texts)
    rng.shuffle(shuffled)
    first, second = (tokens.train_bpe_tokenizer(some, 1, 300) for some in (texts, shuffled))
    assert first == second


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    tokenizer = tokens.load_tokenizer(BPE_FILE, "here")
    half = tokens.encode(tokenizer, "\u3042")[1:2]
    assert tokens.decode(tokenizer, half) == "\ufffd"


def test_an_error_of_the_texts_is_raised_as_it_is() -> None:
    def texts() -> Iterator[str]:
        yield "a"
        raise UserError("gone")

    with pytest.raises(UserError, match="gone"):
        tokens.train_bpe_tokenizer(texts(), 1, 300)


def test_a_vocabulary_keeps_to_its_size() -> None:
    counts = {"a": 3, "b": 2, "c": 2, "d": 1}
    for train_some in (tokens.train_word_tokenizer, tokens.train_char_tokenizer):
        tokenizer = tokens.load_tokenizer(train_some(counts, 1, 6), "here")
        kept = [tokenizer.id_to_token(at) for at in range(tokenizer.get_vocab_size())]
        assert kept == [*SPECIAL_TOKENS, "a", "b"]


def test_a_file_over_which_the_library_panics(capfd: pytest.CaptureFixture[str]) -> None:
    body = json.loads(tokens.train_char_tokenizer({"a": 1}, 1, None))
    body["post_processor"]["single"][1] = {"Sequence": {"id": "B", "type_id": 0}}
    with pytest.raises(UserError, match="here: cannot encode"):
        tokens.load_tokenizer(json.dumps(body), "here")
    assert "panicked" in capfd.readouterr().err  # the library's own words, on stderr
