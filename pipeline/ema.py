"""The exponential moving average of a model's parameters: what a run is judged by, when asked for.

"Acceleration of Stochastic Approximation by Averaging" (Polyak and Juditsky, 1992) is the idea; the
shorter memory of the first steps is that of TensorFlow's `ExponentialMovingAverage`.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Ema:
    """Averages beside the parameters: of a sharded model, each rank's of its part.

    Args:
        model: where its weights stay, that is after `pipeline.parallel.share_model`.
        decay: what an average keeps of itself in a step, in [0, 1); 0: nothing is averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters()) if decay else {}
        self.average: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """After a step, the `num_updates`-th from 1: the first ones forget sooner, or the initial
        weights would long be part of the average."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        for name, parameter in self._parameters.items():
            self.average[name].lerp_(parameter, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages, and afterwards its parameters again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        # In place: DDP, FSDP2 and cuDNN all remember where the parameters lie.
        for name, parameter in self._parameters.items():
            held = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(held)
