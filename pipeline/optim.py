"""The optimizer, and its learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

from pipeline.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Linear warm-up to `config.lr`, then the schedule; a decay reaches 0 after the last step.

    `wsd` is warm-up, stable, decay (Hu et al., 2024, arXiv:2404.06395). `onecycle` warms up and
    decays along cosines, from lr / 25 to lr and down to lr / 250000 in the last step (Smith and
    Topin, 2017, arXiv:1708.07120), as torch's `OneCycleLR` does, momentum left alone.
    """
    if step < config.warmup_steps and config.schedule != "onecycle":
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
        case "onecycle":
            return config.lr * _one_cycle(step, config.warmup_steps - 1, total_steps - 1)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, config: OptimConfig, total_steps: int
) -> float:
    """Gives the optimizer the `learning_rate` of a step, and returns it."""
    rate = learning_rate(step, config, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _one_cycle(step: int, peak: int, last: int) -> float:
    """A share of the largest rate: it is reached at step `peak`, the smallest at `last`."""
    begin, end, done = 1 / 25, 1.0, step / peak if peak else 1.0
    if step > peak:
        begin, end, done = 1.0, 1 / 25e4, (step - peak) / max(1, last - peak)
    return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * done))


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
