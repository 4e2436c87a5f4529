"""The optimizer, and its learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

from pipeline.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Linear warm-up to `config.lr`, then the schedule; a decay reaches 0 after the last step.

    `wsd` is warm-up, stable, decay (Hu et al., 2024, arXiv:2404.06395).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    left = 1 - (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * left
        case "cosine":
            return config.lr * 0.5 * (1 - math.cos(math.pi * left))
        case "wsd":
            return config.lr * min(1.0, (total_steps - step) / max(1, config.decay_steps))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum; biases and norm scales are not decayed."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2))


def state_to_come(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer will keep of a parameter from its first step on: shapes, not values."""
    if not parameter.requires_grad:
        return {}
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": parameter}
    return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
