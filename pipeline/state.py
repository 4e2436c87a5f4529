"""What a run remembers besides tensors: one step and what was seen up to it, as JSON."""

import dataclasses
import json
from dataclasses import dataclass

from pipeline.order import DIGEST_START


@dataclass
class TrainState:
    """`step` counts finished steps: the next one to do. All else is for people and for proof."""

    step: int = 0
    order_digest: str = DIGEST_START
    """rolling hash of the keys of every consumed sample, see `pipeline.order.fold_digest`"""
    skipped_steps: int = 0
    """steps whose gradient was not finite"""
    bad_samples: int = 0
    """samples that could not be read and kept their place with weight 0"""
    best_step: int | None = None
    best_metric: float | None = None
    stale_validations: int = 0
    """validations since the best one"""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TrainState":
        """Raises ValueError or TypeError when the text is of another form."""
        return cls(**json.loads(text))
