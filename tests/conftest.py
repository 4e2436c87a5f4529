"""For all tests: settings, scripts, and object stores that run once a session.

No test asserts a time, so Hypothesis must not either.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import servers
from hypothesis import settings
from servers import Server

settings.register_profile("pixloom", deadline=None)
settings.load_profile("pixloom")


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a campaign or a benchmark as people do, in an empty folder: (script, *words) -> its
    JSON object. It must succeed; what it says on stderr goes to this process's."""

    def run(script: Path, *words: object) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, script, "--json", *map(str, words)],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        result: dict[str, Any] = json.loads((done.stdout.splitlines() or ["{}"])[-1])
        violations = result.pop("violations", [])
        print(result)
        assert violations == []
        assert done.returncode == 0
        return result

    return run


def _started(start: AbstractContextManager[Server]) -> Iterator[Server]:
    """Where a server cannot run, its tests are skipped; but never in continuous integration."""
    try:
        server = start.__enter__()
    except servers.ServerUnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    try:
        yield server
    finally:
        start.__exit__(None, None, None)


@pytest.fixture(scope="session")
def seaweedfs_server() -> Iterator[Server]:
    yield from _started(servers.seaweedfs())


@pytest.fixture(scope="session")
def moto_server() -> Iterator[Server]:
    yield from _started(servers.moto())


@pytest.fixture(scope="session")
def fake_gcs_server() -> Iterator[Server]:
    yield from _started(servers.fake_gcs())


@pytest.fixture(scope="session")
def azurite_server() -> Iterator[Server]:
    yield from _started(servers.azurite())


@pytest.fixture
def seaweedfs(seaweedfs_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    seaweedfs_server.use(monkeypatch)
    return seaweedfs_server


@pytest.fixture
def moto(moto_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    moto_server.use(monkeypatch)
    return moto_server


@pytest.fixture
def fake_gcs(fake_gcs_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    fake_gcs_server.use(monkeypatch)
    return fake_gcs_server


@pytest.fixture
def azurite(azurite_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    azurite_server.use(monkeypatch)
    return azurite_server
