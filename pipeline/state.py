"""What a run remembers besides tensors: one step and what was seen up to it."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.metrics import is_better
from pipeline.order import DIGEST_START


@dataclass
class TrainState:
    """`step` counts finished steps: the next one to do. All else is for people and for proof."""

    step: int = 0
    order_digest: str = DIGEST_START
    """rolling hash of the keys of every consumed sample, see `pipeline.order.fold_digest`"""
    skipped_steps: int = 0
    """steps whose gradient was not finite"""
    damaged: dict[str, str] = field(default_factory=dict)
    """the ledger: for each sample that could not be read, by its `Batch.bad_names`, a line (shard,
    key, cause), in the order in which they were met; each keeps its place with weight 0 whenever it
    comes"""
    best_step: int | None = None
    best_metric: float | None = None
    stale_validations: int = 0
    """validations since the best one"""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """fp16: state of the gradient scaler, numbers only"""

    def judge(self, metric: str, value: float) -> bool:
        """Takes note of a validation after this step; whether it is the best so far.

        Of equals the later is the better one: it has seen more. But patience counts it as none.
        """
        better = is_better(metric, value, self.best_metric)
        self.stale_validations = 0 if better else self.stale_validations + 1
        if better or value == self.best_metric:
            self.best_metric, self.best_step = value, self.step
            return True
        return False
