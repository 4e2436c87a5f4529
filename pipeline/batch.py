"""Bytes of samples to one batch: uint8 images, padded tokens, weights.

Images stay uint8 until they are on the device; conversion and augmentation happen there
(`pipeline.tasks`). A sample that cannot be read or decoded keeps its place with weight 0, so that
damage never shifts the order.

Legend of shape suffixes: B batch, C channels, H height, W width, R values of a row (W times C),
T tokens (with <bos>, <eos>).
"""

import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.fit import Fit, decode_fitted
from pipeline.order import sample_hash
from pipeline.threads import Threads
from shards import images, tokens
from shards.format import PAD, TOKENS_EXTENSION, code_extension, image_extension

_CACHED_VALUES = 2**21
"""float32, 8 MB: what a processor's cache holds. With less, Python's lock, which a reading thread
wants too, is taken more often."""
_SMALL_DTYPES = torch.int64, torch.float32, torch.int64
"""of tokens, weights and keys of augmentation"""
_MAX_FREE = 2
"""Batches whose memory is kept: one is used while the next one is made."""


class SampleError(Exception):
    """A sample's bytes are not what its shard's receipt says; the message names shard and key."""


class RawSample(NamedTuple):
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
    bad_names: tuple[str, ...] = ()
    """of the same samples, by their places in the split: the same wherever the dataset lies"""

    @property
    def order_hash(self) -> int:
        """Sum of `sample_hash` over the samples, modulo 2**64."""
        places = range(self.first_place, self.first_place + len(self.keys))
        return sum(map(sample_hash, places, self.keys)) % 2**64

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from where a GPU reads without anybody's help."""
        return self._map(Tensor.pin_memory)

    def images(
        self,
        device: torch.device | str | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Tensor:
        """The images as float32 (B, C, H, W) on a device, channels last in memory.

        In [0, 1]; with `mean` and `std`, a value a channel in these units, less the mean and
        divided by the standard deviation. The uint8 images are moved, and converted there.
        """
        image_BCHW = self.image_BCHW.to(device or self.image_BCHW.device, non_blocking=True)
        image_BHWC = image_BCHW.permute(0, 2, 3, 1)
        batch, height, width, channels = image_BHWC.shape
        image_BHR = image_BHWC.flatten(2)
        scale_R = shift_R = None
        if mean is not None or std is not None:
            mean, std = (0.0,) if mean is None else mean, (1.0,) if std is None else std
            size = (width, channels)
            scale_R, shift_R = _scale_and_shift(tuple(mean), tuple(std), size, image_BHR.device)
        # A few at a time on a CPU: what was converted is still in its cache when it is scaled.
        on_cpu = image_BHR.device.type == "cpu"
        if on_cpu:
            float_BHR = _floats.take(image_BHR.shape)
            few = max(1, _CACHED_VALUES // (height * width * channels))
        else:
            shape, device = image_BHR.shape, image_BHR.device
            float_BHR = torch.empty(shape, dtype=torch.float32, device=device)
            few = batch
        with _one_thread() if on_cpu else contextlib.nullcontext():
            for floats_BHR, images_BHR in zip(
                torch.split(float_BHR, few), torch.split(image_BHR, few), strict=True
            ):
                floats_BHR.copy_(images_BHR)
                if scale_R is None or shift_R is None:
                    floats_BHR.div_(255)
                else:
                    torch.addcmul(shift_R, floats_BHR, scale_R, out=floats_BHR)
        return float_BHR.view(image_BHWC.shape).permute(0, 3, 1, 2)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        # From a worker, a tensor travels as a descriptor of shared memory, and an array with names
        # that are looked up; both cost more than a few numbers do. The images go that way alone.
        small = self.token_BT, self.weight_B, self.augment_key_B
        numbers = [tensor.numpy().tobytes() for tensor in small]
        rest = (self.keys, self.step, self.micro, self.first_place, self.bad, self.bad_names)
        return _unpickled, (self.image_BCHW.permute(0, 2, 3, 1), numbers, rest)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return dataclasses.replace(
            self,
            image_BCHW=function(self.image_BCHW),
            token_BT=function(self.token_BT),
            weight_B=function(self.weight_B),
            augment_key_B=function(self.augment_key_B),
        )


def assemble(
    samples: Iterable[RawSample | SampleError],
    *,
    keys: Sequence[str],
    augment_keys: Sequence[int],
    image_CHW: tuple[int, int, int],
    fit: Fit | None = None,
    with_tokens: bool,
    tokenizer: tokens.TokenizerFile | None = None,
    step: int,
    micro: int,
    first_place: int,
    memory: Tensor | None = None,
    threads: Threads | None = None,
) -> Batch:
    """Decodes samples into one batch. A `SampleError` in `samples` stands for an unreadable one.

    Args:
        fit: of the height and width of `image_CHW`; without one, images must be of that size.
        memory: uint8, at least as many as the images have. They are decoded into it.
        threads: that decode; default: this one alone.
    """
    channels, height, width = image_CHW
    shape_BHWC = len(keys), height, width, channels
    if memory is None:
        image_BHWC = _pixels.take(shape_BHWC)
    else:
        image_BHWC = memory[: math.prod(shape_BHWC)].view(shape_BHWC)
    pixels_BHWC = image_BHWC.numpy()

    def decode(place: int, sample: RawSample | SampleError) -> tuple[Tensor, str]:
        """Token ids, and what is wrong with the sample, if anything is."""
        try:
            if isinstance(sample, SampleError):
                raise sample
            decode_into(pixels_BHWC[place], sample, fit)
            if not with_tokens:
                return torch.empty(0, dtype=torch.int64), ""
            return read_tokens(sample, tokenizer), ""
        except (SampleError, images.ImageRefused, ValueError, KeyError) as error:
            text = " ".join(str(error).split())
            pixels_BHWC[place] = 0
            nothing = torch.full((2,) if with_tokens else (0,), PAD)
            return nothing, f"{sample.where}: {text}" if isinstance(sample, RawSample) else text

    decoded = (threads or Threads(1)).map(decode, samples)
    return Batch(
        # A view of (B, H, W, C): channels last in memory, as the models like it.
        image_BCHW=image_BHWC.permute(0, 3, 1, 2),
        token_BT=torch.nn.utils.rnn.pad_sequence(
            [token for token, _ in decoded], batch_first=True, padding_value=PAD
        ),
        weight_B=torch.tensor([not wrong for _, wrong in decoded], dtype=torch.float32),
        augment_key_B=torch.tensor(augment_keys, dtype=torch.int64),
        keys=tuple(keys),
        step=step,
        micro=micro,
        first_place=first_place,
        bad=tuple(wrong for _, wrong in decoded if wrong),
    )


def decode_into(out_HWC: NDArray[np.uint8], sample: RawSample, fit: Fit | None) -> None:
    """Decodes a sample's image into `out_HWC`, uint8.

    Raises:
        ImageRefused: the image is damaged.
        KeyError: there is none.
        ValueError: it has another size, and there is no `fit`.
    """
    extension = image_extension(sample.members)
    if extension is None:
        raise KeyError(f"no image among its members {', '.join(sample.members)}")
    data = bytes(sample.members[extension])
    if fit is not None:
        decode_fitted(data, fit, out_HWC)
        return
    image_HWC = images.decode(data, out_HWC.shape[2], out=out_HWC)
    if image_HWC is not out_HWC:
        raise ValueError(f"HxWxC {image_HWC.shape}, the manifest says {out_HWC.shape}")


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


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Where loader workers keep all cores busy, the threads of an operation wait for each other in
    loops that take the cores from the workers: ten times longer than one thread needs."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


@functools.lru_cache(maxsize=4)
def _scale_and_shift(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    size: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """What uint8 values are multiplied by, and what is then added, along a row of (W, C) values.

    Of a row, not a value a channel: channels are last in memory, and along three values nothing is
    vectorised. Four times faster on a CPU.
    """
    scale_C = torch.tensor(std).mul(255).reciprocal()
    shift_C = torch.tensor(mean).mul(-255).mul(scale_C)
    return (
        scale_C.to(device).expand(size).flatten(),
        shift_C.to(device).expand(size).flatten(),
    )


def lend(array: NDArray[Any], give_back: Callable[[], None]) -> Tensor:
    """A tensor of the array's memory; `give_back` is called when all views of it are gone."""
    # A tensor made from an array holds on to it until nothing looks into its storage.
    lent = array[:]
    weakref.finalize(lent, give_back).atexit = False
    return torch.from_numpy(lent)


class _Memory:
    """Memory of batches that nobody looks into any more, for the next ones. Fresh memory costs a
    page fault for every 4 KiB: for floats, together more than what is written there."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype = dtype
        self._free: dict[int, list[NDArray[Any]]] = {}
        """By size; of the one that was asked for last."""

    def take(self, shape: Sequence[int]) -> Tensor:
        """A tensor of `shape`, not initialised. Its memory comes back when all views are gone."""
        size = math.prod(shape)
        if size not in self._free:
            self._free = {size: []}
        try:
            array = self._free[size].pop()
        except (IndexError, KeyError):  # another thread may have come first
            array = np.empty(size, self._dtype)
        return lend(array, functools.partial(self._give_back, array)).view(*shape)

    def _give_back(self, array: NDArray[Any]) -> None:
        free = self._free.get(array.size)
        if free is not None and len(free) < _MAX_FREE:
            free.append(array)


_pixels = _Memory(np.uint8)
_floats = _Memory(np.float32)


def new_shared(size: int) -> Tensor:
    """uint8 (size) in shared memory, not initialised."""
    # What PyTorch's collate function calls; the public way writes to every page.
    new: Callable[..., torch.UntypedStorage] = torch.UntypedStorage._new_shared
    return torch.empty(0, dtype=torch.uint8).set_(new(size))


def _unpickled(image_BHWC: Tensor, numbers: list[bytes], rest: tuple[Any, ...]) -> Batch:
    token, weight_B, augment_key_B = map(_from_bytes, numbers, _SMALL_DTYPES)
    batch = len(weight_B)
    token_BT = token.view(batch, len(token) // batch)
    return Batch(image_BHWC.permute(0, 3, 1, 2), token_BT, weight_B, augment_key_B, *rest)


def _from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    # Of a copy, which may be written to; PyTorch refuses an empty one.
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
