"""Prediction: the pixels that packing gives, the codes that validation finds, and plain errors."""

import io
import json
import math
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from servers import Server

from pipeline import predict, report, validate, web
from pipeline.batch import Batch
from pipeline.build import load_model, open_split
from pipeline.checkpoint import choose
from pipeline.config import config_of, read_toml
from pipeline.datasets import Datasets
from pipeline.decode import greedy
from pipeline.export import write_export
from pipeline.grammar import Grammar, TokenGrammar
from pipeline.models import Seq2Seq
from pipeline.order import validation_batches
from pipeline.predict import Trained
from pipeline.stream import BatchPlan, SampleReader, Shard
from pipeline.tasks import prepare_images
from shards import pack, storage, synth, tokens
from shards.format import BOS, EOS
from shards.storage import load_manifest


@pytest.fixture(scope="module")
def exported(screens_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(screens_run, "best", tmp_path_factory.mktemp("export") / "out").folder


def packed_split(run: Path, split: str) -> tuple[Batch, list[str]]:
    """A whole split as one batch, and the names of its source files."""
    config = config_of(read_toml(str(run / "config.toml")), "config.toml")
    dataset = open_split(config, Datasets.of(config.data), split)
    counts = dataset.reader.shard_samples
    ids = next(validation_batches(counts, sum(counts)))
    batch = dataset[BatchPlan(step=0, micro=0, first_place=0, ids=ids)]
    return batch, sources_of(dataset.reader)


def sources_of(reader: SampleReader) -> list[str]:
    return [
        json.loads(bytes(reader.read(shard, index).members["json"]))["source"]
        for shard, samples in enumerate(reader.shard_samples)
        for index in range(samples)
    ]


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = predict.main([str(word) for word in words])
    captured = capsys.readouterr()
    # Less the lines of progress, which a slow machine has time for.
    return status, captured.out, re.sub(r"(?m)^predicted: \d.*\n", "", captured.err)


def test_a_run_and_its_export_say_what_validation_decodes(
    screens_run: Path, exported: Path, screens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch, names = packed_split(screens_run, "test")
    config = config_of(read_toml(str(screens_run / "config.toml")), "config.toml")
    data = Datasets.of(config.data)
    model = load_model(config, data, choose(screens_run, "best")).eval()
    assert isinstance(model, Seq2Seq)
    ids = greedy(model, prepare_images(batch, torch.float32), model.config.max_tokens)
    where = str(screens / "tokenizer.json")
    tokenizer = tokens.load_tokenizer(Path(where).read_text(), where)
    expected = [tokenizer.decode(row) for row in ids]
    assert len(set(expected)) > 2, "codes that are all alike would prove nothing"

    files = [screens.parent / "raw" / name for name in names]
    for trained in (screens_run, exported):
        status, out, err = call(capsys, trained, *files, "--batch-size", 3)
        assert (status, err) == (0, "")
        assert out.splitlines() == [
            f"{file}\t{code}" for file, code in zip(files, expected, strict=True)
        ]
        status, out, _ = call(capsys, trained, files[0])
        assert (status, out) == (0, expected[0] + "\n")


def test_flags_say_how_codes_are_decoded(
    screens_run: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((screens.parent / "raw").glob("*.png"))[:4]

    def rows(trained: Path, *words: object) -> list[dict[str, Any]]:
        status, out, err = call(capsys, trained, *files, "--json", *words)
        assert (status, err) == (0, "")
        found: list[dict[str, Any]] = json.loads(out)["images"]
        return found

    greedy_rows = rows(screens_run)
    found = rows(screens_run, *["--beam", "3", "--n-best", "2", "--grammar", "web"])
    grammar = Grammar.open("web")
    word_file = (screens / "tokenizer.json").read_text()
    known = TokenGrammar(grammar, tokens.load_tokenizer(word_file, "it"), 256)
    for row, plain in zip(found, greedy_rows, strict=True):
        assert "n_best" not in plain
        assert plain["confidence"] == pytest.approx(math.exp(plain["score"]))
        assert len(row["n_best"]) == 2
        assert row["n_best"][0] == {name: row[name] for name in ("code", "score", "confidence")}
        assert row["score"] >= row["n_best"][1]["score"]
        for one in row["n_best"]:
            assert known.accepts(tokens.encode(known.tokenizer, one["code"])[1:-1])
        if known.accepts(tokens.encode(known.tokenizer, plain["code"])[1:-1]):
            assert row["score"] >= plain["score"] - 1e-4

    # The same from the run's own configuration, and from an export, which carries the grammar.
    run, out = tmp_path / "run", tmp_path / "export"
    shutil.copytree(screens_run, run)
    own = tmp_path / "own.ebnf"
    own.write_text(grammar.text)
    config = (run / "config.toml").read_text()
    config = config.replace("beam = 1", "beam = 3").replace('grammar = ""', f'grammar = "{own}"')
    (run / "config.toml").write_text(config)
    assert rows(run, "--n-best", 2) == found
    write_export(run, "best", out)
    own.unlink()
    assert rows(out, "--n-best", 2) == found
    assert rows(out, "--beam", 1, "--no-mask") == greedy_rows
    assert str(tmp_path) not in (out / "config.json").read_text()
    for words, message in (
        (["--n-best", 4], "--n-best 4: at least 1, and at most --beam, which is 3"),
        (["--beam", 0], "validate.beam = 0: must be at least 1"),
        (["--grammar", own], "cannot read the grammar"),
    ):
        status, _, err = call(capsys, out, files[0], "--json", *words)
        assert status == 2
        assert message in err
    status, _, err = call(capsys, out, files[0], "--n-best", 2)
    assert status == 2
    assert "give --json" in err


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_code_comes_out_as_it_was_packed(
    tokenizer: str,
    train_small: Callable[[Path, Path, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two programs, of stripes and of spots, learnt by heart, white space and all."""
    programs = ["a {\n\tb  }\r\n", "<eos>\u00e9"]
    raw, data, run = tmp_path / "raw", tmp_path / "shards", tmp_path / "run"
    raw.mkdir()
    for number in range(8):
        pixels = np.full((16, 16), number, np.uint8)
        pixels[::4] = 250
        pixels[:, ::4] = number if number % 2 else 250
        Image.fromarray(pixels).save(raw / f"{number}.png")
        (raw / f"{number}.gui").write_bytes(programs[number % 2].encode())
    # No byte pairs: a character of two bytes is two tokens.
    words = f"--split train=1 --workers 0 --tokenizer {tokenizer} --vocab-size 260"
    assert pack.main([str(raw), str(data), *words.split()]) == 0
    settings = """
    --run.steps 100 --batch.global_size 8 --batch.micro_size 8 --optim.lr 5e-3
    --model.channels 8,16 --model.hidden_dim 64 --model.dropout 0 --model.latent_dropout 0
    --checkpoint.every_steps 100
    """
    train_small(run, data, settings)
    expected = [program.removesuffix("\n") + "\n" for program in programs]
    for number in range(2):
        assert call(capsys, run, raw / f"{number}.png") == (0, expected[number], "")
    assert call(capsys, run, raw / "0.png", raw / "1.png", "--out", tmp_path / "out")[0] == 0
    for number in range(2):
        written = (tmp_path / "out" / f"{number}.txt").read_bytes()
        assert written == expected[number].encode()
    assert report.main([str(run), "--split", "train"]) == 0
    assert "\ufffd" not in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("png", "--size 40x24"),
        ("jpeg", "--size 40x24 --encode jpeg --quality 60 --fit pad --background red"),
        ("webp", "--size 24x40 --encode webp --fit crop --channels 4"),
        ("grey", "--size 40x24 --channels 1"),
        ("keep", "--kind images"),
    ],
)
def test_an_image_gives_the_pixels_of_its_packed_self(
    name: str, options: str, tmp_path: Path
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "shards"
    assert synth.main([str(raw), "--samples", "6", "--seed", "4"]) == 0
    with Image.open(raw / "000000.png") as image:
        image.save(raw / "000000.jpg", quality=95)
        (raw / "000000.png").unlink()
    see_through = Image.open(raw / "000001.png").convert("RGBA")
    see_through.putalpha(120)
    see_through.save(raw / "000001.png")
    words = [*options.split(), "--split", "train=1", "--workers", "0"]
    assert pack.main([str(raw), str(out), *words]) == 0
    manifest = load_manifest(str(out))
    trained = Trained(torch.nn.Identity(), None, manifest.image, None, 0)  # type: ignore[arg-type]
    reader = SampleReader(Shard(str(out), entry) for entry in manifest.splits["train"])
    sources = sources_of(reader)
    assert len(sources) == 6
    for index, source in enumerate(sources):
        sample = reader.read(0, index)
        expected = predict.images.decode(
            next(bytes(d) for e, d in sample.members.items() if e in ("png", "jpg", "webp")),
            manifest.image.channels,
        )
        assert np.array_equal(trained.pixels((raw / source).read_bytes()), expected), source


def test_an_autoencoder_s_errors_are_those_of_validation(
    pictures_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, names = packed_split(pictures_run, "test")
    files = [pictures.parent / "raw" / name for name in names]
    assert validate.main([str(pictures_run), "--split", "test", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])["mse"]
    words = [pictures_run, *files, "--out", tmp_path / "out", "--batch-size", 3]
    status, out, err = call(capsys, *words)
    assert status == 0
    assert f"{len(files)} of {len(files)} images: " in err
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == [str(file) for file in files]
    assert np.mean([float(row[1]) for row in rows]) == pytest.approx(expected, rel=1e-4)
    trained = Trained.open(pictures_run)
    for file, (_, error, score) in zip(files, rows, strict=True):
        assert score == error  # the loss is the squared error
        with Image.open(tmp_path / "out" / f"{file.stem}.png") as image:
            assert (image.mode, image.size) == ("RGB", (48, 32))
            difference = (np.asarray(image) - trained.pixels(file.read_bytes()).astype(float)) / 255
        assert np.mean(difference**2) == pytest.approx(float(error), rel=0.02)
    assert call(capsys, *words)[0] == 2
    assert call(capsys, *words, "--overwrite")[0] == 0
    status, _, err = call(capsys, pictures_run, files[0])
    assert status == 2
    assert "--out FOLDER is needed" in err


def test_what_is_refused_is_named_and_the_rest_is_done(
    exported: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, folder = screens.parent / "raw", tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "empty").mkdir()
    shutil.copy(raw / "000001.png", folder / "b.png")
    shutil.copy(raw / "000002.png", folder / "sub" / "a.PNG")
    shutil.copy(raw / "000003.png", folder / ".hidden.png")
    (folder / "notes.txt").write_text("no image")
    (folder / "c.png").write_bytes((raw / "000004.png").read_bytes()[:300])
    (folder / "d.png").write_text("no image either")
    (folder / "link.png").symlink_to(raw / "000005.png")
    gone, circle = tmp_path / "gone.png", tmp_path / "circle.png"
    circle.symlink_to(circle)
    words = [exported, circle, raw / "000000.png", "--out", tmp_path / "out"]
    status, out, err = call(capsys, *words)
    assert (status, len(out.splitlines())) == (1, 1)
    assert f"pixloom predict: {circle}: Too many levels of symbolic links\n" in err
    words = [exported, folder, gone, folder / "empty", raw / "000000.png", "--json"]
    status, out, err = call(capsys, *words)
    assert status == 1
    assert err.splitlines() == [
        f"pixloom predict: {folder}/c.png: truncated",
        f"pixloom predict: {folder}/d.png: unsupported_format",
        f"pixloom predict: {gone}: No such file or directory",
        f"pixloom predict: {folder}/empty: no images there; looked for "
        + " ".join(predict.IMAGE_SUFFIXES),
    ]
    assert len(out.splitlines()) == 1
    row = json.loads(out)
    assert [Path(one["image"]).name for one in row["images"]] == [
        "b.png", "c.png", "d.png", "a.PNG", "gone.png", "empty", "000000.png",
    ]  # fmt: skip
    assert [one["image"] for one in row["images"] if "code" in one] == [
        f"{folder}/b.png",
        f"{folder}/sub/a.PNG",
        f"{raw}/000000.png",
    ]
    assert (row["model"], row["step"]) == ("seq2seq", 60)


def test_codes_go_to_files_and_none_is_lost(
    exported: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, source, out = screens.parent / "raw", tmp_path / "in", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/a.png"):
        shutil.copy(raw / f"00000{len(name)}.png", source / name)
    (source / "a.gui").write_text("the truth")
    status, printed, _ = call(capsys, exported, source, "--out", out, "--code-suffix", ".gui")
    assert status == 0
    rows = [line.split("\t") for line in printed.splitlines()]
    assert [row[0] for row in rows] == [f"{source}/{name}.png" for name in ("a", "b", "sub/a")]
    assert all(0 < float(row[1]) <= 1 for row in rows)
    status, printed, _ = call(capsys, exported, source)
    for line in printed.splitlines():
        name, code = line.split("\t")
        path = out / Path(name).relative_to(source).with_suffix(".gui")
        assert path.read_text() == code + "\n"
    assert len(printed.splitlines()) == 3

    before = {path: path.read_bytes() for path in source.rglob("*.*")}
    long = Path(shutil.copy(raw / "000001.png", tmp_path / f"{'a' * 251}.png"))
    for words, message in [
        ([source, "--out", source, "--code-suffix", ".gui"], "a.gui: is already there; give --ov"),
        ([source, "--out", source, "--code-suffix", ".png", "--overwrite"], "is one of the images"),
        ([source / "a.png", source / "sub/a.png", "--out", out], "would both be written to"),
        ([source, "--code-suffix", "../x"], "--code-suffix ../x"),
        ([source, "--code-suffix", ".gui"], "--code-suffix: needs --out FOLDER, and a model that"),
        ([long, "--out", out, "--code-suffix", ".long"], "a.long: File name too long"),
        ([source, "--batch-size", 0], "--batch-size 0"),
    ]:
        status, printed, err = call(capsys, exported, *words)
        assert (status, printed) == (2, ""), words
        assert message in err
        assert len(err.splitlines()) == 1
    assert before == {path: path.read_bytes() for path in source.rglob("*.*")}


def test_pages_are_written_beside_codes(
    exported: Path, pictures_run: Path, screens: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And where a code is no program, the reason, while the rest is done."""
    raw, out = screens.parent / "raw", tmp_path / "out"
    words = [exported, raw, "--out", out, "--code-suffix", ".gui", "--html"]
    status, _, err = call(capsys, *words, "--json")
    row = json.loads(call(capsys, *words, "--json", "--overwrite")[1])
    assert len(row["images"]) == len(list(out.glob("*.gui"))) == 80
    bad = [one for one in row["images"] if "not_web" in one]
    assert status == (1 if bad else 0)
    assert err.count("no HTML, the code is not a web program: line 1, column ") == len(bad)
    for one in row["images"]:
        assert 0 < one["confidence"] <= 1
        page = Path(one["file"]).with_suffix(".html")
        assert page.exists() == ("not_web" not in one)
        if page.exists():
            assert page.read_text() == web.render(one["code"], Path(one["file"]).name)
    status, printed, err = call(capsys, *words)
    assert (status, printed) == (2, "")
    assert "--overwrite" in err
    for words, message in [
        ([exported, raw, "--html"], "--html: needs --out FOLDER"),
        ([pictures_run, raw, "--html", "--out", out], "--html: needs --out FOLDER, and a model"),
        ([pictures_run, raw, "--code-suffix", ".gui", "--out", out], "--code-suffix: needs"),
        ([exported, raw, "--html", "--out", out, "--code-suffix", ".html"], "would replace"),
    ]:
        status, printed, err = call(capsys, *words)
        assert (status, printed) == (2, "")
        assert message in err


def test_what_cannot_be_written_loses_nothing_else(
    exported: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What came before it was told by then, and no file is left half written."""
    raw, out = screens.parent / "raw", tmp_path / "out"
    images = [raw / f"00000{number}.png" for number in range(3)]
    words = [exported, *images, "--out", out, "--batch-size", 1, "--overwrite"]
    (out / "000001.txt").mkdir(parents=True)
    status, printed, err = call(capsys, *words)
    assert (status, err) == (2, f"pixloom predict: error: {out}/000001.txt: Is a directory\n")
    assert [line.split("\t")[0] for line in printed.splitlines()] == [str(images[0])]
    status, printed, _ = call(capsys, *words, "--json")
    rows = json.loads(printed)["images"]
    assert (status, [row["file"] for row in rows]) == (2, [f"{out}/000000.txt"])

    (out / "000001.txt").rmdir()
    before = (out / "000000.txt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        status, _, err = call(capsys, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, err) == (2, f"pixloom predict: error: {out}/000000.txt: File too large\n")
    assert {path: path.read_bytes() for path in out.iterdir()} == {out / "000000.txt": before}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_go_to_stdout_beside_a_progress_bar(
    exported: Path, screens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [str(screens.parent / "raw" / f"00000{number}.png") for number in range(2)]
    stdout, stderr = io.StringIO(), Terminal()
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("sys.stderr", stderr)
    assert predict.main([str(exported), *images]) == 0
    assert "predicted" in stderr.getvalue()
    assert [line.split("\t")[0] for line in stdout.getvalue().splitlines()] == images


def test_a_reader_that_goes_away_is_one_line(
    exported: Path, screens: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert predict.main([str(exported), str(screens.parent / "raw" / "000000.png")]) == 2
    assert capsys.readouterr().err == "pixloom predict: error: stdout: Broken pipe\n"


def test_a_name_that_is_not_utf8_is_no_hindrance(
    exported: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(screens.parent / "raw" / "000000.png", image)
    words = ["--grammar", "web", "--html", "--out", tmp_path / "out"]
    assert call(capsys, exported, image, *words)[0] == 0
    page = tmp_path / "out" / os.fsdecode(b"caf\xe9.html")
    assert "<title>caf\\udce9.txt</title>" in page.read_text()


@torch.inference_mode()
def test_confidence_is_the_product_of_the_steps_probabilities(
    screens_run: Path, screens: Path
) -> None:
    trained = Trained.open(screens_run)
    assert isinstance(trained.model, Seq2Seq)
    images = [
        trained.pixels((screens.parent / "raw" / f"00000{n}.png").read_bytes()) for n in (1, 2)
    ]
    for pixels, (code,) in zip(images, trained.codes(images), strict=True):
        image_BCHW = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        memory = trained.model.encode(image_BCHW)
        state, token, expected = memory.start, BOS, 1.0
        for _ in range(trained.model.config.max_tokens + 1):
            logits_BV, state = trained.model.step(torch.tensor([token]), state, memory)
            token = int(logits_BV.argmax())
            expected *= float(logits_BV.softmax(1)[0, token])
            if token == EOS:
                break
        assert code.confidence == pytest.approx(expected, rel=1e-3)


def test_images_on_a_store(
    exported: Path, screens: Path, moto: Server, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A folder and a single file, as from disk; what is not there or no image is named."""
    raw, local = screens.parent / "raw", tmp_path / "in"
    folder = f"{moto.url}/predict"
    (local / "sub").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "sub/c.PNG", ".hidden.png", "notes.txt"]):
        shutil.copy(raw / f"00000{number}.png", local / name)
        storage.publish(copy_of(local / name, tmp_path), f"{folder}/{name}")
    storage.publish_text("no image", f"{folder}/bad.png")
    storage.publish_text("no image", f"{moto.url}/other/notes.txt")
    (local / "bad.png").write_text("no image")
    status, printed, err = call(capsys, exported, folder, "--batch-size", 2)
    expected = call(capsys, exported, local, "--batch-size", 2)
    assert (status, printed, err) == tuple(
        one.replace(str(local), folder) if isinstance(one, str) else one for one in expected
    )
    assert status == 1
    assert len(printed.splitlines()) == 3
    assert err == f"pixloom predict: {folder}/bad.png: unsupported_format\n"
    assert call(capsys, exported, f"{folder}/b.png") == call(capsys, exported, local / "b.png")
    once = call(capsys, exported, f"{folder}/b.png", f"{folder}/a.png")
    words = [f"{folder}/b.png", f"{folder}/a.png", f"{folder}/b.png", "--out", tmp_path / "once"]
    again = call(capsys, exported, *words[:3])
    assert again[:2] == once[:2]
    assert again[2] == f"pixloom predict: {folder}/b.png: named more than once, predicted once\n"
    assert call(capsys, exported, *words)[0] == 0
    twice = predict.find_images([f"{folder}/b.png"] * 2)
    assert len(list(predict.predict(Trained.open(exported), twice, 4))) == 2
    assert call(capsys, exported, folder, "--out", tmp_path / "out")[0] == 1
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.txt")) == [
        "a.txt", "b.txt", "c.txt",
    ]  # fmt: skip
    for url, message in [
        (f"{folder}/gone.png", f"{folder}/gone.png: No such file or directory"),
        (f"{moto.url}/other", f"{moto.url}/other: no images there; looked for .png"),
    ]:
        status, printed, err = call(capsys, exported, url)
        assert (status, printed) == (1, "")
        assert message in err
    for url, message in [
        ("http://example.com/a.png", "this storage protocol is not supported"),
        ("s3:/bucket/a.png", "or a URL with ://"),
        ("s3://pixloom-no-such-bucket/a", "pixloom-no-such-bucket"),
    ]:
        status, printed, err = call(capsys, exported, url)
        assert (status, printed) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1
    assert call(capsys, exported, local, "--out", f"{moto.url}/out")[0] == 2


def copy_of(path: Path, folder: Path) -> Path:
    return Path(shutil.copy(path, folder / "copy"))


def test_images_of_a_dataset_that_was_never_resized(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "shards"
    raw.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(raw / f"{number}.png")
    words = ["--split", "train=1", "--workers", "0"]
    assert pack.main([str(raw), str(out), *words]) == 0
    image = load_manifest(str(out)).image
    trained = Trained(torch.nn.Identity(), None, image, None, 0)  # type: ignore[arg-type]
    assert trained.pixels((raw / "2.png").read_bytes()).shape == (6, 8, 3)
    Image.new("RGB", (6, 8)).save(tmp_path / "turned.png")
    with pytest.raises(predict.ImageRefused, match="6x8 pixels, the model takes 8x6"):
        trained.pixels((tmp_path / "turned.png").read_bytes())


def test_half_precision_and_double_predict_too(
    screens_run: Path,
    screens: Path,
    with_precision: Callable[[Path, str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = {
        precision: Trained.open(with_precision(screens_run, precision))
        for precision in ("fp32", "bf16", "fp16", "fp64")
    }
    said = capsys.readouterr().err
    files = sorted((screens.parent / "raw").glob("*.png"))[:6]
    pixels = [trained["fp32"].pixels(file.read_bytes()) for file in files]
    best = {precision: [codes[0] for codes in one.codes(pixels)]
            for precision, one in trained.items()}  # fmt: skip
    texts = {precision: [code.text for code in codes] for precision, codes in best.items()}
    assert texts["fp64"] == texts["fp32"]

    model, tokenizer = trained["bf16"].model, trained["bf16"].tokenizer
    assert isinstance(model, Seq2Seq)
    assert tokenizer is not None
    device = next(model.parameters()).device
    image_BCHW = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(device) / 255
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ids = greedy(model, image_BCHW, model.config.max_tokens)
    assert texts["bf16"] == [tokens.decode(tokenizer, row) for row in ids]
    scores = {precision: [code.score for code in codes] for precision, codes in best.items()}
    assert scores["bf16"] != scores["fp32"]
    if device.type == "cpu":
        assert best["fp16"] == best["fp32"]
        assert said.startswith("pixloom: optim.precision = fp16 needs a GPU")
        assert len(said.splitlines()) == 1
    else:
        assert scores["fp16"] != scores["fp32"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "a.png"], "nowhere: no such folder"),
        (["screens", "a.png"], "neither a run nor an export"),
        (["export", "a.png", "--checkpoint", "last"], "is an export, it holds one model"),
        (["run", "a.png", "--checkpoint", "9"], "no checkpoint of step 9"),
    ],
)
def test_what_is_no_model_is_one_line(
    words: list[str],
    message: str,
    screens: Path,
    screens_run: Path,
    exported: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"screens": screens, "export": exported, "run": screens_run}
    status, out, err = call(capsys, *(places.get(word, word) for word in words))
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
