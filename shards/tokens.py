"""Code to token ids and back, through one Hugging Face `tokenizers` file.

Three kinds are trained here: whole words, which drop white space, and characters or byte pairs,
which give back every text as it was. The same texts, in any order, give the same file. Which they
are, those of the training split alone, is the subject of `shards.plan`.
"""

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from shards import storage
from shards.format import BOS, EOS, SPECIAL_TOKENS, UNK, FormatError, Manifest
from shards.storage import UserError

WORD, CHAR, BPE = "word", "char", "bpe"
"""The tokenizers that are trained here."""

NUM_BYTES = 256

WORD_PATTERN = r"\\[A-Za-z]+|\w[\w-]*|[^\w\s]"
"""A TeX command, a word (`btn-green` is one), or any other visible character."""

PIECE_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What one byte pair may lie in: letters with the sign before them (`\\frac`, `-green`), digits, or
signs with the line end after them (`}`). As GPT-4 splits, without its English endings; a quarter
fewer tokens for code than with GPT-2's words, which have no sign. None spells "<eos>"."""

_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\0(?P<length>..)"
    rb"\{'descr': '(?P<dtype><u[24])', 'fortran_order': False, "
    rb"'shape': \((?P<count>\d{1,12}),\), \} *\n",
    re.DOTALL,
)

_SPLIT = pre_tokenizers.Split(Regex(WORD_PATTERN), "removed", invert=True)
# The same of ASCII, in a fifth of the time.
_ASCII_WORDS = re.compile(WORD_PATTERN, re.ASCII)
_SPLIT_CHARS = pre_tokenizers.Split(Regex(r"[\s\S]"), "removed", invert=True)


def words(code: str) -> list[str]:
    """The words of `code` in order; white space separates and is dropped."""
    if code.isascii():
        return _ASCII_WORDS.findall(code)
    return [word for word, _ in _SPLIT.pre_tokenize_str(code)]


def min_vocab_size(kind: str) -> int:
    """The smallest vocabulary that a tokenizer of `kind` can have, special tokens counted."""
    return len(SPECIAL_TOKENS) + (NUM_BYTES if kind == BPE else 1)


def train_word_tokenizer(
    counts: Mapping[str, int], min_frequency: int, vocab_size: int | None = None
) -> str:
    """The `tokenizer.json` whose vocabulary is every word counted `min_frequency` times or more.

    Ids follow the special tokens, most frequent word first, equal counts in code point order; with
    `vocab_size` only as many are kept as make it, special tokens counted.
    """
    tokenizer = _new_tokenizer(counts, min_frequency, vocab_size)
    tokenizer.pre_tokenizer = _SPLIT
    return _finish(tokenizer)


def train_char_tokenizer(
    counts: Mapping[str, int], min_frequency: int = 1, vocab_size: int | None = None
) -> str:
    """The same for characters (Unicode code points): white space is kept, and so is every text
    of characters that are in the vocabulary."""
    tokenizer = _new_tokenizer(counts, min_frequency, vocab_size)
    tokenizer.pre_tokenizer = _SPLIT_CHARS
    tokenizer.decoder = decoders.Fuse()
    return _finish(tokenizer)


def train_bpe_tokenizer(texts: Iterable[str], min_frequency: int, vocab_size: int) -> str:
    """The `tokenizer.json` of byte-level byte-pair encoding: every text is kept, none has <unk>.

    After the special tokens come the 256 bytes, then pairs, most frequent first, until the
    vocabulary has `vocab_size` tokens or no pair is left that occurs `min_frequency` times. The
    order of `texts` changes nothing, nor do ties: the trainer adds up counts, and of pairs that
    are equally frequent takes the one with the smaller ids.
    """
    # The texts may come from our own worker processes: they are asked for in this thread then.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECE_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer)


def _new_tokenizer(
    counts: Mapping[str, int], min_frequency: int, vocab_size: int | None
) -> Tokenizer:
    kept = [word for word, count in counts.items() if count >= min_frequency]
    kept.sort(key=lambda word: (-counts[word], word))
    if vocab_size is not None:
        del kept[vocab_size - len(SPECIAL_TOKENS) :]
    vocabulary = {token: at for at, token in enumerate((*SPECIAL_TOKENS, *kept))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _finish(tokenizer: Tokenizer) -> str:
    bos, eos = SPECIAL_TOKENS[BOS], SPECIAL_TOKENS[EOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, BOS), (eos, EOS)]
    )
    return str(tokenizer.to_str(pretty=True)) + "\n"


def load_tokenizer(text: str, where: str) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`; `Tokenizer.decode(ids)` gives its text back.

    Raises `UserError` naming `where` when it is none, or lacks a special token at its id.
    """
    # Its threads would not survive a fork into loader workers, and one text needs none.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # The library raises plain Exception.
        raise UserError(f"{where}: not a tokenizer file ({error})") from error
    for at, token in enumerate(SPECIAL_TOKENS):
        if tokenizer.token_to_id(token) != at:
            raise UserError(f"{where}: token {token} must have id {at}; train it with `pack`")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Code that spells "<eos>" is text like any other.
    tokenizer.encode_special_tokens = True
    try:
        encode(tokenizer, "\ue000 \ue001")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # The library's panics are no Exception.
        raise UserError(f"{where}: cannot encode a word that is not in it ({error})") from error
    return tokenizer


def encode(tokenizer: Tokenizer, code: str) -> list[int]:
    """The ids of `code` between <bos> and <eos>."""
    # "Fast": without the places in the text, which are half the work.
    [encoding] = tokenizer.encode_batch_fast([code], add_special_tokens=False)
    return [BOS, *encoding.ids, EOS]


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of `ids`, which have no <bos> and <eos>; <unk> is written out.

    Words come with one space between them, all else as it was encoded. Bytes that are no UTF-8,
    as a model may predict them, become U+FFFD.
    """
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def decode_apart(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[int, str]]:
    """The text of `ids` token by token: how many tokens, and their text.

    Several are taken together only where a character's bytes are in more than one.
    """
    pieces = []
    at = 0
    while at < len(ids):
        # A character has four bytes at most; after as many tokens this one is no part of any.
        tries = ((count, decode(tokenizer, ids[at : at + count])) for count in range(1, 5))
        whole = (one for one in tries if not one[1].endswith("\ufffd"))
        count, text = next(whole, (1, decode(tokenizer, ids[at : at + 1])))
        pieces.append((count, text))
        at += count
    return pieces


def keeps_white_space(tokenizer: Tokenizer) -> bool:
    """Whether white space is in the tokens, and not merely between them."""
    return tokenizer.decoder is not None


@dataclass(frozen=True)
class TokenizerFile:
    """The tokenizer of a dataset, for samples with text alone; read at the first, once a process.

    May be used after a fork and pickled to a spawned worker.
    """

    url: str
    sha256: str

    @classmethod
    def of(cls, root: str, manifest: Manifest) -> "TokenizerFile | None":
        """That of the dataset at `root`; None for images alone."""
        entry = manifest.tokenizer
        return cls(storage.join(root, entry.file), entry.sha256) if entry is not None else None

    def load(self) -> Tokenizer:
        """The tokenizer. Raises `UserError` when the file is not the manifest's."""
        return _load_file(self.url, self.sha256)

    def encode(self, code: str) -> list[int]:
        """The ids with <bos> and <eos>. Raises like `load`."""
        return encode(self.load(), code)


@functools.lru_cache(maxsize=8)
def _load_file(url: str, sha256: str) -> Tokenizer:
    text = storage.read_text(url)
    if hashlib.sha256(text.encode()).hexdigest() != sha256:
        raise UserError(f"{url}: not the tokenizer that the manifest names; index again")
    return load_tokenizer(text, url)


def to_npy(ids: Iterable[int], vocab_size: int) -> bytes:
    """Ids as an .npy file: a vector of little-endian uint16, uint32 for 65,536 tokens or more."""
    array = np.fromiter(ids, dtype="<u2" if vocab_size <= 2**16 else "<u4")
    return _npy_header(array.dtype.str, len(array)) + array.tobytes()


@functools.lru_cache(maxsize=1024)
def _npy_header(dtype: str, count: int) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": False, "shape": (count,)}
    )
    return header.getvalue()


def from_npy(data: bytes, where: str) -> NDArray[np.unsignedinteger]:
    """The inverse of `to_npy`. Raises `FormatError` naming `where` for anything else."""
    dtype, count, start = _read_npy_header(data, where)
    return np.frombuffer(data, dtype, count, start).copy()


def count_npy(data: bytes, where: str) -> int:
    """How many ids `from_npy` would return, from the header alone. Raises like it."""
    return _read_npy_header(data, where)[1]


def _read_npy_header(data: bytes, where: str) -> tuple[np.dtype[np.unsignedinteger], int, int]:
    """Type and number of the ids, and where they start in `data`, whose length they account for.

    `np.load` would also take archives and pickles for arrays, and allocate what a header claims.
    """
    match = _NPY_HEADER.match(data)
    if match is None or match.end() - match.end("length") != int.from_bytes(
        match["length"], "little"
    ):
        raise FormatError(f"{where}: not an .npy file of token ids")
    dtype: np.dtype[np.unsignedinteger] = np.dtype(match["dtype"].decode())
    count, start = int(match["count"]), match.end()
    if len(data) - start != count * dtype.itemsize:
        raise FormatError(f"{where}: {len(data) - start} bytes are not the {count} ids it claims")
    return dtype, count, start
