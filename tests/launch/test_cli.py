"""`pixloom VERB` and `python -m` are the same, and every verb explains itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: pixloom {verb}")
    assert "--json" in out


def test_an_unknown_verb_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pixloom: error: no verb 'trian'; did you mean train?")
    assert len(err.splitlines()) == 1


def test_without_a_verb_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in cli.VERBS)


def test_the_module_form_starts_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shards.verify", "/nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pixloom verify: error: /nowhere:")
