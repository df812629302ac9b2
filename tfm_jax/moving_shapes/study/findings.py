"""The findings that the report of a study needs: metrics by seed, and differences between arms with their sign."""

from typing import NamedTuple

from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.results import Results
from tfm_jax.moving_shapes.study.runs import Study
from tfm_jax.moving_shapes.study.statistics import Estimate, paired_difference


class Findings(NamedTuple):
    """A study with its results."""

    study: Study
    results: Results

    @property
    def steps(self) -> int:
        return self.study.run.train.steps

    @property
    def arms(self) -> tuple[str, ...]:
        return self.study.size.arms

    def steps_of(self, arm: str) -> int:
        """Return the number of training steps when arms are compared at equal steps; 0 for the base model."""
        return 0 if arm == protocol.BASE else self.steps

    def by_seed(self, arm: str, metric: str, steps: int | None = None) -> dict[int, float | None]:
        """Map each seed to a metric of an arm; None if the run diverged or the metric is not finite."""
        runs = self.results.all("run", arm=arm, steps=steps or self.steps_of(arm))
        return {run["seed"]: run.get("metrics", {}).get(metric) for run in runs if run["seed"] < self.study.size.seeds}

    def difference(self, arm: str, other: str, metric: str, steps: int | None = None) -> Estimate | None:
        """Estimate the metric of `arm` less that of `other`, paired by seed; `steps` selects the runs of `arm` only."""
        return paired_difference(self.by_seed(arm, metric, steps), self.by_seed(other, metric))


def sign(difference: Estimate | None, metric: str) -> int | None:
    """Return 1 for better, -1 for worse, 0 if no difference is detected, None if the difference does not exist."""
    if difference is None:
        return None
    if not difference.excludes_zero:
        return 0
    return 1 if (difference.value < 0) == (metric in protocol.LOWER_IS_BETTER) else -1
