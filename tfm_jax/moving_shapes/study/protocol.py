"""What the study compares and how it decides, fixed before its first run.

The metrics and their thresholds are those of `tfm_jax.moving_shapes.evaluation`. An arm is an objective for training.
For a given law of motion and seed, all arms share the base weights, initial adapters, order of clips, noise, noise
levels, optimizer, prompts and sampling noise.

Every arm trains once, to the longest of LENGTHS, with a learning rate that is constant after its warm-up. The state
after each of LENGTHS is sampled and measured. Arms are compared after equal numbers of steps only: in an earlier study
the cost of a step was the same in all arms within 5 %, so equal steps were also equal time. The cost is measured again,
and the report says where it differs by more than COST_TOLERANCE.

Steps and learning rate were chosen with plain flow matching alone, in a pilot with seeds of its own.
"""

from typing import Any, NamedTuple

from tfm_jax.config import ObjectiveConfig


class Arm(NamedTuple):
    """A way to fine-tune."""

    description: str
    objective: dict[str, Any]
    """The fields of `objective` that the arm sets; the others come from the configuration."""


# --- What is compared ------------------------------------------------------------------------------------------------

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
FIRST_LAW_ONLY = ("tfm_rho2", "tfm_rho8", "tfm_beta0.3", "tfm_beta3")
"""Arms that are run on the first law only."""

BASE = "base"
"""Name of the model without a LoRA, which is sampled like an arm."""
BASELINE = "fm"
"""The arm with which every other arm is compared, seed by seed."""
TREATMENT = "tfm"
"""The arm whose comparison with the baseline answers the question of the study; the other arms explain the answer."""

LAWS = ("gravity", "returning")
"""Laws of motion to fine-tune on, one model for each. The base model knows neither, and its samples for their captions
are several pixels from obeying them. The first law is the demo's."""
SEEDS = 8
"""Number of training seeds: 0, 1, ..."""
LENGTHS = (225, 675, 1350)
"""Numbers of training steps after which an arm is measured: early, middle, and late. In the pilot, plain flow matching
changed the most before the first, and from the second to the last its distance from gravity fell by 14 % only."""
LEARNING_RATE = 3e-3
"""The learning rate of all arms, chosen in the pilot."""
BATCH_SIZE = 8
CLIPS = 1024
"""Number of training clips of each law."""
PROMPTS = 64
"""Number of captions to sample. No training clip has one of them."""
REFERENCE = 256
"""Number of real clips with which samples are compared."""

PILOT_SEEDS = (1000, 1001)
"""Seeds of the pilot, which the study does not use."""
PILOT_LEARNING_RATES = (1e-3, 3e-3)
PILOT_LENGTHS = (75, 225, 675, 1350)
"""Numbers of steps after which the pilot measures, among them those of the study."""

# --- Metrics ---------------------------------------------------------------------------------------------------------

PRIMARY = ("residual", "frechet")
"""The deciding metrics: how far the objects are from obeying the law of motion, and how far the distribution of motions
is from the real one."""
GUARDS = ("tracked", "moving")
"""Metrics that must not get worse. They are needed because a frozen clip can obey a law of motion, and because the
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

# --- How the study decides -------------------------------------------------------------------------------------------

ERROR_RATE = 0.05
"""Probability that chance alone makes at least one interval of the confirmatory family exclude 0.

The family is: TREATMENT less BASELINE, on each metric of PRIMARY, after each of LENGTHS, for each of LAWS, which makes
2 x 3 x 2 = 12 comparisons. All other comparisons are exploratory: they may explain a finding but establish none.

The intervals are t intervals of the paired differences, and Bonferroni's correction divides ERROR_RATE by the size of
the family. A bootstrap over 8 seeds cannot reach quantiles that extreme: its intervals never extend beyond the
smallest and largest of the 8 numbers, and are too short. The t interval assumes that the differences are roughly
normal; if the two arms do not differ, their difference is at least symmetric. Holm's method would detect slightly more,
but has no simple intervals that agree with its decisions."""
CONFIDENCE = 0.95
"""Confidence level of each exploratory interval, without correction. The metrics of GUARDS use this level too: the
correction would hide harm."""
POWER = 0.8
"""The smallest detectable difference is the one that the study would detect with this probability."""

RULE = (
    "An arm is better on a metric if the whole interval of the difference is on the better side of 0. An arm moves "
    "better if it is better on every deciding metric and worse on none of the metrics that must not get worse."
)

# --- Cost and sensitivity --------------------------------------------------------------------------------------------

ROUNDS = 30
"""Number of rounds in which the cost of a step is measured."""
COST_TOLERANCE = 0.05
"""Costs per step count as equal if they differ by less than this fraction."""

SIGMAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Noise levels at which the sensitivity to the order of frames is measured, after the longest training."""
SENSITIVITY_LOSS = ObjectiveConfig(kind="fm")
"""The loss with which the sensitivity to the order of frames is measured, whatever the arm was trained with."""
SENSITIVITY_CLIPS = 32
"""Maximum number of held-out clips on which the sensitivity is measured."""
