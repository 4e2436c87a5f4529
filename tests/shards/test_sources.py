import os
from pathlib import Path

import pytest

from shards.sources import RawPair, Skip, list_folder, read_file
from shards.storage import UserError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_pairs_share_their_path_up_to_the_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.png", "b/1.gui", "a.JPG", "a.gui", "notes.md", ".hidden.png", ".git/x.png")
    listing = list_folder(str(tmp_path))
    assert listing.kind == "pairs"
    assert listing.code_suffix == ".gui"
    assert listing.pairs == (RawPair("a.JPG", "a.gui"), RawPair("b/1.png", "b/1.gui"))
    assert listing.skips == ()
    assert listing.num_other_files == 1


def test_images_alone(tmp_path: Path) -> None:
    touch(tmp_path, "x/2.png", "x/10.webp", "x/1.jpeg", "README.txt")
    listing = list_folder(str(tmp_path))
    assert listing.kind == "images"
    assert [pair.image for pair in listing.pairs] == ["x/1.jpeg", "x/10.webp", "x/2.png"]


def test_half_pairs_are_skipped_with_their_cause(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "1.gui", "2.png", "3.gui", "1.webp")
    listing = list_folder(str(tmp_path))
    assert [pair.image for pair in listing.pairs] == ["1.png"]
    assert set(listing.skips) == {
        Skip("image_without_code", "2.png"),
        Skip("code_without_image", "3.gui"),
        Skip("second_image_of_code", "1.webp"),
    }


def test_of_names_that_differ_only_in_case_the_first_is_packed(tmp_path: Path) -> None:
    touch(tmp_path, "A.png", "A.gui", "a.png", "a.gui", "b.png", "b.gui", "b.GUI")
    listing = list_folder(str(tmp_path))
    assert [pair.image for pair in listing.pairs] == ["A.png", "b.png"]
    assert set(listing.skips) == {Skip("case_collision", "a.png"), Skip("case_collision", "b.gui")}
    images = list_folder(str(tmp_path), "images")
    assert [pair.image for pair in images.pairs] == ["A.png", "b.png"]


def test_names_that_differ_in_more_than_case_are_all_packed(tmp_path: Path) -> None:
    touch(tmp_path, "strasse.png", "stra\u00dfe.png")
    assert len(list_folder(str(tmp_path)).pairs) == 2


def test_links_and_pipes_are_neither_followed_nor_opened(tmp_path: Path) -> None:
    touch(tmp_path / "outside", "secret.png")
    root = touch(tmp_path / "raw", "1.png")
    (root / "2.png").symlink_to(tmp_path / "outside" / "secret.png")
    (root / "linked").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "3.png")
    listing = list_folder(str(root))
    assert [pair.image for pair in listing.pairs] == ["1.png"]
    assert listing.skips == tuple(Skip("not_a_file", one) for one in ("2.png", "3.png", "linked"))
    for name in ("2.png", "3.png"):
        with pytest.raises(OSError, match=name):
            read_file(str(root), name)


def test_odd_names_are_only_names(tmp_path: Path) -> None:
    odd = ["a b\n.png", "..png", "caf\u00e9.png", os.fsdecode(b"\xff.png"), "x.v2.png"]
    touch(tmp_path, *odd)
    listing = list_folder(str(tmp_path))
    assert {pair.image for pair in listing.pairs} == set(odd) - {"..png"}  # That one is hidden.


def test_the_code_suffix_is_found_or_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, "1.png", "1.html", "readme.txt")
    assert list_folder(str(tmp_path)).code_suffix == ".html"
    touch(tmp_path, "1.tex")
    with pytest.raises(UserError, match=r"\.html and \.tex.*--code-suffix"):
        list_folder(str(tmp_path))
    assert list_folder(str(tmp_path), code_suffix=".tex").pairs == (RawPair("1.png", "1.tex"),)
    assert list_folder(str(tmp_path), "images").kind == "images"
    with pytest.raises(UserError, match="an image's suffix"):
        list_folder(str(tmp_path), code_suffix=".png")
    with pytest.raises(UserError, match=r"--code-suffix \.tex: --kind images"):
        list_folder(str(tmp_path), "images", ".tex")


def test_folders_with_nothing_to_pack_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        list_folder(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        list_folder(str(tmp_path / "missing"))
    touch(tmp_path, "1.png")
    with pytest.raises(UserError, match="not a folder"):
        list_folder(str(tmp_path / "1.png"))
    with pytest.raises(UserError, match="no code"):
        list_folder(str(tmp_path), "pairs")
