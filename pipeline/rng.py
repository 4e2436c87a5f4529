"""Every random number of a run comes from a key; a key comes from what the number is for.

Nothing here holds state. `key` names a stream, `raw_uint64` reads one whose bits are the same for
every NumPy version, `permutation` sorts by them.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def key(*parts: int | str) -> int:
    """128-bit key of a random stream: BLAKE2b over the parts, as in `key(seed, epoch, "shards")`.

    Parts are told apart by type and length, so `key(1, 23)` and `key(12, 3)` differ.
    """
    return int.from_bytes(_hash(parts).digest(), "little")


def torch_seed(*parts: int | str) -> int:
    """63-bit seed for `torch.manual_seed`, in [0, 2**63)."""
    return key(*parts) >> 65


def torch_seeds(first: Iterable[int | str], rests: Iterable[Iterable[int | str]]) -> list[int]:
    """`torch_seed(*first, *rest)` for each of `rests`; what they have in common is hashed once."""
    common = _hash(first)
    seeds = []
    for rest in rests:
        digest = common.copy()
        digest.update(_encoded(rest))
        seeds.append(int.from_bytes(digest.digest(), "little") >> 65)
    return seeds


def _hash(parts: Iterable[int | str]) -> "hashlib.blake2b":
    return hashlib.blake2b(_encoded(parts), digest_size=16, person=b"pixloom-rng")


def _encoded(parts: Iterable[int | str]) -> bytes:
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else str(int(part))
        texts.append(f"{'s' if isinstance(part, str) else 'i'}{len(text)}:{text}")
    return "".join(texts).encode()


def raw_uint64(stream_key: int, count: int) -> NDArray[np.uint64]:
    """The first `count` outputs of Philox4x64-10 under this key (Salmon et al., 2011).

    The raw stream of a bit generator is stable across NumPy versions; distributions are not.
    """
    return np.random.Philox(key=stream_key).random_raw(count)


def permutation(stream_key: int, count: int) -> NDArray[np.int64]:
    """A permutation of range(count), int64: stable argsort of the key's raw stream."""
    return np.argsort(raw_uint64(stream_key, count), kind="stable")
