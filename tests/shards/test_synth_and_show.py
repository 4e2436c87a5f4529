import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from shards import pack, show, storage, synth, tokens

HashTree = Callable[[Path], dict[str, str]]


def write_screens(out: Path, *options: object) -> int:
    return synth.main([str(out), "--workers", "0", *map(str, options)])


def test_a_screen_depends_on_seed_and_number_alone(tmp_path: Path, hash_tree: HashTree) -> None:
    assert write_screens(tmp_path / "few", "--samples", 5, "--seed", 3) == 0
    assert write_screens(tmp_path / "more", "--samples", 8, "--seed", 3) == 0
    assert write_screens(tmp_path / "other", "--samples", 5, "--seed", 4) == 0
    few, more, other = (hash_tree(tmp_path / name) for name in ("few", "more", "other"))
    assert len(few) == 11
    for name, digest in few.items():
        if name != synth.MARKER_NAME:
            assert more[name] == digest
            assert other[name] != digest or name.endswith(".gui")


def test_a_second_call_finds_nothing_to_do_and_a_broken_one_is_finished(
    tmp_path: Path, hash_tree: HashTree, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert write_screens(out, "--samples", 4, "--json") == 0
    assert json.loads(capsys.readouterr().out)["nothing_to_do"] is False
    before = hash_tree(out)
    (out / "000002.gui").unlink()
    (out / ".000003.99.pixloom-tmp").write_bytes(b"half")
    assert write_screens(out, "--samples", 4) == 0
    assert hash_tree(out) == before
    capsys.readouterr()
    assert write_screens(out, "--samples", 4, "--json") == 0
    assert json.loads(capsys.readouterr().out)["nothing_to_do"] is True


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(storage.UserError, match="gone"):
        synth.write_sample(tmp_path / "gone", 0, 0)


def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    assert write_screens(tmp_path / "other") == 2
    assert "not empty" in capsys.readouterr().err
    assert write_screens(tmp_path / "demo", "--samples", 2) == 0
    assert write_screens(tmp_path / "demo", "--samples", 3) == 2
    assert "other parameters" in capsys.readouterr().err


def test_programs_are_mostly_distinct_and_of_the_language(tmp_path: Path) -> None:
    import random

    programs = [synth.draw_program(random.Random(f"{at}")).to_gui() for at in range(500)]
    assert len(set(programs)) > 400
    vocabulary = {word for program in programs for word in tokens.words(program)}
    assert vocabulary == {
        "header", "row", "single", "double", "quadruple", "{", "}", ",", "small-title", "text",
        "btn-active", "btn-inactive", "btn-green", "btn-orange", "btn-red",
    }  # fmt: skip
    for program in programs:
        header = program.splitlines()[1].split(", ")
        assert header.count("btn-active") == 1
        assert 1 <= len(header) <= 4
        assert 1 <= program.count("row {") <= 3


@pytest.mark.parametrize("kind", ["pairs", "images"])
def test_show_draws_a_picture(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out, sheet = tmp_path / "raw", tmp_path / "out", tmp_path / "sheet.png"
    assert write_screens(raw, "--samples", 20) == 0
    (raw / "zero.png").touch()
    (raw / "zero.gui").write_text("$x$ <pad>")
    assert pack.main([str(raw), str(out), "--size", "80x48", "--kind", kind, "--workers", "0"]) == 0
    capsys.readouterr()
    assert show.main([str(out), "--out", str(sheet), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == str(sheet)
    with Image.open(sheet) as image:
        assert image.width == 1606
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100
    assert show.main([str(out), "--out", str(sheet), "--split", "none"]) == 2
    assert "--split none" in capsys.readouterr().err


def test_show_without_a_dataset_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.main([str(tmp_path), "--out", str(tmp_path / "sheet.png")]) == 2
    assert "pixloom pack" in capsys.readouterr().err


def test_code_is_shortened_to_the_room_there_is() -> None:
    lines = show.shorten_code("word " * 200, 20, 3)
    assert len(lines) == 3
    assert all(len(line) <= 20 for line in lines)
    assert lines[-1].endswith("...")
    assert show.shorten_code("", 20, 3) == [""]
    assert show.shorten_code("a\n\tb", 20, 3) == ["a b"]


def test_the_demo_packs_as_the_readme_says(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    assert write_screens(raw, "--samples", 40) == 0
    arguments = ["--size", "160x96", "--split", "train=rest,val=4,test=8", "--workers", "0"]
    assert pack.main([str(raw), str(out), *arguments]) == 0
    manifest = storage.load_manifest(str(out))
    assert manifest.kind == "pairs"
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.vocab_size == 19
