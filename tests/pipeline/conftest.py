"""Packed datasets made once a session, by the real packer."""

from pathlib import Path

import pytest

from shards import pack, synth


@pytest.fixture(scope="session")
def screens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with code, 48x32, in several shards over three splits."""
    folder = tmp_path_factory.mktemp("screens")
    assert synth.main([str(folder / "raw"), "--samples", "80", "--seed", "3"]) == 0
    words = "--size 48x32 --split train=rest,val=5,test=7 --shard-samples 13 --workers 0"
    assert pack.main([str(folder / "raw"), str(folder / "shards"), *words.split()]) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images alone, as JPEG."""
    folder = tmp_path_factory.mktemp("pictures")
    assert synth.main([str(folder / "raw"), "--samples", "40", "--seed", "3"]) == 0
    words = "--kind images --size 48x32 --encode jpeg --split train=.7,val=.1,test=.2 --workers 0"
    assert pack.main([str(folder / "raw"), str(folder / "shards"), *words.split()]) == 0
    return folder / "shards"
