"""Fuzzing in short, always the same; minutes of it are in the benchmarks' results."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import hostile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.format import FormatError, ImagePolicy, Manifest, ShardEntry, TokenizerEntry

SCRIPT = Path(__file__).with_name("fuzz.py")


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_reader_does_anything_but_read_or_refuse() -> None:
    words = ["--target", "all", "--seconds", "60", "--executions", "250", "--seed", "3", "--json"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], stdout=subprocess.PIPE, text=True, check=False
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert [row["crashes"] for row in result["targets"]] == [[]] * len(result["targets"])
    assert done.returncode == 0
    for row in result["targets"]:
        print(row)
        assert row["executions"] >= 250, row["target"]
        assert len(row["outcomes"]) >= 2, "it refuses everything, or nothing"
        assert row["peak_growth_mb"] < 100


def test_what_it_should_find_is_found_and_kept(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shards.storage import UserError

    def wait(data: bytes) -> str:
        time.sleep(60)
        return "read"

    def forget(data: bytes) -> str:
        raise UserError("something is damaged")

    monkeypatch.setattr(fuzz, "MAX_SECONDS", 0.05)
    before = signal.getsignal(signal.SIGALRM)
    try:
        for function, said in ((lambda data: str(1 // 0), "ZeroDivisionError"),
                               (wait, "more than 0.05 s"), (forget, "names no file")):  # fmt: skip
            monkeypatch.setitem(fuzz.TARGETS, "index", (function, lambda: []))
            fuzzer = fuzz.Fuzzer("index", 0, tmp_path)
            fuzzer.execute(b"v1.2 0\n")
            os.close(fuzzer.current)
            [crash] = fuzzer.crashes
            assert said in crash
            assert Path(crash.split(": ")[0]).read_bytes() == b"v1.2 0\n"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_the_end_of_a_process_is_a_crash(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = tmp_path / "dies.py"
    dies.write_text(
        "import os, sys, pathlib\n"
        "kept = pathlib.Path(sys.argv[sys.argv.index('--kept') + 1])\n"
        "(kept / 'tar.current').write_bytes(b'\\3\\0\\0\\0abc and more')\n"
        "os.kill(os.getpid(), 11)\n"
    )
    monkeypatch.setattr(fuzz, "__file__", str(dies))
    options = Namespace(seconds=1, seed=0, memory=1, executions=1, atheris=False)
    [crash] = fuzz.fuzz_apart(options, "tar", tmp_path)["crashes"]
    assert "its process ended with -11" in crash
    assert Path(crash.split(": ")[0]).read_bytes() == b"abc"


MANIFEST = Manifest(
    kind="pairs",
    splits={"train": (ShardEntry("train/000000.tar", 3, 9000, "0" * 64),), "val": ()},
    image=ImagePolicy(8, 8, 3, "pad", "png", 90, (1, 2, 3)),
    tokenizer=TokenizerEntry("tokenizer.json", "1" * 64, 9, 7),
    skips={"corrupt": 1},
    plan_hash="2" * 64,
)
KEYS = [
    "format",
    "kind",
    "splits",
    "image",
    "tokenizer",
    "skips",
    "plan_hash",
    "train",
    "name",
    "samples",
    "bytes",
    "sha256",
    "width",
    "channels",
    "file",
    "vocab_size",
    "corrupt",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=9,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_values_in_a_manifest_are_one_or_a_format_error(data: st.DataObject) -> None:
    body = json.loads(MANIFEST.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        at = body
        while True:
            keys = sorted(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and data.draw(st.booleans()):
                at = at[key]
                continue
            at[key] = data.draw(JSON)
            break
    try:
        found = Manifest.from_json(hostile.resigned(body), "here")
    except FormatError:
        return
    assert Manifest.from_json(found.to_json(), "here") == found
