"""How the processes of a run share one model: whole on each (DDP), or in parts (FSDP2).

The launcher decides, through the environment that `accelerate launch` sets for
`distributed_type: FSDP`; no configuration key does, so a run may change it when it is resumed.
The loop sees one set of names, and the same losses and weights up to rounding. Accelerate starts
the processes, names the device, and scales and clips gradients in both; the sharding is not left to
it, because on a CPU it silently does none, and what is tested there is to be what runs on GPUs.
"""

import contextlib
import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from pipeline.batch import Batch
from shards.storage import UserError

_SWITCH = "ACCELERATE_USE_FSDP"
# What the launcher can ask for and would not get; it has a default for each.
_ONLY = {
    "FSDP_VERSION": "2",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


class Round(NamedTuple):
    """One forward and backward pass of a step, under `sync`."""

    batch: Batch
    share: int
    """1, or 0 for a pass whose loss counts for nothing"""
    sync: AbstractContextManager[Any]
    """keeps gradients on this rank, but for the step's last pass"""


class Replicated:
    """The whole model on every rank, gradients averaged by DDP; or one process alone."""

    label = ""

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.model = model.to(accelerator.device)
        self.accelerator = accelerator
        self.wrapped: nn.Module = self.model

    def prepare(self, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """The model as training calls it, under autocast, and the optimizer as it steps."""
        self.wrapped, wrapped_optimizer = self.accelerator.prepare(self.model, optimizer)
        return self.wrapped, wrapped_optimizer

    def rounds(self, batches: Sequence[Batch], num_micro: int) -> Iterator[Round]:
        """The passes of a step of `num_micro` microbatches, `batches` of them this rank's."""
        for place, batch in enumerate(batches):
            last = place == len(batches) - 1
            yield Round(batch, 1, contextlib.nullcontext() if last else self._without_sync())

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scales the gradient down to `max_norm`; its norm before that, over all ranks."""
        norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        return norm

    def whole_model(self) -> nn.Module:
        """A bare model to call freely, without the other ranks. All ranks ask for it together."""
        return self.model

    def _without_sync(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.no_sync(self.wrapped)
        return context


class Sharded:
    """Of each parameter, its gradient and its optimizer state, an equal part on every rank.

    FSDP2 (`fully_shard`): each child of the model is one group, gathered when its forward or
    backward pass needs it and freed after. Under bf16 the parameters are gathered in float32 and
    autocast chooses the kernels: a `MixedPrecisionPolicy` would halve what is sent, but run
    normalisation, softmax and losses in bf16 too, which autocast, and so DDP, does not.
    """

    label = " (FSDP2)"

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        # Here, not above: it takes most of a second, and other commands import this module too.
        from torch.distributed.fsdp import FSDPModule, fully_shard

        # The network without its weights, for `whole_model`: a sharded one cannot be copied.
        nothing = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in model.parameters()
        }
        self._skeleton = copy.deepcopy(model, nothing)
        # FSDP2 takes row-major parameters alone; images stay channels last, and convolutions so.
        model.to(memory_format=torch.contiguous_format)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        # Each call moves what it shards to the device: it never holds the whole model.
        for child in model.children():
            if any(True for _ in child.parameters()):
                fully_shard(child, mesh=mesh, reshard_after_forward=reshard)
        root = fully_shard(model, mesh=mesh)
        assert isinstance(root, FSDPModule)
        self._root = root
        self.model = model
        self.accelerator = accelerator
        # Of an LSTM or GRU: cuDNN wants its weights in one piece, and they are gathered one by one.
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous")
        # Many layers return views (in torch 2.14 linear ones too), which is harmless as long as
        # nothing is done to them in place: nothing is, as equal losses and gradients show.
        view = r"FSDP2-wrapped module \(\w+\) returned a view"
        warnings.filterwarnings("ignore", view)

    def prepare(self, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """As `Replicated.prepare`."""
        # What Accelerate calls evaluation is autocast without DDP.
        wrapped = self.accelerator.prepare_model(
            self.model, device_placement=False, evaluation_mode=True
        )
        return wrapped, self.accelerator.prepare_optimizer(optimizer)

    def rounds(self, batches: Sequence[Batch], num_micro: int) -> Iterator[Round]:
        """As many on every rank, since each pass gathers parameters from all of them.

        A rank with fewer microbatches repeats its last one, with the same dropout, for nothing.
        So a pass that counts for nothing is finite whenever the one that counts is, and zero
        times its gradient is zero.
        """
        most = -(-num_micro // self.accelerator.num_processes)
        for place in range(most):
            own = place < len(batches)
            sync = contextlib.nullcontext() if place == most - 1 else self._without_sync()
            yield Round(batches[place] if own else batches[-1], int(own), sync)

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """As `Replicated.clip_grad_norm`."""
        norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        return _whole(norm)

    def whole_model(self) -> nn.Module:
        """A copy with all parameters, for as long as the caller keeps it."""
        weights = {}
        for name, empty in self._skeleton.state_dict().items():
            weights[name] = torch.empty_like(empty, device=self.accelerator.device)
        for name, tensor in self.model.state_dict().items():
            weights[name].copy_(_whole(tensor))
        whole = copy.deepcopy(self._skeleton)
        whole.load_state_dict(weights, assign=True)
        return whole.to(self.accelerator.device)

    @contextlib.contextmanager
    def _without_sync(self) -> Iterator[None]:
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)


Parallel = Replicated | Sharded


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that the ranks hold in parts, on each of them."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_model(model: nn.Module, accelerator: Accelerator) -> Parallel:
    """Puts a model on the run's devices, in place. Its optimizer is built after."""
    if is_sharded() and accelerator.num_processes > 1:
        return Sharded(model, accelerator)
    return Replicated(model, accelerator)


def is_sharded() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get(_SWITCH, "false").lower() == "true"


def check_launcher(precision: str, *, decodes: bool = False) -> None:
    """Raises `UserError` when the launcher asks for what sharding here does not do.

    Args:
        decodes: whether training reads the model out, which takes a number of passes that differs
            from rank to rank, and each pass of a sharded model needs all of them.
    """
    if not is_sharded():
        return
    for name, only in _ONLY.items():
        found = os.environ.get(name, "1" if name == "FSDP_VERSION" else only).lower()
        if found != only:
            key = name.lower()
            raise UserError(
                f"the launcher sets {name} = {found}: pixloom shards with {key} = {only} alone; "
                f"set that in its configuration file, or take distributed_type: MULTI_GPU for DDP"
            )
    if precision == "fp16":
        raise UserError(
            "optim.precision = fp16: gradients of a sharded model are not scaled; take bf16, "
            "or distributed_type: MULTI_GPU in the launcher's configuration file"
        )
    if decodes:
        raise UserError(
            "model.risk_weight: a sharded model cannot decode while it trains; take "
            "distributed_type: MULTI_GPU in the launcher's configuration file"
        )


@contextlib.contextmanager
def unsharded_accelerate() -> Iterator[None]:
    """Keeps the launcher's wish from Accelerate, which would act on it on GPUs alone."""
    wish = os.environ.pop(_SWITCH, None)
    try:
        yield
    finally:
        if wish is not None:
            os.environ[_SWITCH] = wish
