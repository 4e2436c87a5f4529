"""Initial weights: those of a model exported before, or of one of torchvision's, from a file; or
torchvision's own, by its own loader.

Tensors that fit by name and shape are copied, the rest of the model stays as it was initialised.
A file is only ever read as tensors: nothing in it is run.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.export import MODEL_NAME, read_export
from pipeline.models import ModelConfig, Seq2SeqConfig
from pipeline.ranks import Ranks, said_once
from pipeline.resume import together
from shards.format import TokenizerEntry
from shards.storage import UserError

TORCHVISION = "torchvision"
"""of run.init: torchvision's default weights of the model's encoder"""

_PREFIXES = ("", "encoder.")
_OF_TOKENS = ("embedding.", "head.")
_SHOWN_NAMES = 3


@dataclass(frozen=True)
class WarmStart:
    """What was taken from `source`: names of the model's tensors, and of the file's left out."""

    source: str
    taken: tuple[str, ...]
    left_out: tuple[str, ...]
    num_of_model: int

    @property
    def line(self) -> str:
        """The report: how many of how many tensors were taken, and what was left out."""
        found = len(self.taken) + len(self.left_out)
        line = (
            f"initial weights: {len(self.taken)} of the {found} tensors of {self.source}, for "
            f"{len(self.taken)} of the model's {self.num_of_model}"
        )
        return f"{line}; left out: {_shown(self.left_out)}" if self.left_out else line


def begin_from(
    init: str,
    config: ModelConfig,
    model: nn.Module,
    ranks: Ranks,
    tokenizer: TokenizerEntry | None = None,
) -> WarmStart:
    """What run.init asks for: `warm_start` on every rank, which all call together.

    Args:
        tokenizer: the dataset's.

    Raises:
        UserError: as `warm_start`; or torchvision's weights cannot be had.
    """
    if init != TORCHVISION:
        with said_once():
            return warm_start(model, init, tokenizer)
    with said_once():
        name = config.encoder if isinstance(config, Seq2SeqConfig) else "cnn"
        if name == "cnn":
            raise UserError(
                "run.init = torchvision: this model has no encoder of torchvision's; set "
                "model.encoder = resnet18, say"
            )
    with together(ranks):  # once a node: the others find it in the cache
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _download(name)
    with said_once():
        return _copy(*_download(name), model)


def warm_start(
    model: nn.Module, path: str | Path, tokenizer: TokenizerEntry | None = None
) -> WarmStart:
    """Copies into `model`, in place, every tensor of the file that fits by name and shape.

    A name of the model's encoder may do without `encoder.`, as torchvision's names do:
    `layer1.0.conv1.weight` of a ResNet is `encoder.layer1.0.conv1.weight` here. Values are
    converted to the model's type.

    Args:
        model: the bare model, on the CPU.
        path: the folder of an export, a `.safetensors` file, or a `.pth` or `.pt` file of a state
            dict. The latter two may hold anything: they are read with `weights_only=True`.
        tokenizer: the dataset's. An export with another one gives neither embedding nor output
            layer, where each row is a token's.

    Raises:
        UserError: the file cannot be read or holds other things than tensors, or nothing fits.
    """
    path, foreign = Path(path), False
    if path.is_dir():
        text = read_export(path).tokenizer_json  # with all hashes checked
        if text is not None and tokenizer is not None:
            foreign = hashlib.sha256(text.encode()).hexdigest() != tokenizer.sha256
        path = path / MODEL_NAME
    return _copy(str(path), _read_tensors(path), model, _OF_TOKENS if foreign else ())


def _download(name: str) -> tuple[str, dict[str, Tensor]]:
    """What torchvision calls its default weights of a model, and the weights.

    They come from torch.hub's cache, and into it when they are not there.
    """
    # Imported where it is used: it takes a while, and other runs do without it.
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT
    file = weights.url.rpartition("/")[2]
    try:
        # A file in the cache could be anyone's: it is read as tensors alone.
        found = weights.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except MemoryError:
        raise
    except Exception as error:  # of the network, the disk, or the file
        raise UserError(
            f"run.init = torchvision: {weights.url} cannot be had ({type(error).__name__}); where "
            f"there is no network, set run.init to a copy of that file, or put it into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints' / file}"
        ) from error
    return f"torchvision's {weights}", _without_counters(found)


@torch.no_grad()
def _copy(
    source: str, tensors: Mapping[str, Tensor], model: nn.Module, without: tuple[str, ...] = ()
) -> WarmStart:
    own = model.state_dict()
    taken, left_out = [], []
    for name, tensor in tensors.items():
        names = [prefix + name for prefix in _PREFIXES]
        target = next((one for one in names if one in own and _fits(own[one], tensor)), None)
        if target is None or target.startswith(without):
            left_out.append(name)
        else:
            own[target].copy_(tensor)
            taken.append(target)
    if not taken:
        raise UserError(
            f"run.init: {source}: none of its {len(tensors)} tensors fits the model by name and "
            f"shape (it has {_shown(list(tensors))}; the model {_shown(list(own))})"
        )
    return WarmStart(source, tuple(taken), tuple(left_out), len(own))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file or folder"
        raise UserError(f"run.init: {path}: {what}")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(
            f"run.init: {path}: name an export's folder, a .safetensors file, or a .pth or .pt "
            "file of a state dict"
        )
    found: Any
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            with warnings.catch_warnings():  # of tensors that will not fit anyway
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"run.init: {path}: {error.strerror or error}") from error
    except Exception as error:
        # The readers raise nearly anything for damaged bytes. torch's text is not repeated: it
        # tells how to run what the file holds.
        raise UserError(
            f"run.init: {path}: not a file of tensors alone ({type(error).__name__}); nothing in "
            "it was run; save the state dict as .safetensors"
        ) from error
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise UserError(f"run.init: {path}: not a state dict of named tensors")
    return _without_counters(found)


def _without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Less a counter of BatchNorm's training, which no frozen one has."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }


def _fits(own: Tensor, tensor: Tensor) -> bool:
    # A .pth file may also hold tensors without values, sparse ones, and ragged ones.
    is_plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)
    same_kind = tensor.is_floating_point() == own.is_floating_point()
    return is_plain and same_kind and tensor.shape == own.shape


def _shown(names: list[str] | tuple[str, ...]) -> str:
    more = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
