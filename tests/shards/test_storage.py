import os
import subprocess
import sys
from pathlib import Path

import pytest

from shards import storage
from shards.format import FormatError
from shards.storage import UserError

ROOT = Path(__file__).parents[2]


def test_a_published_file_replaces_the_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = str(tmp_path / "deep" / "file.txt")
    for text in ("old", "new \u00fc"):
        storage.publish_text(text, target)
        assert storage.read_text(target) == text
    scratch = tmp_path / "scratch"
    scratch.write_bytes(b"scratch")
    storage.publish(scratch, f"file://{target}")
    assert storage.read_bytes(target) == b"scratch"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file.txt"]


def test_a_file_on_another_device_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, target = tmp_path / "scratch", tmp_path / "target"
    scratch.write_bytes(b"data")
    replace = Path.replace

    def refuse_scratch(self: Path, other: Path) -> Path:
        if self == scratch:
            raise OSError(18, os.strerror(18))
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", refuse_scratch)
    storage.publish(scratch, str(target))
    assert target.read_bytes() == b"data"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("url", ["https://host/x", "s3a://bucket/x", "pipe://x", "memory://x"])
def test_other_protocols_are_refused(url: str) -> None:
    for call in (storage.read_bytes, storage.exists, storage.load_manifest):
        with pytest.raises(UserError, match="supported so far: local"):
            call(url)


def test_the_refusal_shows_no_credentials() -> None:
    with pytest.raises(UserError) as error:
        storage.read_bytes("s3://user:secret@bucket/x")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", "a//b", ".", "a\0b"])
def test_names_that_lead_out_of_the_root_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        storage.join("/data", name)


def test_join() -> None:
    assert storage.join("/data/", "train/000000.tar") == "/data/train/000000.tar"
    assert storage.join("/", "x") == "/x"


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt: No such file"):
        storage.read_text(str(tmp_path / "gone.txt"))
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"bad\.txt"):
        storage.read_text(str(tmp_path / "bad.txt"))
    with pytest.raises(UserError, match="pixloom pack"):
        storage.load_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(FormatError, match=r"manifest\.json"):
        storage.load_manifest(str(tmp_path))


def test_one_writer_at_a_time_finds_a_clean_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    left = [tmp_path / ".a.1.pixloom-tmp", tmp_path / "train" / ".b.2.pixloom-tmp"]
    for path in left:
        path.touch()
    with storage.exclusive(str(tmp_path)) as scratch:
        assert not any(path.exists() for path in left)
        assert scratch.is_dir()
        with pytest.raises(UserError, match="another pixloom"), storage.exclusive(str(tmp_path)):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_command_says_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise UserError("this file: do that")

    assert storage.command("pack", fail) == 2
    assert capsys.readouterr().err == "pixloom pack: error: this file: do that\n"
    assert storage.command("pack", lambda: 1) == 1


def test_files_are_listed_fetched_and_removed(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    assert storage.list_files(root) == {}
    assert not storage.is_remote(root)
    for name in ("b.json", "step-00000004/state.json"):
        storage.publish_text(name, storage.join(root, name))
    assert storage.list_files(f"file://{root}") == {"b.json": 6, "step-00000004/state.json": 24}
    copy = tmp_path / "copies" / "state.json"
    storage.fetch(f"{root}/step-00000004/state.json", copy)
    assert copy.read_text() == "step-00000004/state.json"
    assert [path.name for path in copy.parent.iterdir()] == ["state.json"]
    with pytest.raises(UserError, match="gone: No such file"):
        storage.fetch(f"{root}/gone", tmp_path / "copies" / "gone")
    assert [path.name for path in copy.parent.iterdir()] == ["state.json"]
    assert storage.abort_uploads(root) == 0
    for _ in range(2):
        storage.remove_tree(root)
        assert not (tmp_path / "run").exists()


def test_local_storage_loads_no_client() -> None:
    program = (
        "import sys; from shards import storage; storage.exists('.'); storage.list_files('x');"
        "sys.exit(bool({'fsspec', 's3fs', 'aiohttp'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
