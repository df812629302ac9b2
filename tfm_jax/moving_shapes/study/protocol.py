"""What the study compares and how it decides, fixed before its first run.

The metrics and their thresholds are those of `tfm_jax.moving_shapes.evaluation`. An arm is an objective for training.
For a given seed, all arms share the base weights, initial adapters, order of clips, noise, noise levels, optimizer,
prompts and sampling noise.
"""

from typing import Any, NamedTuple

from tfm_jax.config import ObjectiveConfig


class Arm(NamedTuple):
    """A way to fine-tune."""

    description: str
    objective: dict[str, Any]
    """The fields of `objective` that the arm sets; the others come from the configuration."""


ARMS = {
    "fm": Arm("straight path, mean squared error", {"kind": "fm"}),
    "fm_direction": Arm("straight path, TFM's loss", {"kind": "fm_direction"}),
    "tfm_mse": Arm("TFM's path, mean squared error", {"kind": "tfm_mse"}),
    "tfm": Arm("TFM's path and loss", {"kind": "tfm"}),
    "fm_warp": Arm("straight path at TFM's mean noise level, mean squared error", {"kind": "fm_warp"}),
    "tfm_rho2": Arm("TFM, stronger pull between frames", {"kind": "tfm", "rho": 2.0}),
    "tfm_rho8": Arm("TFM, weaker pull between frames", {"kind": "tfm", "rho": 8.0}),
    "tfm_beta0.3": Arm("TFM, less weight on the residual", {"kind": "tfm", "beta": 0.3}),
    "tfm_beta3": Arm("TFM, more weight on the residual", {"kind": "tfm", "beta": 3.0}),
}
"""Name -> arm. With rho = 2 the linear system of TFM has a solution for clips like these, but not for every clip."""

BASE = "base"
"""Name of the model without a LoRA, which is sampled like an arm."""
BASELINE = "fm"
"""The arm with which every other arm is compared, seed by seed."""
TREATMENT = "tfm"
"""The arm whose comparison with the baseline answers the question of the study; the other arms explain the answer."""

PRIMARY = ("residual", "frechet")
"""The deciding metrics: how far the objects are from obeying the law of motion, and how far the distribution of motions
is from the real one."""
GUARDS = ("tracked", "moving")
"""Metrics that must not get worse. They are needed because a frozen clip obeys the law of bouncing, and because the
Frechet distance leaves out clips that lose an object."""
SECONDARY = (
    "faithful", "speed", "smoothness_gap", "variation", "whole", "colours", "shapes", "directions", "wasserstein",
)  # fmt: skip
"""Metrics that are shown but not used for the decision."""

LOWER_IS_BETTER = {"residual", "frechet", "smoothness_gap", "variation", "wasserstein"}
HIGHER_IS_BETTER = {"tracked", "moving", "faithful", "whole", "colours", "shapes", "directions"}

CONTRASTS = (
    ("tfm", "fm", "path and loss together"),
    ("fm_direction", "fm", "the loss alone, on the straight path"),
    ("tfm_mse", "fm", "the path alone, with the mean squared error"),
    ("fm_warp", "fm", "the mean noise level alone"),
    ("tfm_mse", "fm_warp", "the path, apart from its mean noise level"),
    ("tfm", "fm_direction", "the path, with TFM's loss"),
)
"""(arm, other arm, what the two differ in)."""

RULE = (
    "An arm is better on a metric if the whole interval of the difference is on the better side of 0. An arm moves "
    "better if it is better on every deciding metric and worse on none of the metrics that must not get worse."
)

COST_TOLERANCE = 0.05
"""Costs per step count as equal if they differ by less than this fraction, or if the interval of their ratio contains
1. An arm with a different cost is trained a second time, for as many steps as fit into the baseline's time."""

SIGMAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Noise levels at which the sensitivity to the order of frames is measured."""
SENSITIVITY_LOSS = ObjectiveConfig(kind="fm")
"""The loss with which the sensitivity to the order of frames is measured, whatever the arm was trained with."""
