import dataclasses
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import plan
from shards.format import FormatError, ImagePolicy
from shards.plan import Options, Plan, Record
from shards.sources import RawPair, Skip
from shards.storage import UserError

IMAGE = ImagePolicy(None, None, 3, "none", "keep", 90, (255, 255, 255))


def options(**changes: object) -> Options:
    defaults: dict[str, object] = {
        "kind": "pairs", "code_suffix": ".gui", "image": IMAGE, "split": "train=.5,test=.5",
        "seed": 0, "tokenizer": "word", "min_frequency": 1, "vocab_size": None, "max_tokens": None,
        "shard_samples": 4, "shard_bytes": 10**9,
    }  # fmt: skip
    return Options(**{**defaults, **changes})  # type: ignore[arg-type]


def record(name: str, image: object, code: object) -> Record:
    pair = RawPair(f"{name}.png", f"{name}.gui")
    return Record(pair, f"image {image}", 100, 8, 8, f"code {code} of {name}", 10, f"code {code}")


def plan_of(records: list[Record], **changes: object) -> Plan:
    chosen = options(**changes)
    dealt = plan.deal(records, plan.parse_split(chosen.split), chosen.seed)
    return plan.make_plan(chosen, dealt, [Skip("empty", "x.png")], "0" * 64)


contents = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=40)


@given(contents, st.integers(0, 9), st.sampled_from(["train=.5,test=.5", "train=rest,test=2"]))
def test_every_sample_is_planned_once_and_no_content_crosses_splits(
    drawn: list[tuple[int, int]], seed: int, split: str
) -> None:
    records = [record(f"{at:03d}", *content) for at, content in enumerate(drawn)]
    try:
        made = plan_of(records, seed=seed, split=split)
    except UserError:
        assert len(plan.group_records(records)) < 3
        return
    by_name = {one.pair.image: one for one in records}
    seen: dict[str, set[str]] = {}
    names, keys = [], []
    for shard in made.shards:
        assert 1 <= len(shard.samples) <= 4
        for sample in shard.samples:
            names.append(sample.image)
            keys.append(sample.key)
            found = by_name[sample.image]
            for content in (found.image_sha256, str(found.code_hash)):
                seen.setdefault(content, set()).add(shard.name.partition("/")[0])
    assert sorted(names) == sorted(by_name)
    assert len(set(keys)) == len(keys)
    for split_name in ("train", "test"):
        own = [key for key in keys if key.partition("-")[0] == split_name]
        assert own == [f"{split_name}-{at:09d}" for at in range(len(own))]
    assert all(len(splits) == 1 for splits in seen.values())
    assert Plan.from_json(made.to_json(), "here") == made


@given(contents, st.randoms(use_true_random=False))
def test_names_and_their_order_move_no_content_to_another_split(
    drawn: list[tuple[int, int]], rng: object
) -> None:
    records = [record(f"{at:03d}", *content) for at, content in enumerate(drawn)]
    shuffled = list(records)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    if len(plan.group_records(records)) < 2:
        return
    spec = plan.parse_split("train=.5,test=.5")
    first, second = (plan.deal(some, spec, 3) for some in (records, shuffled))
    for split in spec:
        images = [
            {one.image_sha256 for group in dealt[split] for one in group}
            for dealt in (first, second)
        ]
        assert images[0] == images[1]


SPLITS = ["test", "val", "extra", "train"]  # in the order in which they keep their samples


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from(SPLITS))))
def test_the_splits_of_a_source_are_kept_and_share_nothing(
    drawn: list[tuple[int, int, str]],
) -> None:
    records = [
        dataclasses.replace(
            one := record(f"{at:03d}", image, code), pair=dataclasses.replace(one.pair, split=split)
        )
        for at, (image, code, split) in enumerate(drawn)
    ]
    try:
        dealt, skips = plan.keep_splits(records)
    except UserError:  # Nothing would be left in a split.
        return
    assert list(dealt) == [one for one in ("train", "val", "test", "extra") if one in dealt]
    kept = {one.pair.image for groups in dealt.values() for group in groups for one in group}
    skipped = [skip.name for skip in skips]
    assert len(skipped) == len(set(skipped))
    assert kept.isdisjoint(skipped)
    assert len(kept) + len(skipped) == len(records)
    seen: dict[str, str] = {}
    for split in SPLITS:
        for group in dealt.get(split, []):
            for one in group:
                assert one.pair.split == split
                for content in (one.image_sha256, str(one.code_hash)):
                    assert seen.setdefault(content, split) == split
    # Only what is in a split that comes before is dropped.
    by_name = {one.pair.image: one for one in records}
    for name in skipped:
        one = by_name[name]
        found = {seen.get(content) for content in (one.image_sha256, str(one.code_hash))}
        assert any(
            SPLITS.index(split) < SPLITS.index(str(one.pair.split)) for split in found if split
        )


def test_samples_of_a_block_stay_together() -> None:
    records = []
    for at in range(60):
        one = record(f"{at:03d}", at, at)
        records.append(dataclasses.replace(one, pair=dataclasses.replace(one.pair, block=at // 10)))
    made = plan_of(records, split="train=1", shard_samples=10)
    found = [[int(sample.image[:3]) for sample in shard.samples] for shard in made.shards]
    assert [{at // 10 for at in shard} for shard in found] != [{at} for at in range(6)]
    assert all(len({at // 10 for at in shard}) == 1 for shard in found)
    assert all(shard != sorted(shard) for shard in found)


def test_groups_join_through_a_third() -> None:
    records = [record("a", 1, 1), record("b", 2, 2), record("c", 1, 2), record("d", 3, 3)]
    groups = [sorted(one.pair.image for one in group) for group in plan.group_records(records)]
    assert sorted(groups) == [["a.png", "b.png", "c.png"], ["d.png"]]


@pytest.mark.parametrize(
    ("text", "num_groups", "counts"),
    [
        ("train=.8,val=.1,test=.1", 100, {"train": 80, "val": 10, "test": 10}),
        ("train=.8,val=.1,test=.1", 7, {"train": 5, "val": 1, "test": 1}),
        ("train=rest,val=50,test=250", 1449, {"train": 1149, "val": 50, "test": 250}),
        ("train=1,test=250", 1000, {"train": 750, "test": 250}),
        ("train=.9,val=.1,test=20", 120, {"train": 90, "val": 10, "test": 20}),
        ("test=1", 5, {"test": 5}),
        ("test=rest", 5, {"test": 5}),
        ("a=.5,b=.5", 3, {"a": 1, "b": 2}),
    ],
)
def test_splits(text: str, num_groups: int, counts: dict[str, int]) -> None:
    assert plan.count_groups(plan.parse_split(text), num_groups) == counts


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(5, 500))
def test_shares_take_all_groups(parts: list[int], num_groups: int) -> None:
    whole = sum(parts)
    spec = {f"s{at}": Decimal(part) / whole for at, part in enumerate(parts)}
    try:
        counts = plan.count_groups(spec, num_groups)
    except UserError:
        return
    assert sum(counts.values()) == num_groups
    for name, share in spec.items():
        assert abs(counts[name] - share * num_groups) <= len(parts)


@pytest.mark.parametrize(
    "text",
    [
        "", "train", "train=", "train=0", "train=-1", "train=.5", "train=.8,test=.3", "train=1.5",
        "train=rest,test=rest", "train=.5,train=.5", "../x=1", "train=1,test=rest", "val=50",
        "train=nan", "a/b=1", "Train=1", "=1", "caf\u00e9=1", f"{'x' * 33}=1",
    ],
)  # fmt: skip
def test_other_splits_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--split"):
        plan.parse_split(text)


def test_a_split_is_named_with_what_goes_into_a_key() -> None:
    names = ["0", "a_b-c", "x" * 32]
    assert list(plan.parse_split(f"{names[0]}=rest,{names[1]}=2,{names[2]}=.5")) == names
    with pytest.raises(UserError, match="1 to 32 characters of a-z, 0-9, _ and -"):
        plan.parse_split("Train=1")


def test_an_empty_split_is_named() -> None:
    for text in ("train=rest,val=50,test=250", "train=.98,val=.01,test=.01"):
        with pytest.raises(UserError, match=r"train|val"):
            plan.count_groups(plan.parse_split(text), 20)


def test_the_shared_size_of_all_images_is_stated() -> None:
    same = [record("a", 1, 1), record("b", 2, 2)]
    assert (plan_of(same).image.width, plan_of(same).image.height) == (8, 8)
    mixed = [*same, Record(RawPair("c.png", "c.gui"), "image 3", 9, 8, 9, "code", 1, "code 3")]
    assert plan_of(mixed).image.width is None


def test_shards_keep_to_the_bytes_asked_for() -> None:
    records = [record(f"{at:03d}", at, at) for at in range(40)]
    made = plan_of(records, shard_samples=100, shard_bytes=5 * 4216, split="train=1")
    assert [len(shard.samples) for shard in made.shards] == [5] * 8


def test_what_changed_is_said() -> None:
    records = [record(f"{at:03d}", at, at) for at in range(6)]
    old = plan_of(records)
    changed = [record("000", 99, 0), *records[2:], record("new", 50, 50)]
    found = plan.differences(old, plan_of(changed, seed=7, min_frequency=2))
    assert "--seed was 0, now 7" in found
    assert "--min-frequency was 1, now 2" in found
    assert any(line.startswith("new: 'new.gui' and 1 more") for line in found)
    assert any(line.startswith("gone: '001.gui' and 1 more") for line in found)
    assert "changed: '000.png'" in found


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 1}', '{"format": "pixloom plan", "version": 9}',
     '{"format": "pixloom plan", "version": 1}'],
)  # fmt: skip
def test_damaged_plans_are_named(text: str) -> None:
    with pytest.raises(FormatError, match="here"):
        Plan.from_json(text, "here")


def test_an_edited_plan_is_found() -> None:
    text = plan_of([record("a", 1, 1), record("b", 2, 2)]).to_json()
    with pytest.raises(FormatError, match="edited"):
        Plan.from_json(text.replace("a.png", "c.png"), "here")


def test_a_plan_is_known_by_its_beginning() -> None:
    text = plan_of([record("a", 1, 1), record("b", 2, 2)]).to_json()
    assert plan.is_marked(text[: len(text) // 2])
    assert not plan.is_marked('{"version":1,"options":{}}')
    with pytest.raises(FormatError, match="not a pixloom plan"):
        Plan.from_json(text.replace(plan.PLAN_FORMAT, "another plan"), "here")
