"""What the loader yields: the order's samples, whoever asks, and the bytes that were packed."""

import gc
import io
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.batch import Batch, SampleError
from pipeline.order import Order, validation_batches
from pipeline.stream import (
    BatchDataset,
    BatchPlan,
    SampleReader,
    Shard,
    TrainPlans,
    ValidationPlans,
    grouped,
    make_loader,
)
from shards.format import TOKENS_EXTENSION
from shards.storage import UserError, load_manifest


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, int]:
    global_size = draw(st.sampled_from([1, 4, 6, 8]))
    return {
        "global_size": global_size,
        "micro_size": draw(st.sampled_from(divisors(global_size))),
        "lanes": draw(st.sampled_from(divisors(global_size))),
        "window": draw(st.integers(1, 20)),
        "seed": draw(st.integers(0, 99)),
    }


def shards_of(root: Path, split: str = "train") -> list[Shard]:
    return [Shard(str(root), entry) for entry in load_manifest(str(root)).splits[split]]


def train_split(root: Path) -> BatchDataset:
    reader = SampleReader(shards_of(root))
    return BatchDataset(reader, image_CHW=(3, 32, 48), with_tokens=True)


def read_keys(dataset: BatchDataset, plans: TrainPlans, workers: int) -> list[tuple[str, ...]]:
    loader = make_loader(dataset, plans, workers=workers, pin=False)
    return [batch.keys for batch in loader]


def in_groups(keys: list[tuple[str, ...]], size: int) -> list[list[tuple[str, ...]]]:
    return [keys[at : at + size] for at in range(0, len(keys), size)]


def check_one_order(
    root: Path, layout: dict[str, int], world_size: int, workers: int, shards: int, cut: int
) -> None:
    """The keys that real loaders yield, joined over ranks and over an interruption, are the
    order's. `shards` picks which shards of the split make the dataset."""
    whole = train_split(root)
    entries = [s for place, s in enumerate(whole.reader.shards) if not shards >> place & 1]
    entries = entries or list(whole.reader.shards)
    turn = shards % len(entries)
    reader = SampleReader(entries[turn:] + entries[:turn])
    dataset = BatchDataset(reader, image_CHW=whole.image_CHW, with_tokens=True)
    order = Order(reader.shard_samples, **layout)
    world_size = min(world_size, order.num_micro)
    steps = min(order.steps_per_epoch + 2, 10)
    expected = [
        [reader.key(*at) for at in zip(ids.shard_G, ids.index_G, strict=True)]
        for ids in map(order.samples_of, range(steps))
    ]
    cut %= steps + 1
    seen: list[list[str]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        micros = order.micros_of(rank, world_size)
        for start, stop, number in ((0, cut, workers), (cut, steps, max(0, workers - 1))):
            keys = read_keys(dataset, TrainPlans(order, micros, start, stop), number)
            assert len(keys) == (stop - start) * len(micros)
            for step, group in zip(range(start, stop), in_groups(keys, len(micros)), strict=True):
                seen[step] += itertools.chain(*group)
    assert seen == expected


numbers = st.integers(0, 10**6)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), world_size=st.integers(1, 6), shards=numbers, cut=numbers)
def test_any_ranks_and_interruption_see_one_order(
    screens: Path, layout: dict[str, int], world_size: int, shards: int, cut: int
) -> None:
    check_one_order(screens, layout, world_size, 0, shards, cut)


@settings(max_examples=10, deadline=None)
@given(
    layout=layouts(),
    world_size=st.integers(1, 6),
    workers=st.integers(1, 3),
    shards=numbers,
    cut=numbers,
)
def test_any_workers_see_the_same_order(
    screens: Path, layout: dict[str, int], world_size: int, workers: int, shards: int, cut: int
) -> None:
    check_one_order(screens, layout, world_size, workers, shards, cut)


def test_an_epoch_through_workers_holds_each_sample_once(screens: Path) -> None:
    dataset = train_split(screens)
    order = Order(dataset.reader.shard_samples, seed=1, global_size=6, micro_size=2, window=9)
    keys = read_keys(dataset, TrainPlans(order, range(3), 0, order.steps_per_epoch), workers=3)
    flat = list(itertools.chain(*keys))
    assert len(flat) == len(set(flat)) == order.num_samples - order.num_samples % 6


# webdataset leaves its tar files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["screens", "pictures"])
def test_plain_webdataset_reads_what_stream_reads(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Same keys, same bytes, same pixels, same tokens, in the same order."""
    root: Path = request.getfixturevalue(name)
    manifest = load_manifest(str(root))
    for split, entries in manifest.splits.items():
        dataset = BatchDataset(
            SampleReader(shards_of(root, split)),
            image_CHW=(3, 32, 48),
            with_tokens=name == "screens",
        )
        urls = [str(root / entry.name) for entry in entries]
        foreign = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        gc.collect()
        assert len(foreign) == manifest.num_samples(split)
        counts = [entry.samples for entry in entries]
        ids = next(validation_batches(counts, len(foreign)))
        batch = dataset[BatchPlan(step=0, micro=0, first_place=0, ids=ids)]
        assert batch.keys == tuple(sample["__key__"] for sample in foreign)
        assert not batch.bad
        for place, (sample, at) in enumerate(
            zip(foreign, zip(ids.shard_G, ids.index_G, strict=True), strict=True)
        ):
            members = dataset.reader.read(*at).members
            assert {k: v for k, v in sample.items() if not k.startswith("__")} == {
                extension: bytes(data) for extension, data in members.items()
            }
            if "png" in sample:
                pixels = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
                ours = batch.image_BCHW[place].permute(1, 2, 0).numpy()
                assert np.array_equal(pixels, ours)
            if TOKENS_EXTENSION in sample:
                tokens = np.load(io.BytesIO(sample[TOKENS_EXTENSION]), allow_pickle=False)
                assert batch.token_BT[place, : len(tokens)].tolist() == tokens.tolist()
                assert not batch.token_BT[place, len(tokens) :].any()


@pytest.fixture
def damaged(screens: Path, tmp_path: Path) -> Path:
    """The dataset with one bit of one training sample flipped."""
    copy = tmp_path / "damaged"
    for path in screens.rglob("*"):
        target = copy / path.relative_to(screens)
        if path.is_dir():
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    manifest = load_manifest(str(screens))
    reader = SampleReader(shards_of(screens))
    span = reader._spans(0)[3]
    with (copy / manifest.splits["train"][0].name).open("r+b") as file:
        file.seek(span.offset + span.size - 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    return copy


def batch_of(root: Path, number: int = 6) -> Batch:
    dataset = train_split(root)
    ids = next(validation_batches(dataset.reader.shard_samples, number))
    return dataset[BatchPlan(step=0, micro=0, first_place=0, ids=ids)]


def test_a_damaged_sample_keeps_its_place_with_weight_0(screens: Path, damaged: Path) -> None:
    good, bad = batch_of(screens), batch_of(damaged)
    assert bad.keys == good.keys
    assert bad.order_hash == good.order_hash
    assert bad.weight_B.tolist() == [1, 1, 1, 0, 1, 1]
    assert len(bad.bad) == 1
    assert good.keys[3] in bad.bad[0]
    assert "train/000000.tar" in bad.bad[0]
    others = [0, 1, 2, 4, 5]
    assert torch.equal(good.image_BCHW[others], bad.image_BCHW[others])


def test_a_shard_cut_short_names_the_sample(screens: Path, damaged: Path) -> None:
    entry = load_manifest(str(damaged)).splits["train"][0]
    os.truncate(damaged / entry.name, (damaged / entry.name).stat().st_size // 2)
    dataset = train_split(damaged)
    with pytest.raises(SampleError, match=r"train/000000\.tar train-\d+: the shard ends inside"):
        dataset.reader.read(0, entry.samples - 1)


def test_all_samples_of_a_missing_shard_keep_their_places(screens: Path, damaged: Path) -> None:
    entry = load_manifest(str(damaged)).splits["train"][0]
    (damaged / entry.name).unlink()
    good, bad = batch_of(screens, entry.samples + 1), batch_of(damaged, entry.samples + 1)
    assert bad.keys == good.keys
    assert bad.weight_B.tolist() == [0] * entry.samples + [1]
    assert "train/000000.tar" in bad.bad[0]
    assert "cannot be opened (No such file or directory)" in bad.bad[0]


def test_an_index_of_another_length_is_refused(damaged: Path) -> None:
    entry = load_manifest(str(damaged)).splits["train"][0]
    path = damaged / entry.index_name
    first, *lines = path.read_text().splitlines()
    assert first == f"v1.2 {entry.samples}"
    path.write_text("\n".join([f"v1.2 {entry.samples - 1}", *lines[:-1]]) + "\n")
    dataset = train_split(damaged)
    with pytest.raises(UserError, match="run `pixloom verify`"):
        dataset.reader.key(0, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 4])  # a worker is asked for two batches at once
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_before_an_index_that_is_missing_are_delivered(
    damaged: Path, size: int, workers: int
) -> None:
    first, second, *_ = load_manifest(str(damaged)).splits["train"]
    (damaged / second.index_name).unlink()
    dataset = train_split(damaged)
    plans = ValidationPlans(dataset.reader.shard_samples, size)
    batches = make_loader(dataset, plans, workers=workers, pin=False)
    seen = [key for _ in range(first.samples // size) for key in next(batches).keys]
    with pytest.raises(UserError, match=second.index_name):
        next(batches)
    assert seen == [dataset.reader.key(0, at) for at in range(first.samples // size * size)]


def test_many_shards_share_a_bounded_number_of_open_files(
    screens: Path,
) -> None:
    entries = shards_of(screens)
    reader = SampleReader(entries, open_shards=2)
    for index in range(3):
        for shard in range(len(entries)):
            reader.read(shard, index)
            assert len(reader._files) <= 2


def test_iterating_does_not_touch_the_global_random_state(screens: Path) -> None:
    dataset = train_split(screens)
    order = Order(dataset.reader.shard_samples, seed=1, global_size=4, micro_size=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loader = make_loader(dataset, TrainPlans(order, range(2), 0, 3), workers=1, pin=False)
    groups = [len(group) for group, _ in grouped(loader, 2)]
    assert groups == [2, 2, 2]
    assert torch.equal(before, torch.get_rng_state())
