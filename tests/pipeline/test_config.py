"""One reader for TOML and flags; every mistake is one line that names the key."""

import argparse
import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.config import (
    Config,
    ValidateConfig,
    add_config_flags,
    add_decoding_flags,
    config_from,
    config_of,
    differences,
    parse_flags,
    read_toml,
    to_dict,
    to_toml,
    with_decoding,
)
from shards.storage import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "launch" / "configs").glob("*.toml"))
SMALL = '[run]\ndir = "r"\nsteps = 5\n[data]\nurl = "d"\n'


def read(tmp_path: Path, text: str, *flags: str) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(text)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_flags(parser)
    return config_from(parse_flags(parser, ["--config", str(path), *flags]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_survive_being_saved(
    path: Path, tmp_path: Path
) -> None:
    config = read(tmp_path, path.read_text())
    assert read(tmp_path, to_toml(config)) == config
    assert config_of(json.loads(json.dumps(to_dict(config))), "json") == config


NUMBERS = st.floats(min_value=0, allow_infinity=False)
SHARES = st.floats(min_value=0, max_value=1, exclude_max=True)


@example(text="\x7f\x00\x85\u2028\ufeff'\"\\\r\n", number=5e-324, share=-0.0)
@given(text=st.text(), number=NUMBERS, share=SHARES)
def test_what_is_saved_is_read_again(
    text: str, number: float, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sections = {
        "run": {"dir": text, "steps": 1, "init": text, "max_time_s": number},
        "data": {"urls": [f"a{text}", "b"], "weights": [number + 1, 5e-324], "cache_dir": text},
        "model": {"dropout": share, "risk_weight": number, "channels": [2**70, 1]},
        "optim": {"lr": number or 1, "beta2": share, "ema_decay": share, "clip_norm": number},
        "validate": {"grammar": text, "length_penalty": number, "metric": text},
        "checkpoint": {"url": text},
    }
    config = config_of(sections, "it")
    path = tmp_path_factory.getbasetemp() / "saved.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert config_of(read_toml(str(path)), "saved.toml") == config


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    flags = ["--optim.lr", "3e-4", "--run.deterministic", "true", "--model.channels", "[4, 8,16]"]
    config = read(tmp_path, SMALL + "[optim]\nlr = 1\n", *flags, "--run.steps=7")
    assert config.optim.lr == 3e-4
    assert config.run.deterministic is True
    assert config.model.channels == (4, 8, 16)
    assert config.run.steps == 7


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("/data/my shards,/data/b", ("/data/my shards", "/data/b")),
        (" a, b,", ("a", "b")),
        ("a b", ("a", "b")),
        ('["/data/my shards", "b"]', ("/data/my shards", "b")),
        ("['a, b', 'c [1]',]", ("a, b", "c [1]")),
        ("[a,b]", ("a", "b")),
        ("a,/data/b (old)", ("a", "/data/b (old)")),
    ],
)
def test_a_list_is_written_as_in_toml_or_bare(
    tmp_path: Path, text: str, urls: tuple[str, ...]
) -> None:
    section = SMALL.replace('url = "d"\n', "")
    assert read(tmp_path, section, "--data.urls", text).data.urls == urls


def test_numbers_of_a_list_are_read_as_its_type(tmp_path: Path) -> None:
    section = SMALL.replace('url = "d"\n', 'urls = ["a", "b", "c"]\n')
    for text in ("[1, 0.5, 2e-3]", "1,.5,2e-3", "(1 .5 2e-3)"):
        config = read(tmp_path, section, "--data.weights", text)
        assert config.data.weights == (1.0, 0.5, 0.002)
    assert read(tmp_path, SMALL, "--model.channels", "4").model.channels == (4,)


def test_the_model_section_follows_its_name(tmp_path: Path) -> None:
    config = read(tmp_path, SMALL, "--model.name", "autoencoder", "--model.latent_dim", "7")
    assert config.model.name == "autoencoder"
    with pytest.raises(UserError, match=r"unknown key model\.num_heads"):
        read(tmp_path, SMALL, "--model.name", "autoencoder", "--model.num_heads", "2")


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("[optim]\nlearning_rate = 1.0\n", r"unknown key optim\.learning_rate"),
        ("[optim]\nwarmup_step = 1\n", r"optim\.warmup_step; did you mean optim\.warmup_steps\?"),
        ("[optimm]\nlr = 1.0\n", r"unknown section \[optimm\]; did you mean optim\?"),
        ("[optim]\nlr = 'fast'\n", r"optim\.lr = 'fast': must be float"),
        ("[optim]\nlr = -1.0\n", r"optim\.lr = -1\.0: must be above 0"),
        ("[optim]\nschedule = 'cosin'\n", r"optim\.schedule = 'cosin': choose one of constant, co"),
        ("[batch]\nmicro_size = 0\n", r"batch\.micro_size = 0: must be at least 1"),
        ("[batch]\nmicro_size = 2.5\n", r"batch\.micro_size = 2\.5: must be int"),
        ("[batch]\nmicro_size = true\n", r"batch\.micro_size = True: must be int"),
        ("[optim]\nlr = inf\n", r"optim\.lr = inf: must be above 0 and finite"),
        ("[optim]\nschedule = 'wsd'\n", r"optim\.decay_steps: belongs to"),
        ("[model]\nname = ['a']\n", r"model\.name = \['a'\]: choose one of"),
        ("[model]\nname = 'resnet'\n", r"model\.name = 'resnet': choose one of seq2seq, auto"),
        ("[model]\nchannels = ['a']\n", r"model\.channels = 'a': must be int"),
        ("[model]\nnum_heads = 5\n", r"model\.num_heads = 5 does not divide"),
        ("[optim\n", r"not a TOML file"),
        ("[optim]\nsteps = 3\n", r"unknown key optim\.steps; did you mean run\.steps\?"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(
    tmp_path: Path, addition: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, SMALL + addition)
    assert "run.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.lrr", "1"], r"unknown flag --optim\.lrr; did you mean --optim\.lr\?"),
        (["--run.steps", "many"], r"run\.steps = 'many': must be int"),
        (["--run.max_time_s", "inf"], r"run\.max_time_s = inf: must be at least 0 and finite"),
        (["--run.max_time_s", "nan"], r"run\.max_time_s = nan: must be at least 0 and finite"),
        (["--run.max_time_s", "-1"], r"run\.max_time_s = -1\.0: must be at least 0"),
        (["--run.deterministic", "yes"], r"run\.deterministic = 'yes': must be true or false"),
        (["--run.deterministic", "True"], r"run\.deterministic = 'True': must be true or false"),
        (["--model.channels", "[4, true]"], r"model\.channels = True: must be int"),
        (["--model.channels", "4,x"], r"model\.channels = 'x': must be int"),
        (["extra"], r"unexpected argument 'extra'"),
    ],
)
def test_a_wrong_flag_names_the_nearest(tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, SMALL, *flags)


def decoding(config: Config, *flags: str) -> ValidateConfig:
    parser = argparse.ArgumentParser()
    add_decoding_flags(parser)
    return with_decoding(config, parser.parse_args(flags)).validate


def test_a_grammar_that_is_asked_for_is_kept_to(tmp_path: Path) -> None:
    measured = read(tmp_path, SMALL + "[validate]\ngrammar = 'web'\nmask = false\n")
    assert not decoding(measured).mask
    assert not decoding(measured, "--beam", "3").mask
    assert decoding(measured, "--mask").mask
    assert decoding(measured, "--grammar", "other.ebnf").mask
    assert not decoding(measured, "--grammar", "web", "--no-mask").mask
    kept_to = read(tmp_path, SMALL + "[validate]\ngrammar = 'web'\n")
    assert decoding(kept_to).mask
    assert not decoding(kept_to, "--no-mask").mask


def test_a_flag_of_decoding_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    plain = read(tmp_path, SMALL)
    set_up = read(tmp_path, SMALL + "[validate]\nbeam = 4\nlength_penalty = 1.0\ngrammar = 'web'\n")
    autoencoder = read(tmp_path, SMALL + "[model]\nname = 'autoencoder'\n")
    writes_none = "model.name = autoencoder writes no code"
    for config, flags, message in (
        (plain, "--length-penalty 0.6", "--length-penalty: changes nothing without --beam above 1"),
        (set_up, "--beam 1 --length-penalty 2", "--length-penalty: changes nothing without"),
        (plain, "--no-mask", "--no-mask: changes nothing without --grammar"),
        (plain, "--mask", "--mask: changes nothing without --grammar"),
        (autoencoder, "--length-penalty 0.6", f"--length-penalty: {writes_none}"),
        (autoencoder, "--no-mask", f"--no-mask: {writes_none}"),
    ):
        with pytest.raises(UserError) as caught:
            decoding(config, *flags.split())
        assert message in str(caught.value)
    assert decoding(set_up, "--length-penalty", "2").length_penalty == 2
    assert not decoding(set_up, "--no-mask").mask
    assert decoding(plain, "--length-penalty", "0").beam == 1
    # What a configuration holds may wait for its flag.
    waiting = read(tmp_path, SMALL + "[validate]\nlength_penalty = 0.6\nmask = false\n")
    assert decoding(waiting) == waiting.validate
    assert decoding(set_up, "--beam", "1").length_penalty == 1
    assert decoding(waiting, "--beam", "2").length_penalty == 0.6


def test_a_value_where_a_section_belongs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim is a section; write \[optim\]"):
        read(tmp_path, "optim = 3\n" + SMALL)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.url, data\.urls: set exactly one of them"):
        read(tmp_path, '[run]\ndir = "r"\nsteps = 1\n')
    with pytest.raises(UserError, match=r"no\.toml: cannot read the configuration"):
        config_from(argparse.Namespace(config=str(tmp_path / "no.toml")))
    with pytest.raises(UserError, match=r"run\.steps, run\.epochs: set exactly one"):
        read(tmp_path, '[run]\ndir = "r"\n[data]\nurl = "d"\n')


def test_only_keys_that_cannot_reach_the_result_may_change(tmp_path: Path) -> None:
    one = to_dict(read(tmp_path, SMALL))
    other = json.loads(json.dumps(one))
    for body in other.values():
        for name in body:
            body[name] = "changed"
    refused = {line.split(":")[0] for line in differences(one, other)}
    every = {f"{section}.{name}" for section, body in one.items() for name in body}
    assert every - refused == {
        "run.dir",
        "run.resume",
        "run.max_time_s",
        "run.log_every_steps",
        "data.url",
        "data.urls",
        "data.workers",
        "data.cache_dir",
        "data.cache_bytes",
        "data.max_bad",
        "validate.patience",
        "validate.beam",
        "validate.length_penalty",
        "validate.grammar",
        "validate.mask",
        "checkpoint.every_steps",
        "checkpoint.keep_last",
        "checkpoint.keep_every_steps",
        "checkpoint.url",
        "checkpoint.on_error",
    }
    changed = to_dict(read(tmp_path, SMALL, "--optim.lr", "0.5"))
    assert differences(one, changed) == ["optim.lr: 0.001 -> 0.5"]


def test_a_checkpoint_without_younger_keys_has_their_defaults(tmp_path: Path) -> None:
    now = to_dict(read(tmp_path, SMALL))
    before = json.loads(json.dumps(now))
    del before["run"]["init"], before["model"]["encoder"]
    assert differences(to_dict(config_of(before, "a checkpoint")), now) == []
    changed = to_dict(read(tmp_path, SMALL, "--run.init", "w.pth", "--model.encoder", "resnet18"))
    assert differences(to_dict(config_of(before, "a checkpoint")), changed) == [
        'model.encoder: "cnn" -> "resnet18"',
        'run.init: "" -> "w.pth"',
    ]


def test_every_key_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    parser.print_help()
    for action in parser._actions:
        assert action.help, action.dest
    assert "streams read side by side" in " ".join(capsys.readouterr().out.split())
