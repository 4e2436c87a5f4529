"""Bytes of samples to one batch: uint8 images, padded tokens, weights.

Images stay uint8 until they are on the device; conversion and augmentation happen there
(`pipeline.tasks`). A sample that cannot be read or decoded keeps its place with weight 0, so that
damage never shifts the order.

Legend of shape suffixes: B batch, C channels, H height, W width, T tokens (with <bos>, <eos>).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.order import sample_hash
from shards import images, tokens
from shards.format import PAD, TOKENS_EXTENSION, code_extension, image_extension


class SampleError(Exception):
    """A sample's bytes are not what its shard's receipt says; the message names shard and key."""


@dataclass(frozen=True)
class RawSample:
    """A sample's members by extension; `where` names shard and key for messages."""

    where: str
    key: str
    members: dict[str, memoryview]


@dataclass(frozen=True)
class Batch:
    """One forward pass of samples."""

    image_BCHW: Tensor
    """uint8"""
    token_BT: Tensor
    """int64, padded with <pad>; T = 0 for images alone"""
    weight_B: Tensor
    """float32; 0 for a sample that could not be read, else 1"""
    augment_key_B: Tensor
    """int64 in [0, 2**63), of (seed, epoch, sample)"""
    keys: tuple[str, ...]
    step: int
    micro: int
    first_place: int
    """place of the first sample in the global batch"""
    bad: tuple[str, ...]
    """one line for each sample with weight 0: shard, key, cause"""

    @property
    def order_hash(self) -> int:
        """Sum of `sample_hash` over the samples, modulo 2**64."""
        places = range(self.first_place, self.first_place + len(self.keys))
        return sum(map(sample_hash, places, self.keys)) % 2**64

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by the `DataLoader` on CUDA machines."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return dataclasses.replace(
            self,
            image_BCHW=function(self.image_BCHW),
            token_BT=function(self.token_BT),
            weight_B=function(self.weight_B),
            augment_key_B=function(self.augment_key_B),
        )


def assemble(
    samples: Sequence[RawSample | SampleError],
    *,
    keys: Sequence[str],
    augment_keys: Sequence[int],
    image_CHW: tuple[int, int, int],
    with_tokens: bool,
    tokenizer: tokens.TokenizerFile | None = None,
    step: int,
    micro: int,
    first_place: int,
) -> Batch:
    """Decodes and stacks samples. A `SampleError` in `samples` stands for an unreadable one."""
    channels, height, width = image_CHW
    pixels: list[NDArray[np.uint8]] = []
    token_ids: list[Tensor] = []
    weights: list[float] = []
    bad: list[str] = []
    for sample in samples:
        try:
            if isinstance(sample, SampleError):
                raise sample
            image_HWC = decode(sample, channels)
            if image_HWC.shape != (height, width, channels):
                raise ValueError(
                    f"HxWxC {image_HWC.shape}, the manifest says {(height, width, channels)}"
                )
            empty = torch.empty(0, dtype=torch.int64)
            token = read_tokens(sample, tokenizer) if with_tokens else empty
            weight = 1.0
        except (SampleError, images.ImageRefused, ValueError, KeyError) as error:
            text = " ".join(str(error).split())
            bad.append(f"{sample.where}: {text}" if isinstance(sample, RawSample) else text)
            image_HWC = np.zeros((height, width, channels), dtype=np.uint8)
            token = torch.full((2,) if with_tokens else (0,), PAD)
            weight = 0.0
        pixels.append(image_HWC)
        token_ids.append(token)
        weights.append(weight)
    return Batch(
        # A view of (B, H, W, C): channels last in memory, as the models like it, with one copy.
        image_BCHW=torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2),
        token_BT=torch.nn.utils.rnn.pad_sequence(token_ids, batch_first=True, padding_value=PAD),
        weight_B=torch.tensor(weights, dtype=torch.float32),
        augment_key_B=torch.tensor(augment_keys, dtype=torch.int64),
        keys=tuple(keys),
        step=step,
        micro=micro,
        first_place=first_place,
        bad=tuple(bad),
    )


def decode(sample: RawSample, channels: int) -> NDArray[np.uint8]:
    """The image as uint8 (H, W, C). Raises `ImageRefused`, or KeyError when there is none."""
    extension = image_extension(sample.members)
    if extension is None:
        raise KeyError(f"no image among its members {', '.join(sample.members)}")
    return images.decode(bytes(sample.members[extension]), channels)


def read_tokens(sample: RawSample, tokenizer: tokens.TokenizerFile | None = None) -> Tensor:
    """The token ids as int64 (T), with <bos> and <eos>; without ids, of the text by `tokenizer`.

    Raises ValueError or KeyError for the sample, `UserError` for the tokenizer.
    """
    code = code_extension(sample.members)
    if TOKENS_EXTENSION not in sample.members and code is not None and tokenizer is not None:
        text = bytes(sample.members[code]).decode("utf-8-sig")
        return torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    ids = tokens.from_npy(bytes(sample.members[TOKENS_EXTENSION]), sample.where)
    return torch.from_numpy(ids.astype(np.int64))
