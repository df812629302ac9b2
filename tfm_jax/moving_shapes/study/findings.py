"""The findings that the report of a study needs: metrics by seed, differences between arms, and the verdicts."""

from typing import Literal, NamedTuple

import numpy as np

from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.plan import Study, planned_runs
from tfm_jax.moving_shapes.study.power import family_size
from tfm_jax.moving_shapes.study.results import Record, Results
from tfm_jax.moving_shapes.study.statistics import Estimate, corrected_level, paired_difference

GUARDED = (*protocol.PRIMARY, *protocol.GUARDS)


class Cell(NamedTuple):
    """One law of motion and one length of training."""

    law: str
    steps: int


Verdict = Literal[
    "pending", "missing", "better", "guarded", "partly better", "undetected", "mixed", "partly worse", "worse"
]
"""pending: seeds are still to be run. missing: a metric is not finite in some run. guarded: better on the deciding
metrics, but worse on one that must not get worse. partly: on one deciding metric only. mixed: better on one deciding
metric, worse on another."""


class Findings(NamedTuple):
    """A study with its results and those of its pilot."""

    study: Study
    results: Results
    pilot: Results

    @property
    def last(self) -> int:
        """The longest training."""
        return self.study.size.lengths[-1]

    @property
    def cells(self) -> list[Cell]:
        return [Cell(law, steps) for law in self.study.size.laws for steps in self.study.size.lengths]

    @property
    def progress(self) -> tuple[int, int]:
        """The number of runs that are done, and the number that are planned."""
        runs = list(planned_runs(self.study))
        return sum(run.is_done(self.results) for run in runs), len(runs)

    @property
    def corrected(self) -> float:
        """The confidence level of the intervals in the confirmatory family."""
        return corrected_level(family_size(self.study))

    def records(self, cell: Cell, arm: str) -> dict[int, Record]:
        """Map each seed that is done to the record of an arm; the base model is the same in the cells of a law."""
        found = {}
        for seed in range(self.study.size.seeds):
            run = self.study.find_run(cell.law, arm, seed)
            steps = 0 if arm == protocol.BASE else cell.steps
            if record := self.results.one("run", **run.keys, steps=steps):
                found[seed] = record
        return found

    def by_seed(self, cell: Cell, arm: str, metric: str) -> dict[int, float | None]:
        """Map each seed to a metric of an arm; None if the run diverged or the metric is not finite."""
        records = self.records(cell, arm)
        return {seed: record.get("metrics", {}).get(metric) for seed, record in records.items()}

    def mean(self, cell: Cell, arm: str, metric: str) -> float | None:
        """Return the mean over the seeds with a finite number."""
        numbers = [value for value in self.by_seed(cell, arm, metric).values() if value is not None]
        return float(np.mean(numbers)) if numbers else None

    def difference(self, cell: Cell, arm: str, other: str, metric: str) -> Estimate | None:
        """Estimate the metric of `arm` less that of `other`, paired by seed.

        The interval is corrected if the comparison belongs to the confirmatory family.
        """
        confirmatory = (arm, other) == (protocol.TREATMENT, protocol.BASELINE) and metric in protocol.PRIMARY
        level = self.corrected if confirmatory else protocol.CONFIDENCE
        return paired_difference(self.by_seed(cell, arm, metric), self.by_seed(cell, other, metric), level)

    def sensitivity(self, law: str, arm: str) -> list[dict[int, float | None]]:
        """Map, for each of SIGMAS, each seed to the ratio of the losses with permuted and with ordered frames."""
        losses = {seed: run.get("sensitivity") for seed, run in self.records(Cell(law, self.last), arm).items()}
        return [
            {seed: loss["permuted"][n] / loss["ordered"][n] if loss else None for seed, loss in losses.items()}
            for n in range(len(protocol.SIGMAS))
        ]

    def seeds_done(self, cell: Cell) -> int:
        """Return the number of seeds with which both the treatment and the baseline are done."""
        return len(self.records(cell, protocol.TREATMENT).keys() & self.records(cell, protocol.BASELINE).keys())

    def verdict(self, cell: Cell) -> Verdict:
        """Decide by RULE whether the treatment moves better than the baseline."""
        if self.seeds_done(cell) < self.study.size.seeds:
            return "pending"
        signs = {m: sign(self.difference(cell, protocol.TREATMENT, protocol.BASELINE, m), m) for m in GUARDED}
        if None in signs.values():
            return "missing"
        better, worse = ([m for m in protocol.PRIMARY if signs[m] == s] for s in (1, -1))
        if better and worse:
            return "mixed"
        if len(better) == len(protocol.PRIMARY):
            return "guarded" if any(signs[m] == -1 for m in protocol.GUARDS) else "better"
        if worse:
            return "worse" if len(worse) == len(protocol.PRIMARY) else "partly worse"
        return "partly better" if better else "undetected"


def sign(difference: Estimate | None, metric: str) -> int | None:
    """Return 1 for better, -1 for worse, 0 if no difference is detected, None if the difference does not exist."""
    if difference is None:
        return None
    if not difference.excludes_zero:
        return 0
    return 1 if (difference.value < 0) == (metric in protocol.LOWER_IS_BETTER) else -1
