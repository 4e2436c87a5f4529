"""Packed datasets made once a session, by the real packer."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from pipeline import train
from shards import pack, synth


@pytest.fixture(scope="session")
def screens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with code, 48x32, in several shards over three splits."""
    folder = tmp_path_factory.mktemp("screens")
    assert synth.main([str(folder / "raw"), "--samples", "80", "--seed", "3"]) == 0
    words = "--size 48x32 --split train=rest,val=5,test=7 --shard-samples 13 --workers 0"
    assert pack.main([str(folder / "raw"), str(folder / "shards"), *words.split()]) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images alone, as JPEG."""
    folder = tmp_path_factory.mktemp("pictures")
    assert synth.main([str(folder / "raw"), "--samples", "40", "--seed", "3"]) == 0
    words = "--kind images --size 48x32 --encode jpeg --split train=.7,val=.1,test=.2 --workers 0"
    assert pack.main([str(folder / "raw"), str(folder / "shards"), *words.split()]) == 0
    return folder / "shards"


@pytest.fixture(scope="session")
def screens_of_pix2code() -> Path:
    """The rendered pix2code screens beside the repository, where there are any."""
    folder = Path(__file__).parents[3] / "shared" / "data" / "pix2code-web" / "train"
    if not folder.is_dir():
        message = "the rendered pix2code screens are not beside this repository"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


def train_on_cpu(folder: Path, data: Path, words: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)  # what another run set up
        places = ["--run.dir", str(folder), "--data.url", str(data)]
        assert train.main([*places, *words.split()]) == 0
    return folder


@pytest.fixture(scope="session")
def train_small() -> Callable[[Path, Path, str], Path]:
    """Trains on a CPU in this process: (run folder, dataset, flags) -> run folder."""
    return train_on_cpu


@pytest.fixture(scope="session")
def screens_run(screens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small seq2seq run on `screens`: checkpoints 30 and 60, whose codes differ by image."""
    words = """
    --run.steps 60 --batch.global_size 8 --batch.micro_size 8 --checkpoint.every_steps 30
    --model.channels 8,16,24 --model.hidden_dim 32 --model.embed_dim 16 --model.latent_dropout 0
    --optim.lr 1e-2 --validate.every_steps 30
    """
    return train_on_cpu(tmp_path_factory.mktemp("runs") / "screens", screens, words)


@pytest.fixture(scope="session")
def pictures_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder run on `pictures`."""
    words = """
    --run.steps 20 --batch.global_size 8 --batch.micro_size 8 --validate.every_steps 20
    --model.name autoencoder --model.channels 8,16 --model.latent_dim 16 --optim.lr 1e-2
    """
    return train_on_cpu(tmp_path_factory.mktemp("runs") / "pictures", pictures, words)


@pytest.fixture
def with_precision(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Path, str], Path]]:
    """A copy of a run in fp32 whose configuration has another precision: (run, precision) -> run.

    Only copies of one precision are validated in a test.
    """

    def copy(run: Path, precision: str) -> Path:
        folder = tmp_path_factory.mktemp("precision") / precision
        shutil.copytree(run, folder)
        config = folder / "config.toml"
        before, after = config.read_text().split('precision = "fp32"')
        config.write_text(f'{before}precision = "{precision}"{after}')
        AcceleratorState._reset_state(reset_partial_state=True)  # what another run set up
        return folder

    yield copy
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=["fp32", "bf16"])
def precise_run(
    request: pytest.FixtureRequest,
    pictures_run: Path,
    with_precision: Callable[[Path, str], Path],
) -> tuple[str, Path]:
    """(precision, `pictures_run` with it)."""
    return request.param, with_precision(pictures_run, request.param)
