"""`Loader` in a loop that is not ours: the trainer's order, and exact positions in it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import Server, put_tree

from pipeline import slots, stream
from pipeline.batch import Batch
from pipeline.cache import Node, reads_of
from pipeline.loader import Loader
from pipeline.order import Order, ShardUse
from pipeline.stream import SampleReader, Shard, TrainPlans, ValidationPlans
from shards.storage import UserError, load_manifest


def loader_of(root: Path | str, **options: Any) -> Loader:
    return Loader(str(root), **{"batch_size": 4, "window": 9, "seed": 5, **options})


def keys_of_order(root: Path, steps: range, global_size: int = 4) -> list[tuple[str, ...]]:
    """What `pixloom order` says, by the pure arithmetic."""
    entries = load_manifest(str(root)).splits["train"]
    order = Order(
        [entry.samples for entry in entries],
        seed=5, global_size=global_size, micro_size=global_size, window=9,
    )  # fmt: skip
    reader = SampleReader(Shard(str(root), entry) for entry in entries)
    found = []
    for step in steps:
        ids = order.samples_of(step)
        found.append(tuple(map(reader.key, ids.shard_G.tolist(), ids.index_G.tolist())))
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_trainer_s_over_epochs(screens: Path, workers: int) -> None:
    loader = loader_of(screens, epochs=2, workers=workers)
    assert len(loader) == loader.steps_per_epoch == 17
    batches = list(loader)
    assert [batch.keys for batch in batches] == keys_of_order(screens, range(34))
    assert (loader.step, loader.epoch) == (34, 2)
    with pytest.warns(UserWarning, match=r"epochs = 2, step 34.*one_epoch\(\)") as caught:
        assert [list(loader), list(loader)] == [[], []]
    assert [one.filename for one in caught] == [__file__]
    assert batches[0].token_BT.dtype == torch.int64
    for batch in batches:
        assert batch.image_BCHW.shape == (4, 3, 32, 48)
        assert batch.image_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert batch.weight_B.tolist() == [1, 1, 1, 1]


def test_a_worker_s_batches_are_this_process_s(screens: Path) -> None:
    here, there = (
        itertools.islice(loader_of(screens, size=(30, 20), workers=workers), 5)
        for workers in (0, 1)
    )
    for one, other in zip(here, there, strict=True):
        assert one.image_BCHW.stride() == other.image_BCHW.stride()
        for name in ("image_BCHW", "token_BT", "weight_B", "augment_key_B"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert one.order_hash == other.order_hash


def test_a_store_gives_the_batches_of_the_disk(screens: Path, tmp_path: Path, moto: Server) -> None:
    url = f"{moto.url}/loader-{os.getpid()}"
    put_tree(screens, url)
    here = Loader(screens, batch_size=4, window=9, seed=5, epochs=1)
    there = Loader(
        url, batch_size=4, window=9, seed=5, epochs=1, workers=1, cache_dir=tmp_path / "cache"
    )
    for one, other in zip(here, there, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.image_BCHW, other.image_BCHW)
        assert torch.equal(one.token_BT, other.token_BT)
        assert other.bad == ()


def test_memory_of_batches_is_used_again_but_never_while_a_tensor_looks_into_it(
    screens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [batch.image_BCHW.clone() for batch in loader_of(screens, epochs=2)]
    made = []
    new_slots = slots.Slots
    monkeypatch.setattr(stream, "Slots", lambda *sizes: made.append(new_slots(*sizes)) or made[0])
    kept = {}
    for step, batch in enumerate(loader_of(screens, epochs=2, workers=2)):
        # Every other one is kept, which are more in the end than there are slots.
        if step % 2 == 0:
            kept[step] = batch if step % 4 else batch.image_BCHW[1].numpy()
        assert torch.equal(batch.image_BCHW, expected[step])
    for step, some in kept.items():
        if isinstance(some, Batch):
            assert torch.equal(some.image_BCHW, expected[step])
        else:
            assert np.array_equal(some, expected[step][1].numpy())
    assert made[0].take() is None
    del kept, some, batch
    assert sorted(iter(made[0].take, None)) == list(range(11))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_taken_in_the_loop_goes_on_with_the_next_batch(screens: Path, workers: int) -> None:
    expected = keys_of_order(screens, range(40))
    for stop in (1, 16, 17, 25):
        first = loader_of(screens, workers=workers)
        seen = []
        for batch in first:
            seen.append(batch.keys)
            if len(seen) == stop:
                state = json.loads(json.dumps(first.state_dict()))
                break
        second = loader_of(screens, workers=2 - workers)
        second.load_state_dict(state)
        seen += [batch.keys for batch in itertools.islice(second, 5)]
        assert seen == expected[: stop + 5]


def test_an_epoch_at_a_time_and_the_rest_of_one(screens: Path) -> None:
    expected = keys_of_order(screens, range(51))
    loader = loader_of(screens)
    loader.load_state_dict({**loader.state_dict(), "step": 12})
    epochs = [[batch.keys for batch in loader.one_epoch()] for _ in range(2)]
    assert epochs == [expected[12:17], expected[17:34]]


def test_any_number_of_processes_makes_the_same_global_batches(screens: Path) -> None:
    expected = keys_of_order(screens, range(9), global_size=12)
    state = None
    for number, world_size in enumerate((1, 2, 3)):
        steps: dict[int, dict[int, tuple[str, ...]]] = {}
        states = []
        for rank in range(world_size):
            loader = loader_of(
                screens, batch_size=2, global_size=12, rank=rank, world_size=world_size
            )
            if state is not None:
                loader.load_state_dict(state)
            for batch in loader:
                steps.setdefault(batch.step, {})[batch.micro] = batch.keys
                if loader.step == 3 * number + 3:
                    break
            states.append(loader.state_dict())
        assert all(one == states[0] for one in states)
        state = states[0]
        for step in range(3 * number, 3 * number + 3):
            parts = [steps[step][micro] for micro in range(6)]
            assert tuple(itertools.chain(*parts)) == expected[step]


def test_the_global_size_is_kept_when_processes_change(screens: Path) -> None:
    state = loader_of(screens, rank=1, world_size=3).state_dict()
    assert state["global_size"] == 12
    alone = loader_of(screens)
    alone.load_state_dict(state)
    assert len(alone) == 3 * alone.steps_per_epoch
    keys = [batch.keys for batch in itertools.islice(alone, 3)]
    assert tuple(itertools.chain(*keys)) == keys_of_order(screens, range(1), global_size=12)[0]


def test_in_the_midst_of_a_step_the_state_is_its_beginning(screens: Path) -> None:
    loader = loader_of(screens, global_size=12)
    steps = [(batch.step, loader.state_dict()["step"]) for batch in itertools.islice(loader, 5)]
    assert steps == [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 6}, r"the state is of seed = 5, the loader has 6"),
        ({"window": 8}, r"window = 9, the loader has 8"),
        ({"global_size": 8}, r"global_size = 4, the loader has 8"),
        ({"batch_size": 3, "global_size": None}, r"batch_size = 3 does not divide the state's"),
        ({"lanes": 1}, r"lanes = 4, the loader has 1"),
        ({"split": "test"}, r"split = 'train', the loader has 'test'"),
        ({"rank": 0, "world_size": 2}, r"2 processes, but global_size / batch_size = 1"),
    ],
)
def test_a_state_of_another_order_is_refused(
    screens: Path, options: dict[str, Any], message: str
) -> None:
    state = {**loader_of(screens).state_dict(), "step": 2}
    other = loader_of(screens, **options)
    before = other.state_dict()
    with pytest.raises(UserError, match=message):
        other.load_state_dict(state)
    assert other.state_dict() == before
    next(iter(other))


def test_a_state_of_another_dataset_is_refused(screens: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match=r"shards: the state is of data_digest = '\w+'"):
        loader_of(pictures).load_state_dict(loader_of(screens).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "no split 'tset', but test, train, val"),
        ({"batch_size": 99}, r"the split 'train' has 68 samples"),
        ({"global_size": 6}, "batch_size = 4 does not divide global_size = 6"),
        ({"lanes": 3}, "lanes = 3 does not divide global_size = 4"),
        ({"rank": 2, "world_size": 2}, "rank = 2: with world_size = 2"),
        ({"batch_size": 0}, "batch_size = 0: must be at least 1"),
        ({"batch_size": 4.0}, "batch_size = 4.0: must be a whole number"),
        ({"global_size": 0}, "global_size = 0: must be at least 1"),
        ({"lanes": -1}, "lanes = -1: must be at least 0"),
        ({"window": 0}, "window = 0: must be at least 1"),
        ({"workers": -1}, "workers = -1: must be at least 0"),
        ({"workers": None}, "workers = None: must be a whole number"),
        ({"epochs": 0}, "epochs = 0: must be at least 1"),
        ({"seed": "5"}, "seed = '5': must be a whole number"),
        ({"cache_bytes": 1e9}, "cache_bytes = 1000000000.0: must be a whole number"),
        ({"max_bad": -1}, "max_bad = -1: must be at least 0"),
        ({"rank": -1, "world_size": 2}, "rank = -1: must be at least 0"),
        ({"world_size": 0}, "world_size = 0: must be at least 1"),
        ({"size": 224}, r"size = 224: give \(width, height\)"),
        ({"size": (224, 0)}, "size = 0: must be at least 1"),
        ({"size": (22.4, 22)}, "size = 22.4: must be a whole number"),
        ({"size": (10**5, 10**5)}, r"size = \(100000, 100000\): more than 64000000 pixels"),
        ({"size": (30, 20), "fit": "cut"}, "fit = 'cut': choose one of stretch, crop, pad"),
        ({"fit": "crop"}, r"fit = 'crop': needs size = \(width, height\)"),
        ({"weights": [1.0]}, "weights: belong to several datasets"),
        ({"weights": ["a"]}, r"weights = \['a'\]: must be numbers"),
    ],
)
def test_mistakes_are_said_in_one_line(
    screens: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        loader_of(screens, **options)
    assert "\n" not in str(caught.value)
    assert "data." not in str(caught.value)


def test_mistakes_with_several_datasets(screens: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(screens)
    for urls, weights, message in (
        ("", (), "url: is empty"),
        (None, (), "url = None: give the root"),
        ([], (), "url: is empty"),
        ([screens, ""], (), "url: is empty"),
        ([screens, str(screens)], (), "shards is there twice; give it a weight instead"),
        ([screens, other], (1,), "weights: 1 of them for 2 datasets"),
        ([screens, other], (1, 0), r"weights = \(1.0, 0.0\): each must be above 0 and finite"),
        ([screens, other], (1, 1e-9), "raise its weights, or leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            Loader(urls, batch_size=4, weights=weights)
    message = "7 samples of the split 'test', fewer than the 8 lanes; lower lanes"
    with pytest.raises(UserError, match=message):
        Loader([screens, other], batch_size=8, split="test")


def test_a_state_holds_plain_values(screens: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(screens)
    loader = Loader(
        [screens, other],
        batch_size=np.int64(4),
        seed=np.int32(5),
        window=np.int16(9),
        weights=np.array([1, 3], dtype=np.float32),
        size=tuple(np.array([30, 20])),
        epochs=np.int64(1),
    )
    next(iter(loader))
    state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert all(type(value) in (int, str, list) for value in state.values())
    plain = Loader(
        [screens, other], batch_size=4, seed=5, window=9, weights=(1, 3), size=(30, 20), epochs=1
    )
    plain.load_state_dict(state)
    assert plain.step == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"step": -1}, "the state's step = -1: must be at least 0"),
        ({"step": 1.5}, "the state's step = 1.5: must be a whole number"),
        ({"step": None}, "the state's step = None: must be a whole number"),
        ({"global_size": -4}, "the state's global_size = -4: must be at least 1"),
        ({"global_size": "4"}, "the state's global_size = '4': must be a whole number"),
        ({"version": 2}, "version 2"),
    ],
)
def test_a_state_that_is_none_is_refused(
    screens: Path, wrong: dict[str, Any], message: str
) -> None:
    loader = loader_of(screens)
    with pytest.raises(UserError, match=message):
        loader.load_state_dict({**loader.state_dict(), **wrong})
    assert loader.step == 0


def test_an_iteration_ends_with_an_error_where_the_loader_went_elsewhere(screens: Path) -> None:
    loader = loader_of(screens)
    batches = iter(loader)
    next(batches)
    loader.load_state_dict({**loader.state_dict(), "step": 9})
    with pytest.raises(RuntimeError, match="went elsewhere"):
        next(batches)
    assert loader.step == 9


def with_damage(screens: Path, copy: Path, num_bad: int) -> Path:
    """A copy in which the last samples of so many shards are cut short."""
    shutil.copytree(screens, copy)
    for entry in load_manifest(str(copy)).splits["train"][:num_bad]:
        size = (copy / entry.name).stat().st_size
        os.truncate(copy / entry.name, size - 1024 - 700)
    return copy


def test_a_damaged_sample_is_warned_of_once(screens: Path, tmp_path: Path) -> None:
    copy = with_damage(screens, tmp_path / "damaged", 1)
    loader = loader_of(copy, epochs=2, batch_size=1, max_bad=1)
    with pytest.warns(UserWarning, match="its weight is 0") as caught:
        batches = list(loader)
    assert [one.filename for one in caught] == [__file__]
    bad = [batch for batch in batches if batch.bad]
    assert len(bad) == 2
    assert [batch.weight_B.tolist() for batch in bad] == [[0], [0]]
    assert [b.keys for b in batches] == keys_of_order(screens, range(len(batches)), global_size=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_more_damaged_samples_than_max_bad_end_the_iteration(
    screens: Path, tmp_path: Path, workers: int
) -> None:
    loader = loader_of(with_damage(screens, tmp_path / "damaged", 2), max_bad=1, workers=workers)
    message = r"damaged/train/00000\d.tar \S+: .*\(2 damaged samples, max_bad allows 1\)"
    keys: list[tuple[str, ...]] = []
    weightless = pytest.warns(UserWarning, match="its weight is 0")
    with weightless as caught, pytest.raises(UserError, match=message):
        keys.extend(batch.keys for batch in loader)
    assert len(caught) == 1
    assert loader.step == len(keys)
    assert keys == keys_of_order(screens, range(len(keys)))
    with pytest.raises(UserError, match=message):
        next(iter(loader))


def test_any_number_of_damaged_samples_is_allowed_by_none_and_none_by_default(
    screens: Path, tmp_path: Path
) -> None:
    copy = with_damage(screens, tmp_path / "damaged", 3)
    with pytest.raises(UserError, match=r"\(1 damaged samples, max_bad allows 0\)"):
        list(loader_of(copy, batch_size=1, epochs=1))
    with pytest.warns(UserWarning, match="its weight is 0") as caught:
        list(loader_of(copy, max_bad=None, epochs=1))
    assert len(caught) == 3


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_images_are_floats_normalised_channels_last(
    screens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch: Batch = next(iter(loader_of(screens)))
    plain, normal = batch.images(), batch.images("cpu", mean=MEAN, std=STD)
    assert torch.equal(plain, batch.image_BCHW.float() / 255)
    exact = batch.image_BCHW.double() / 255 - torch.tensor(MEAN).double()[:, None, None]
    exact /= torch.tensor(STD).double()[:, None, None]
    assert normal.dtype == torch.float32
    assert (normal - exact).abs().max() < 2e-6
    for one in (plain, normal):
        assert one.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr("pipeline.batch._CACHED_VALUES", 1)
    assert torch.equal(batch.images("cpu", mean=MEAN, std=STD), normal)
    assert torch.equal(batch.images(), plain)
    centred = normal * torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(batch.images(mean=MEAN), centred, atol=2e-6, rtol=0)


def test_the_memory_of_images_is_used_again_when_nobody_looks_into_it(screens: Path) -> None:
    batch: Batch = next(iter(loader_of(screens)))
    images = batch.images()
    first, at = images.clone(), images.data_ptr()
    rest = images[0, :, 1:].numpy()
    del images
    others = [batch.images(mean=MEAN, std=STD) for _ in range(3)]
    assert at not in [one.data_ptr() for one in others]
    assert (torch.from_numpy(rest) == first[0, :, 1:]).all()
    del rest
    again = batch.images()
    assert again.data_ptr() == at
    assert torch.equal(again, first)


# ---- the node


@pytest.fixture
def remote(screens: Path, moto: Server) -> str:
    url = f"{moto.url}/loader-{uuid.uuid4().hex[:8]}"
    put_tree(screens, url)
    return url


def shards_named(loader: Loader, places: range) -> set[str]:
    """Hashes of the shards that the windows of these places need in the first epoch."""
    uses = loader.order.uses(0, places)
    first = itertools.takewhile(lambda use: use.first_step < loader.steps_per_epoch, uses)
    shards = loader.dataset.reader.shards
    return {shards[number].entry.sha256 for use in first for number in use.shards}


def test_plans_use_what_their_node_reads(screens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = loader_of(screens, batch_size=2, global_size=8, lanes=4).order
    lanes = [
        list(itertools.islice(order.uses(0, range(2 * lane, 2 * lane + 2)), 3)) for lane in range(4)
    ]

    def used(node: Node | None = None) -> list[ShardUse]:
        return list(itertools.islice(TrainPlans(order, range(1), 0, 99, node=node).uses(0), 3))

    assert used(Node(range(3, 4), 4, 0)) == lanes[3]
    assert TrainPlans(order, range(1), 0, 99).node == Node(range(1), 1, 0)
    for name, value in (("RANK", 2), ("WORLD_SIZE", 4), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
        monkeypatch.setenv(name, str(value))
    assert used() == lanes[2]
    assert used(Node(range(3, 4), 4, 0)) == lanes[3]
    counts = [10, 10, 10, 10]
    for node, shard in ((None, 2), (Node(range(1, 2), 4, 0), 1)):
        plans = ValidationPlans(counts, 10, 1, 4, node=node)
        assert [use.shards for use in plans.uses(0)] == [(shard,)]


@pytest.mark.parametrize(
    ("environment", "place", "node"),
    [
        ({}, (0, 1), Node(range(1), 1, 0)),
        ({}, (1, 2), Node(range(1, 2), 2, 0)),
        ({"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}, (5, 8),
         Node(range(4, 8), 8, 1)),
        ({"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}, (4, 8),
         Node(range(4, 5), 8, 0)),
        ({"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}, (0, 1),
         Node(range(1), 1, 0)),
        ({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 4}, (0, 1),
         Node(range(1), 1, 0)),
    ],
)  # fmt: skip
def test_the_node_is_the_environment_s_where_that_knows_the_rank(
    screens: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, int],
    place: tuple[int, int],
    node: Node,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    loader = loader_of(screens, batch_size=1, rank=place[0], world_size=place[1])
    made = []
    make_loader = stream.make_loader
    monkeypatch.setattr(
        "pipeline.loader.make_loader",
        lambda *words, **options: made.append(words[1]) or make_loader(*words, **options),
    )
    next(iter(loader))
    assert made[0].node == node


def test_a_rank_given_by_arguments_fetches_its_own_lanes(
    screens: Path, remote: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"rank": 1, "world_size": 2, "epochs": 1}
    loader = loader_of(remote, **options, cache_dir=tmp_path / "cache")
    here = loader_of(screens, **options)
    assert [batch.keys for batch in loader] == [batch.keys for batch in here]
    held = {path.stem for path in (tmp_path / "cache").glob("*.tar")}
    own = shards_named(loader, range(4, 8))
    read = {
        loader.dataset.reader.shards[number].entry.sha256
        for step in range(loader.steps_per_epoch)
        for number in loader.order.samples_of(step, range(4, 8)).shard_G.tolist()
    }
    assert read <= held <= own
    assert len(own) < len(loader.dataset.reader.shards)


def working_bytes(loader: Loader) -> int:
    shards = loader.dataset.reader.shards
    uses = loader.order.uses(0, range(loader.order.global_size))
    remote = [shard._replace(root="s3://bucket/data") for shard in shards]
    return reads_of(remote, uses, loader.steps_per_epoch).working_bytes


def test_a_place_other_than_the_environment_s_evicts_by_its_own_order(
    screens: Path, remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = loader_of(screens, lanes=1, epochs=2)
    expected = [batch.keys for batch in here]
    monkeypatch.setenv("WORLD_SIZE", "4")
    bound_bytes = working_bytes(here) + 20
    there = loader_of(
        remote, lanes=1, epochs=2, rank=0, world_size=1, cache_dir=tmp_path / "cache",
        cache_bytes=bound_bytes,
    )  # fmt: skip
    assert [batch.keys for batch in there] == expected
    cache = there.dataset.reader.cache
    assert cache is not None
    assert cache.held_bytes() <= bound_bytes


def test_a_cache_smaller_than_a_window_is_refused(
    screens: Path, remote: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here = loader_of(screens, batch_size=1)
    state = loader_of(screens, batch_size=1, global_size=8).state_dict()
    assert capfd.readouterr().err == ""
    options: dict[str, Any] = {"batch_size": 1, "cache_dir": tmp_path / "cache"}
    least_bytes = working_bytes(here)
    message = r"^cache_bytes = \d+, room for \d+ bytes .* or lower window or lanes$"
    with pytest.raises(UserError, match=message):
        loader_of(remote, **options, cache_bytes=least_bytes + 19)
    assert capfd.readouterr().err == ""
    loader = loader_of(remote, **options, cache_bytes=least_bytes + 20)
    assert capfd.readouterr().err.count("pixloom: node 0 reads lanes 0 to 0 of 1: 6 shards") == 1
    with pytest.raises(UserError, match=message):
        loader.load_state_dict(state)
    assert loader.order.global_size == 1
    ample = loader_of(remote, batch_size=1, cache_dir=tmp_path / "cache")
    capfd.readouterr()
    ample.load_state_dict(state)
    assert ample.order.global_size == 8
    assert capfd.readouterr().err == ""


RANK = """
import sys
from torch import distributed
from pipeline.loader import Loader
distributed.init_process_group("gloo")
loader = Loader(sys.argv[1], batch_size=4, window=9, seed=5)
batch = next(iter(loader))
open(f"{sys.argv[2]}/{loader.rank}", "w").write(" ".join(batch.keys))
distributed.barrier()  # the other rank may still be joining
distributed.destroy_process_group()
"""


def test_the_ranks_of_torch_distributed_share_a_global_batch(screens: Path, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, *words, str(screens), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    keys = [(tmp_path / str(rank)).read_text().split() for rank in range(2)]
    assert tuple(keys[0] + keys[1]) == keys_of_order(screens, range(1), global_size=8)[0]


def test_without_a_group_the_environment_says_the_rank(
    screens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        keys += next(iter(loader_of(screens))).keys
    assert tuple(keys) == keys_of_order(screens, range(1), global_size=8)[0]
