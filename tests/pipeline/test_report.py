"""The page of a run: everything is on it, and a real browser without a network shows it."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from browser import visit

from pipeline import charts, checkpoint, diffs, report, validate
from pipeline.charts import Curve
from pipeline.markup import Html, page, tag
from pipeline.models import Seq2Seq
from shards import pack

SECTIONS = [
    "summary", "curves", "samples", "worst-samples", "validations", "configuration", "versions",
    "dataset", "checkpoints",
]  # fmt: skip


def write(run: Path, out: Path, *words: object) -> str:
    assert report.main([str(run), "--out", str(out), *map(str, words)]) == 0
    return out.read_text()


def check_in_browser(path: Path, folder: Path, sections: list[str]) -> None:
    """Wide and narrow: nothing is missing, sticks out, or was asked of a network."""
    for width in (1200, 400):
        seen = visit(path, folder, width, 2500)
        assert seen.complaints == []
        for section in sections:
            assert f'<section id="{section}">' in seen.dom
        assert len(np.unique(seen.pixels[::9].astype(int) @ [1, 256, 65536])) > 100
        assert seen.pixels[1000:2500].std() > 5, "blank in the middle"
    assert "<script" not in seen.dom


def test_everything_of_a_seq2seq_run_is_there(
    screens: Path, screens_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.html"
    text = write(screens_run, out, "--split", "test", "--json")
    row = json.loads(capsys.readouterr().out)
    assert (row["page"], row["samples"], row["damaged"]) == (str(out), 7, 0)
    manifest = json.loads((screens / "manifest.json").read_text())
    for words in (
        "seq2seq, ", "step-000000", "learning rate", "throughput, samples a second", "data wait",
        "validation exact_match", "page of the prediction", '<mark title="not in the truth">',
        "confidence", "model.hidden_dim", "torch", "Python", manifest["data_digest"],
        "exact match of these", "nothing",
    ):  # fmt: skip
        assert words in text, words
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", text)
    assert len(text) < 1_000_000
    check_in_browser(out, tmp_path, [*SECTIONS, "token-confusion", "attention"])


def test_everything_of_an_autoencoder_is_there(pictures_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    text = write(pictures_run, out, "--samples", 3)
    for words in ("autoencoder, ", "reconstruction", "difference", "PSNR", "3 of the 4 samples of"):
        assert words in text, words
    assert "token-confusion" not in text
    check_in_browser(out, tmp_path, SECTIONS)


def test_its_errors_are_those_of_validation(
    precise_run: tuple[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, run = precise_run
    assert validate.main([str(run), "--split", "test", "--json"]) == 0
    mse = json.loads(capsys.readouterr().out)["mse"]
    looked = report.write_report(run, "test", "best", str(tmp_path / "report.html"), 0)
    assert np.mean([one.error for one in looked.samples]) == pytest.approx(mse, rel=1e-6)


def test_a_variational_one_s_draws_are_shown(
    pictures: Path, tmp_path: Path, train_small: Callable[[Path, Path, str], Path]
) -> None:
    settings = """
    --run.steps 2 --batch.global_size 4 --batch.micro_size 4 --model.name autoencoder
    --model.channels 8 --model.latent map --model.latent_dim 2 --model.variational true
    """
    run = train_small(tmp_path / "run", pictures, settings)
    text = write(run, tmp_path / "report.html", "--samples", 2)
    drawn = text.split('<section id="drawn-images">')[1].split("</section>")[0]
    assert len(set(re.findall("src=.data:image/png;base64,[^ ]*", drawn))) == 24


def test_the_browser_would_notice(tmp_path: Path) -> None:
    """A page that asks for more than is in it fails the tests above."""
    path = tmp_path / "page.html"
    outside = Html('<script>1</script><img src="https://example.com/a.png">')
    path.write_text(page("page", "", tag("body", outside)))
    assert len(visit(path, tmp_path).complaints) == 2


def test_without_a_validation_split_it_is_another(
    screens: Path, tmp_path: Path, train_small: Callable[[Path, Path, str], Path]
) -> None:
    """And names that are not UTF-8 are shown by their bytes."""
    raw, data = tmp_path / "raw", tmp_path / "shards"
    shutil.copytree(screens.parent / "raw", raw)
    for path in list(raw.iterdir()):
        path.rename(raw / os.fsdecode(b"\xe9" + os.fsencode(path.name)))
    words = "--size 48x32 --split train=rest,dev=5 --workers 0"
    assert pack.main([str(raw), str(data), *words.split()]) == 0
    settings = """
    --run.steps 2 --batch.global_size 4 --batch.micro_size 4 --model.channels 8,16
    --model.hidden_dim 32 --model.max_tokens 128 --model.memory vector
    """
    run = train_small(tmp_path / "run", data, settings)
    text = write(run, tmp_path / os.fsdecode(b"\xe9.html"), "--samples", 2)
    assert "\\udce9000" in text
    assert "2 of the 75 samples of train" in text
    assert "no validation yet" in text
    assert 'id="attention"' not in text
    assert "None yet." in text


def test_what_comes_from_outside_is_text(
    screens: Path, screens_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of folders, a damaged sample, a torn log, a stranger's validation file."""
    run, data = tmp_path / "<b>run&", tmp_path / "<i>data"
    shutil.copytree(screens_run, run)
    shutil.copytree(screens, data)
    config = run / "config.toml"
    config.write_text(config.read_text().replace(str(screens), str(data)))
    (run / "validate-<u>.json").write_text('{"<u>": "<s>"}')
    (run / "validate-list.json").write_text("[1]")
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 61, "loss": NaN, "<em>": 2}\n{"step": Infinity}\n{"step": 62, "lo')
    shard = bytearray((data / "test" / "000000.tar").read_bytes())
    at = shard.index(b"\x89PNG")
    shard[at + 60] ^= 1
    (data / "test" / "000000.tar").write_bytes(shard)
    text = write(run, tmp_path / "report.html", "--split", "test", "--json")
    row = json.loads(capsys.readouterr().out)
    assert (row["samples"], row["damaged"]) == (6, 1)
    assert "1 values are not finite" in text
    assert not re.search("<(?:i|u|s|em)>|<b>run", text)
    assert "&lt;b&gt;run&amp;" in text
    assert "&lt;em&gt;" in text
    assert "&lt;s&gt;" in text


def test_of_an_older_checkpoint_the_rest_of_the_run_is_told(
    screens_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the one that is shown is hashed once."""
    state = checkpoint.Meta.read(checkpoint.choose(screens_run, "last")).state
    assert state.best_step == 60
    sha256_of, hashed = checkpoint.sha256_of, Counter[Path]()

    def counting(path: Path) -> str:
        hashed[path] += 1
        return sha256_of(path)

    monkeypatch.setattr(checkpoint, "sha256_of", counting)
    text = write(screens_run, tmp_path / "report.html", "--samples", 1, "--checkpoint", 30)
    assert f"exact_match {state.best_metric:.4g} at step 60" in text
    assert "<td>step-00000030</td><td>shown here</td>" in text
    assert "<td>step-00000060</td><td>best validation</td>" in text
    assert [n for path, n in hashed.items() if path.suffix == ".safetensors"] == [1]


def test_an_error_of_attention_is_one(
    screens_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(Seq2Seq, "attention", broken)
    with pytest.raises(ValueError, match="broken"):
        write(screens_run, tmp_path / "report.html", "--samples", 1)


def test_a_long_run_s_page_is_no_larger(screens_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(screens_run, run)
    short = write(run, tmp_path / "short.html", "--samples", 1)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    row = next(row for row in map(json.loads, rows) if "split" not in row)
    with (run / "metrics.jsonl").open("a") as log:
        for step in range(100, 100_000):
            log.write(json.dumps({**row, "step": step, "loss": 1 + step % 7}) + "\n")
    long = write(run, tmp_path / "long.html", "--samples", 1)
    assert len(long) < len(short) + 500_000


def test_thinning_keeps_the_extremes_and_the_ends() -> None:
    steps = np.arange(1_000_003, dtype=float)
    values = np.sin(steps / 5e4)
    values[123_456], values[777_777] = 9, -9
    thin = charts.thinned(Curve("loss", steps, values), 400)
    assert len(thin.steps) == 400
    assert (thin.highs.max(), thin.lows.min()) == (9, -9)
    assert (thin.lows <= thin.means).all()
    assert (thin.means <= thin.highs).all()
    assert thin.steps[0] < 2600
    assert thin.steps[-1] > 1_000_003 - 2600
    few = charts.thinned(Curve.of("loss", [1, 0.5, 2, 0.25]), 400)
    assert few.means.tolist() == [0.5, 0.25]


def test_differences_are_those_of_a_shortest_edit() -> None:
    assert diffs.differing([5, 6, 7], [5, 7]) == ({1}, set())
    assert diffs.differing([5, 7], [5, 6, 7]) == (set(), {1})
    assert diffs.differing([5, 6, 7], [5, 8, 7]) == ({1}, {1})
    pairs = [([5, 6, 7], [5, 8, 7]), ([5, 6, 7], [5, 8, 7]), ([5], [5, 9]), ([5], [])]
    assert diffs.confusions(pairs) == Counter({(6, 8): 2, (None, 9): 1, (5, None): 1})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "report.png"], "--out report.png: the report is a page"),
        (["--samples", "-1"], "--samples -1"),
        (["--split", "dev"], "no split 'dev'; it has test, train, val"),
        (["--checkpoint", "9"], "no checkpoint of step 9"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, screens_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert report.main([str(screens_run), *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
