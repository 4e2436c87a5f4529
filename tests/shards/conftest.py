"""Small raw folders to pack, and a way to compare what was packed byte by byte."""

import hashlib
import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

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
