"""Several datasets in one order: exact shares, each with its own epochs, the same for everyone."""

import contextlib
import itertools
import json
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import build, checkpoint, mixture, order, train, validate
from pipeline.config import config_of
from pipeline.datasets import Datasets
from pipeline.mixture import BLOCK, Mixture, block_shares
from pipeline.order import Order, SampleIds, ShardUse
from shards import pack, synth
from shards.storage import UserError, load_manifest

sizes_of_shards = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@contextlib.contextmanager
def blocks_of(places: int) -> Iterator[None]:
    """Short blocks, so that a short walk meets many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "BLOCK", places)
        yield


@st.composite
def mixtures(draw: st.DrawFn, per_lane: Sequence[int] = range(1, 6)) -> Mixture:
    lanes = draw(st.integers(1, 4))
    global_size = lanes * draw(st.sampled_from(per_lane))
    datasets = draw(st.lists(sizes_of_shards, min_size=1, max_size=4))
    for shards in datasets:
        shards.append(lanes)
    datasets[0].append(max(0, global_size - sum(map(sum, datasets))))
    weight = st.floats(0.5, 2.0)
    weights = draw(st.lists(weight, min_size=len(datasets), max_size=len(datasets)))
    return Mixture(
        {f"set-{number}": shards for number, shards in enumerate(datasets)},
        weights,
        seed=draw(st.integers(0, 2**40)),
        global_size=global_size,
        micro_size=draw(st.sampled_from([d for d in range(1, 7) if global_size % d == 0])),
        lanes=lanes,
        window=draw(st.integers(1, 64)),
    )


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes = draw(st.integers(1, 4))
    global_size = lanes * draw(st.integers(1, 5))
    shards = [*draw(sizes_of_shards), global_size]
    window = draw(st.integers(1, 64))
    return Order(shards, seed=3, global_size=global_size, micro_size=1, lanes=lanes, window=window)


def again(one: Mixture) -> Mixture:
    """The same order, which nobody has asked anything yet, as another process gets it."""
    fresh = Mixture(
        {
            name: dataset.shard_samples.tolist()
            for name, dataset in zip(one.names, one.datasets, strict=True)
        },
        one.shares.tolist(),
        seed=one.seed,
        global_size=one.global_size,
        micro_size=one.micro_size,
        lanes=one.lanes,
        window=one.window,
    )
    return cast("Mixture", pickle.loads(pickle.dumps(fresh)))


def triples(ids: SampleIds) -> list[tuple[int, int, int]]:
    columns = (ids.shard_G.tolist(), ids.index_G.tolist(), ids.epoch_G.tolist())
    return list(zip(*columns, strict=True))


def lanes_of(one: Order, steps: range) -> list[list[tuple[int, int, int]]]:
    """What each lane reads in these steps."""
    batches = [triples(one.samples_of(step)) for step in steps]
    return [
        list(itertools.chain(*(b[n * one.per_lane : (n + 1) * one.per_lane] for b in batches)))
        for n in range(one.lanes)
    ]


def dataset_of(one: Mixture, shard: int) -> int:
    firsts = [dataset.first_shard for dataset in one.datasets]
    return int(np.searchsorted(firsts, shard, side="right")) - 1


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
def test_shares_are_whole_and_nearest(weights: list[float]) -> None:
    names = [f"set-{number}" for number in range(len(weights))]
    exact = [Fraction(weight) * BLOCK / sum(map(Fraction, weights)) for weight in weights]
    try:
        shares = block_shares(names, weights).tolist()
    except ValueError as error:
        name = str(error).split()[0]
        assert exact[names.index(name)] < 1
        return
    assert sum(shares) == BLOCK
    assert all(abs(share - part) < 1 for share, part in zip(shares, exact, strict=True))


@settings(max_examples=10)
@given(mixtures(per_lane=[512, 700, 1024]))
def test_every_block_of_a_lane_holds_the_exact_share_of_each_dataset(one: Mixture) -> None:
    steps = range(-(-2 * BLOCK // one.per_lane))
    for lane in lanes_of(one, steps):
        for block in (lane[:BLOCK], lane[BLOCK : 2 * BLOCK]):
            drawn = Counter(dataset_of(one, shard) for shard, _, _ in block)
            assert [drawn[number] for number in range(len(one.names))] == one.shares.tolist()


@settings(max_examples=40)
@given(mixtures(), st.integers(16, 40))
def test_a_lane_reads_each_dataset_epoch_after_epoch(one: Mixture, block: int) -> None:
    """No sample twice in an epoch of its dataset, over all lanes; and every lane whole epochs."""
    with blocks_of(block):
        one = again(one)
        seen: set[tuple[int, int, int]] = set()
        drawn: Counter[int] = Counter()
        for lane in lanes_of(one, range(60)):
            for number, dataset in enumerate(one.datasets):
                own = [triple for triple in lane if dataset_of(one, triple[0]) == number]
                assert [epoch for _, _, epoch in own] == [
                    place // dataset.length for place in range(len(own))
                ]
                drawn[number] += len(own)
            assert not seen & set(lane)
            seen |= set(lane)
        assert len(seen) == 60 * one.global_size
        shards = [samples for d in one.datasets for samples in d.shard_samples.tolist()]
        assert all(0 <= index < shards[shard] for shard, index, _ in seen)
        epochs = one.epochs_after(60)["epochs"]
        for number, (name, dataset) in enumerate(zip(one.names, one.datasets, strict=True)):
            assert dataset.length == dataset.num_samples // one.lanes
            assert epochs[name] == round(drawn[number] / (dataset.length * one.lanes), 4)


@settings(max_examples=40)
@given(mixtures(), st.integers(16, 40), st.integers(1, 6), st.integers(0, 39))
def test_any_interruption_and_any_ranks_see_one_order(
    one: Mixture, block: int, world_size: int, cut: int
) -> None:
    """A rank reads its microbatches of every step; after a cut, an order that knows nothing of
    what was before. Joined over the ranks it is what a walk with counters gives."""
    with blocks_of(block):
        one = again(one)
        world_size = min(world_size, one.num_micro)
        expected = walked(one, 40)
        for part in (range(cut), range(cut, 40)):
            ranks = [again(one) for _ in range(world_size)]
            for step in part:
                seen: list[tuple[int, int, int]] = []
                for rank, own in enumerate(ranks):
                    micros, size = own.micros_of(rank, world_size), own.micro_size
                    places = range(micros.start * size, micros.stop * size)
                    seen += triples(own.samples_of(step, places))
                assert seen == expected[step]


def walked(one: Mixture, steps: int) -> list[list[tuple[int, int, int]]]:
    """The order from its definition, one sample at a time."""
    batches: list[list[tuple[int, int, int]]] = [[] for _ in range(steps)]
    for lane in range(one.lanes):
        drawn = [0] * len(one.datasets)
        for place in range(steps * one.per_lane):
            number = int(one._block(lane, place // mixture.BLOCK)[place % mixture.BLOCK])
            ids = one.datasets[number].draw([(lane, drawn[number], drawn[number] + 1)])
            batches[place // one.per_lane] += triples(ids)
            drawn[number] += 1
    return batches


@pytest.mark.parametrize("lanes", [1, 3])
def test_standing_at_step_a_million_is_walking_there(lanes: int) -> None:
    step, shards = 10**6, {"a": [3000, 41, 7], "b": [901, 0, 33], "c": [640]}
    one = Mixture(
        shards, [5, 1, 2.5], seed=9, global_size=lanes, micro_size=1, lanes=lanes, window=400
    )
    walk = [one._draw([(lane, 0, step + 1)]) for lane in range(lanes)]
    assert triples(again(one).samples_of(step)) == [triples(ids[-1:])[0] for ids in walk]


@settings(max_examples=50)
@given(st.one_of(orders(), mixtures()), st.integers(16, 40), st.integers(0, 150), st.data())
def test_uses_are_exactly_what_the_lanes_read(
    one: Order, block: int, first: int, data: st.DataObject
) -> None:
    lanes = sorted(data.draw(st.lists(st.integers(0, one.lanes), min_size=2, max_size=2)))
    lanes[1] += lanes[0] == lanes[1] == 0
    lanes[0] -= lanes[0] == lanes[1]
    places = range(lanes[0] * one.per_lane, lanes[1] * one.per_lane)
    steps = range(first, first + 40)
    with blocks_of(block):
        one = again(one) if isinstance(one, Mixture) else one
        read = {step: {s for s, _, _ in triples(one.samples_of(step)[places.start : places.stop])}
                for step in range(first, first + 200)}  # fmt: skip
        uses = list(
            itertools.takewhile(lambda u: u.first_step < 200 + first, one.uses(first, places))
        )
    assert [use.first_step for use in uses] == sorted(use.first_step for use in uses)
    for step in steps:
        now = [use.shards for use in uses if use.first_step <= step <= use.last_step]
        assert read[step] <= set(itertools.chain(*now))
    for use in uses:
        if use.last_step < first + 200:
            its_steps = range(use.first_step, use.last_step + 1)
            assert use.shards == tuple(sorted(set(use.shards)))
            assert set(use.shards) <= set().union(*(read[step] for step in its_steps))


def test_the_order_of_a_mixture_does_not_move() -> None:
    """Golden: a released order must never move under a running job."""
    one = Mixture(
        {"a": [5, 0, 7], "b": [4, 3]}, [3, 1], seed=3, global_size=4, micro_size=2, lanes=2,
        window=4,
    )  # fmt: skip
    assert one.shares.tolist() == [3072, 1024]
    assert [triples(one.samples_of(step)) for step in (0, 1, 9)] == GOLDEN
    assert next(one.uses(9, range(0, 2))) == FIRST_USE


@pytest.mark.parametrize(
    ("shards", "weights", "message"),
    [
        ({"web": [50], "few": [3]}, [1, 1], "few has 3 training samples, fewer than the 4 lanes"),
        ({"web": [50], "rare": [9]}, [1, 1e-5], r"rare has 1\.0e-05 of all weight, less than one"),
        ({"web": [3], "other": [3]}, [], "has 6 samples, fewer than one step"),
        ({"web": [0], "other": [0]}, [], "has 0 samples, fewer than one step"),
    ],
)
def test_what_does_not_fit_is_named(
    shards: dict[str, list[int]], weights: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(shards, weights, seed=0, global_size=8, micro_size=4, lanes=4)


def test_names_tell_datasets_apart(screens: Path) -> None:
    manifests = (load_manifest(str(screens)),) * 2
    assert Datasets(("a/web", "s3://b/formulas/"), manifests).names == ("web", "formulas")
    assert Datasets(("a/web/v1", "b/text/v1"), manifests).names == ("web/v1", "text/v1")
    assert Datasets(("v1", "b/v1"), manifests).names == ("v1", "b/v1")


SMALL = """
--run.steps 6 --run.log_every_steps 2 --batch.global_size 4 --batch.micro_size 2 --data.window 5
--model.channels 4,8 --model.hidden_dim 8 --model.embed_dim 4 --data.weights 3,1
"""


@pytest.fixture(scope="module")
def more(screens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other screens, packed to go with the first ones; without a test split."""
    return packed(tmp_path_factory.mktemp("more"), screens, "--size 48x32")


def packed(folder: Path, screens: Path, words: str) -> Path:
    words += f" --tokenizer {screens / 'tokenizer.json'} --split train=rest,val=4 --workers 0"
    assert synth.main([str(folder / "raw"), "--samples", "30", "--seed", "44"]) == 0
    assert pack.main([str(folder / "raw"), str(folder / "more"), *words.split()]) == 0
    return folder / "more"


def start(folder: Path, roots: list[Path], *flags: str) -> int:
    urls = ",".join(map(str, roots))
    return train.main(["--run.dir", str(folder), "--data.urls", urls, *SMALL.split(), *flags])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # what another test's run set up


@pytest.fixture
def trained(
    cpu: None, screens: Path, more: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Path:
    assert start(tmp_path / "run", [screens, more]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_a_run_over_two_datasets(
    trained: Path, screens: Path, more: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 6]
    assert set(rows[0]["epochs"]) == {screens.name, more.name}
    assert rows[-1]["samples"] == 5 + 4
    words = ["--config", str(trained / "config.toml"), "--step", "5", "--digest"]
    assert order.main([*words, "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["order_digest"] == rows[-2]["order_digest"]
    assert set(proof["datasets"]) <= {str(screens), str(more)}
    assert order.main(words) == 0
    shown = capsys.readouterr()
    pairs = zip(proof["datasets"], proof["keys"], strict=True)
    assert shown.out.splitlines() == [f"{root}\t{key}" for root, key in pairs]
    assert proof["order_digest"] in shown.err
    for split, samples in (("val", 9), ("test", 7)):
        assert validate.main([str(trained), "--split", split, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == samples


def test_keys_of_two_datasets_do_not_collide(screens: Path, tmp_path: Path) -> None:
    """The same packed files twice: equal keys, and yet another digest when they change places."""
    shutil.copytree(screens, tmp_path / "copy")
    data = Datasets.open([str(screens), str(tmp_path / "copy")])
    sections = {
        "run": {"dir": "r", "steps": 1},
        "data": {"urls": list(data.roots)},
        "batch": {"global_size": 8, "micro_size": 8},
    }
    reader = build.open_split(config_of(sections, "here"), data, "train").reader
    half = len(reader.shards) // 2
    assert reader.key(half, 3) == f"1 {reader.key(0, 3)}"
    assert reader.read(half, 3).where.startswith(f"{tmp_path}/copy/train/000000.tar ")


def test_datasets_may_move_and_weights_may_not_change(
    trained: Path, screens: Path, more: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(more, tmp_path / "moved")
    assert start(trained, [screens, tmp_path / "moved"]) == 0
    capsys.readouterr()
    assert start(trained, [screens, more], "--data.weights", "1,1") == 2
    assert "data.weights: [3.0, 1.0] -> [1.0, 1.0]" in error_line(capsys)
    assert start(trained, [more, screens]) == 2
    assert "was trained on another dataset" in error_line(capsys)
    digest = checkpoint.Meta.read(checkpoint.choose(trained, "last")).data_digest
    assert digest == Datasets.open([str(screens), str(more)]).data_digest


def test_datasets_that_do_not_fit_together_are_named(
    screens: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = packed(tmp_path, screens, "--size 64x32")
    capsys.readouterr()
    run = tmp_path / "run"
    assert start(run, [screens, pictures]) == 2
    assert f"{screens} and {pictures}: kind pairs and images; pack them alike" in error_line(capsys)
    assert start(run, [screens, larger]) == 2
    assert f"{screens} and {larger}: image size 48x32 and 64x32" in error_line(capsys)
    words = "--size 48x32 --split train=1 --min-frequency 60 --workers 0"
    assert pack.main([str(tmp_path / "raw"), str(tmp_path / "rare"), *words.split()]) == 0
    capsys.readouterr()
    assert start(run, [screens, tmp_path / "rare"]) == 2
    assert f"pack it with --tokenizer {screens}/tokenizer.json" in error_line(capsys)
    assert not run.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"url": "a", "urls": ["b"]}, r"data\.url, data\.urls: set exactly one of them"),
        ({"urls": ["a", "a"]}, r"data\.urls: a is there twice"),
        ({"urls": ["a", "b"], "weights": [1]}, r"data\.weights: 1 of them for 2 of data\.urls"),
        ({"url": "a", "weights": [1]}, r"data\.weights: 1 of them for 0 of data\.urls"),
        ({"urls": ["a", "b"], "weights": [1, 0]}, r"data\.weights: each must be above 0"),
    ],
)
def test_a_mixture_that_is_none_is_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of({"run": {"dir": "r", "steps": 1}, "data": data}, "here")


GOLDEN: list[list[tuple[int, int, int]]] = [
    [(2, 2, 0), (3, 2, 0), (0, 0, 0), (0, 1, 0)],
    [(2, 3, 0), (2, 0, 0), (2, 6, 0), (0, 2, 0)],
    [(2, 0, 2), (0, 4, 2), (2, 3, 2), (3, 3, 1)],
]
FIRST_USE = ShardUse(9, 9, (0, 2))
