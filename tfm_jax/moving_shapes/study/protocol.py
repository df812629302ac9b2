"""What the study compares and how it decides, fixed before any run of it.

The metrics and their thresholds are those of `tfm_jax.moving_shapes.evaluation`. An arm is an objective. All arms of a
seed share the base weights, initial adapters, order of clips, noise, noise levels, optimizer, prompts and the noise of
the samples.
"""

from typing import Any, NamedTuple

from tfm_jax.config import ObjectiveConfig


class Arm(NamedTuple):
    """One way to fine-tune."""

    about: str
    objective: dict[str, Any]
    """Fields of `objective` in the configuration that differ between arms; others are the configuration's."""


ARMS = {
    "fm": Arm("straight path, mean squared error", {"kind": "fm"}),
    "fm_direction": Arm("straight path, TFM's loss", {"kind": "fm_direction"}),
    "tfm_mse": Arm("TFM's path, mean squared error", {"kind": "tfm_mse"}),
    "tfm": Arm("TFM's path and loss", {"kind": "tfm"}),
    "fm_warp": Arm("straight path on the mean of TFM's clocks, mean squared error", {"kind": "fm_warp"}),
    "tfm_rho2": Arm("TFM, stronger pull between frames", {"kind": "tfm", "rho": 2.0}),
    "tfm_rho8": Arm("TFM, weaker pull between frames", {"kind": "tfm", "rho": 8.0}),
    "tfm_beta0.3": Arm("TFM, less weight on the residual", {"kind": "tfm", "beta": 0.3}),
    "tfm_beta3": Arm("TFM, more weight on the residual", {"kind": "tfm", "beta": 3.0}),
}
"""Name -> arm. With rho = 2 the system of TFM has a solution for clips like these, though not for every clip."""

BASE = "base"
"""The model without a LoRA, sampled like an arm."""
BASELINE = "fm"
"""Every arm is compared with this one, seed by seed."""
TREATMENT = "tfm"
"""The comparison that the study is for is of this arm with the baseline; all others explain it."""

PRIMARY = ("residual", "frechet")
"""The metrics that decide: how far centres are from the law of motion, and how far the motions are from real ones as
a distribution."""
GUARDS = ("tracked", "moving")
"""Metrics that must not get worse: a frozen clip keeps to every law, and a lost object is left out of distances."""
SECONDARY = (
    "faithful", "speed", "smoothness_gap", "variation", "whole", "colours", "shapes", "directions", "wasserstein",
)  # fmt: skip
"""Shown, and deciding nothing."""

LESS_IS_BETTER = {"residual", "frechet", "smoothness_gap", "variation", "wasserstein"}
MORE_IS_BETTER = {"tracked", "moving", "faithful", "whole", "colours", "shapes", "directions"}

CONTRASTS = (
    ("tfm", "fm", "path and loss together"),
    ("fm_direction", "fm", "the loss alone, on the straight path"),
    ("tfm_mse", "fm", "the path alone, with the mean squared error"),
    ("fm_warp", "fm", "the mean clock alone"),
    ("tfm_mse", "fm_warp", "what the path does to frames apart from their mean clock"),
    ("tfm", "fm_direction", "the path, with TFM's loss"),
)
"""(arm, compared with, what the two differ in)."""

RULE = (
    "An arm is better on a metric where the interval lies on the better side of 0. It moves better where it is better "
    "on every deciding metric, and worse on none of those that must not get worse."
)

LEVEL = 0.95
"""Of every interval. A difference is seen where the interval over seeds leaves out zero."""
RESAMPLES = 10_000
SAME_TIME = 0.05
"""Costs per step that differ by less than this share, or not beyond their noise, count as equal. An arm of another cost
is trained a second time, for as many steps as fit into the baseline's time."""

SIGMAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Noise levels at which the sensitivity to the order of frames is measured."""
FIXED_LOSS = ObjectiveConfig(kind="fm")
"""The one loss by which that is measured, in every arm."""
