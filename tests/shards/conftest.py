"""Small raw folders to pack, a way to compare what was packed byte by byte, and stores."""

import hashlib
import io
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from servers import FaultyProxy, Server

REPOSITORY = Path(__file__).resolve().parents[2]


def png_bytes(seed: int, size: tuple[int, int] = (40, 24), mode: str = "RGB") -> bytes:
    rng = random.Random(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    out = io.BytesIO()
    Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * channels)).save(out, "PNG")
    return out.getvalue()


def code_text(seed: int) -> str:
    rng = random.Random(seed)
    buttons = ", ".join(rng.choice(["btn-green", "btn-red", "btn-orange"]) for _ in range(9))
    return f"header {{\nbtn-active\n}}\nrow {{\n{buttons}\n}}\n"


@pytest.fixture
def make_pairs(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder of `count` pairs of distinct images and programs; returns it."""

    def make(count: int, size: tuple[int, int] = (40, 24), name: str = "raw") -> Path:
        folder = tmp_path / name
        for number in range(count):
            path = folder / ("a" if number % 2 else "b/c") / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png_bytes(number, size))
            path.with_suffix(".gui").write_text(code_text(number))
        return folder

    return make


@pytest.fixture
def hash_tree() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every file below a folder, hidden ones too, by relative name."""

    def hashes(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return hashes


@pytest.fixture(params=["moto", "seaweedfs", "fake_gcs", "azurite"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each store in turn."""
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def module_proxy(seaweedfs_server: Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(seaweedfs_server.endpoint, seed=7) as proxy:
        yield proxy


@pytest.fixture
def proxy(
    module_proxy: FaultyProxy, seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyProxy]:
    """Before SeaweedFS, and the address that this process and its children use."""
    seaweedfs.through(module_proxy).use(monkeypatch)
    module_proxy.reset()
    yield module_proxy
    module_proxy.clear()


@pytest.fixture
def screens() -> Path:
    """The rendered pix2code screens beside the repository, where there are any."""
    folder = REPOSITORY.parent / "shared" / "data" / "pix2code-web" / "train"
    if not folder.is_dir():
        message = "the rendered pix2code screens are not beside this repository"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
