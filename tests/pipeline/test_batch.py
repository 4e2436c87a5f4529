"""Bytes of samples to batches: the same ones, however many threads decode."""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.batch import Batch, RawSample, SampleError, assemble
from pipeline.fit import Fit
from pipeline.loader import Loader
from pipeline.stream import decoding_threads
from pipeline.threads import Threads
from shards.storage import UserError

FIT = Fit(40, 60)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def mixed_samples(count: int) -> list[RawSample | SampleError]:
    """Every format, by both ways of decoding; some are cut short, some could not be read."""
    samples: list[RawSample | SampleError] = []
    for number in range(count):
        rng = np.random.default_rng(number)
        width, height = rng.integers(30, 200, 2)
        small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        extension, data = [
            ("jpg", encoded(image, "JPEG")),
            ("png", encoded(image, "PNG")),
            ("png", encoded(image.quantize(32), "PNG")),
            ("webp", encoded(image, "WEBP")),
            ("jpg", encoded(image, "JPEG")[:-200]),
            ("png", encoded(image, "PNG")[:-30]),
        ][number % 6]
        raw = RawSample(f"shard {number}", str(number), {extension: memoryview(data)})
        samples.append(SampleError(f"sample {number} is lost") if number % 13 == 12 else raw)
    return samples


def batch_of(samples: list[RawSample | SampleError], **options: Any) -> Batch:
    return assemble(
        iter(samples), keys=[str(place) for place in range(len(samples))],
        augment_keys=range(len(samples)), image_CHW=(3, FIT.height, FIT.width), fit=FIT,
        with_tokens=False, step=0, micro=0, first_place=0, **options,
    )  # fmt: skip


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.keys == other.keys
    assert one.bad == other.bad
    for name in ("image_BCHW", "token_BT", "weight_B", "augment_key_B"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("count", [1, 2, 7])
def test_threads_decode_the_batch_that_one_decodes(count: int) -> None:
    samples = mixed_samples(60)
    alone = batch_of(samples)
    assert 20 < len(alone.bad) < 30
    assert alone.image_BCHW[alone.weight_B > 0].float().std() > 10
    filters = list(warnings.filters)
    with contextlib.closing(Threads(count)) as threads:
        for _ in range(10):
            assert_equal(batch_of(samples, threads=threads), alone)
    assert warnings.filters == filters


def test_an_error_while_reading_waits_for_what_is_being_decoded() -> None:
    """They write into memory that the next batch will have."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8))
    sample = RawSample("shard", "key", {"jpg": memoryview(encoded(image, "JPEG"))})

    def samples() -> Iterator[RawSample]:
        yield from [sample] * 8
        raise UserError("the storage does not answer")

    memory = torch.zeros(9 * 3 * FIT.height * FIT.width, dtype=torch.uint8)
    with contextlib.closing(Threads(2)) as threads:
        with pytest.raises(UserError, match="does not answer"):
            assemble(
                samples(), keys=["key"] * 9, augment_keys=range(9), fit=FIT, with_tokens=False,
                image_CHW=(3, FIT.height, FIT.width), step=0, micro=0, first_place=0,
                memory=memory, threads=threads,
            )  # fmt: skip
        left = memory.clone()
        assert left.view(9, -1).float().mean(dim=1).gt(0).tolist() == [True] * 8 + [False]
    assert torch.equal(memory, left)


def test_the_next_value_is_taken_while_a_finished_one_is_in_use() -> None:
    taken = [threading.Event() for _ in range(4)]

    def values() -> Iterator[int]:
        for number, event in enumerate(taken):
            event.set()
            if number == 3:
                raise UserError("there is no fourth")
            yield number

    def finished(number: int) -> tuple[int, bool]:
        return number, taken[number + 1].is_set()

    with contextlib.closing(Threads(2)) as threads:
        ahead = threads.one_ahead(values(), finished)
        for number in range(3):
            assert next(ahead) == (number, False)
            assert taken[number + 1].wait(10)
            assert not any(event.is_set() for event in taken[number + 2 :])
        with pytest.raises(UserError, match="no fourth"):
            next(ahead)
        given_up = threads.one_ahead(iter(range(9)), str)
        assert next(given_up) == "0"
    assert not any(one.name.startswith("pixloom-decode") for one in threading.enumerate())


def test_a_value_that_is_long_in_coming_holds_up_none_before_it() -> None:
    """The thread that waits for it is one of those that share the work on the others."""
    coming = threading.Event()

    def values() -> Iterator[range]:
        yield range(3)
        assert coming.wait(10), "the first value was not finished"
        yield range(2)

    with contextlib.closing(Threads(2)) as threads:

        def finish(numbers: range) -> list[str]:
            return threads.map(lambda _, number: str(number), numbers)

        ahead = threads.one_ahead(values(), finish)
        assert next(ahead) == ["0", "1", "2"]
        coming.set()
        assert list(ahead) == [["0", "1"]]


def test_a_thread_alone_takes_no_value_ahead() -> None:
    taken: list[int] = []

    def values() -> Iterator[int]:
        for number in range(3):
            taken.append(number)
            yield number

    for number, finished in enumerate(Threads(1).one_ahead(values(), str)):
        assert finished == str(number)
        assert taken == list(range(number + 1))
    assert len(taken) == 3


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_loader_has_as_many_threads_as_torch_and_ends_them(screens: Path, workers: int) -> None:
    def decoding() -> int:
        return sum(thread.name.startswith("pixloom-decode") for thread in threading.enumerate())

    def batches(threads: int) -> Iterator[Batch]:
        torch.set_num_threads(threads)
        return iter(Loader(screens, batch_size=8, size=(40, 30), workers=workers, epochs=1))

    alone = list(batches(1))
    assert decoding() == 0
    numbers = set()
    for one, other in zip(batches(3), alone, strict=True):
        assert_equal(one, other)
        numbers.add(decoding())
    # Not in every batch: it may be decoded before the second of them is asked.
    assert max(numbers) == (2 if workers == 0 else 0)
    assert decoding() == 0
    given_up = batches(3)
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    assert decoding() == 0


@pytest.mark.usefixtures("torch_threads")
def test_processes_share_out_torch_s_threads() -> None:
    for threads, workers, each in ((8, 0, 8), (8, 3, 2), (8, 20, 1), (1, 0, 1), (100, 1, 8)):
        torch.set_num_threads(threads)
        assert decoding_threads(workers) == each
    torch.set_num_threads(3)
    batch_of(mixed_samples(3)).images(mean=(0.5,))
    assert torch.get_num_threads() == 3
