"""What follows from how far training is: the learning rate, and the feedback's strength.

Exits are trained alone first, then their feedback is ramped up.
"""

import math

from srdeploy.train.config import TrainConfig


def ramp(progress: float, start: float, length: float) -> float:
    """Strength of the feedback, 0..1: 0 up to `start`, then linear, 1 from `start + length` on.

    All three are shares of the whole training, 0..1. With `length` 0 it steps from 0 to 1 at
    `start`. An exit teaches others only after it has learnt from ground truth: the paper's authors
    switch feedback on after a quarter of training (README of their code); the ramp avoids the jump.
    """
    if length <= 0:
        return 1.0 if progress >= start else 0.0
    return min(1.0, max(0.0, (progress - start) / length))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 0 .. steps - 1: linear warm-up times poly decay, Chen et al., DeepLab (TPAMI
    2018)."""
    warm = min(1.0, (step + 1) / (config.warm_up + 1))
    decay = math.pow(1 - step / config.steps, config.power)
    return config.lr * warm * decay
