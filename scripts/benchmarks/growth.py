"""How the time of a training step grows with tokens, frames, batch, layers and rank, beside the count of operations.

The ratio is 1 where the time grows as the operations do, and above 1 where it grows less.
"""

import dataclasses
from collections.abc import Iterator

from benchmarks import ours
from benchmarks.sizes import Sizes, Work
from benchmarks.timing import Row, take_turns
from tfm_jax.config import LoraConfig
from tfm_jax.flops import training_flops

SUBJECT, PEER = "growth", "operations, scaled from the first row"
REMAT = "attention"


def measure(sizes: Sizes) -> Iterator[Row]:
    cases = variants(sizes.growth)
    first = next(iter(cases))
    programs = {}
    for name, work in cases.items():
        programs[name] = ours.training(ours.adapted(work, sizes), ours.batch(work, sizes), REMAT)
    times = take_turns(programs, sizes.budget)
    for name, work in cases.items():
        expected = times[first] * operations(work) / operations(cases[first])
        note = f"{operations(work) / times[name] / 1e12:.3g} TFLOP/s"
        yield Row(SUBJECT, name, f"remat={REMAT}", times[name], PEER, expected, note)


def variants(work: Work) -> dict[str, Work]:
    """Return the work itself, and with one size at a time doubled and quadrupled."""
    frames, height, width = work.size
    cases = {f"a step, {work}": work}
    for factor in (2, 4):
        layers = dataclasses.replace(work.config, layers=factor * work.config.layers)
        cases |= {
            f"{factor} x the frames": work._replace(size=(factor * frames, height, width)),
            f"{factor} x the height": work._replace(size=(frames, factor * height, width)),
            f"{factor} x the batch": work._replace(batch=factor * work.batch),
            f"{factor} x the layers": work._replace(config=layers),
            f"{factor} x the rank": work._replace(rank=factor * work.rank),
        }
    return cases


def operations(work: Work) -> int:
    """Return the number of operations of a step, with those that are repeated."""
    lora = LoraConfig(rank=work.rank, alpha=work.rank)
    return sum(training_flops(work.config, lora, REMAT, work.batch, work.tokens))
