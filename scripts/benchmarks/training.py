"""A LoRA step with each remat policy beside diffusers and PEFT, with and without gradient checkpointing.

Both train with plain flow matching: `objective.py` measures what TFM costs.
"""

from collections.abc import Iterator
from typing import get_args

from benchmarks import ours, peers
from benchmarks.sizes import Sizes
from benchmarks.timing import Row, pair, take_turns
from tfm_jax.config import Remat

SUBJECT = "training"


def measure(sizes: Sizes) -> Iterator[Row]:
    for work in sizes.training:
        split, batch, case = ours.adapted(work, sizes), ours.batch(work, sizes), f"a step, {work}"
        policies = {f"remat={remat}": ours.training(split, batch, remat) for remat in get_args(Remat)}
        theirs = peers.training(work, sizes)
        times = take_turns({**policies, **theirs}, sizes.budget)
        yield from pair(SUBJECT, case, times, list(policies), list(theirs))
        best, best_peer = (min(names, key=times.__getitem__) for names in (policies, theirs))
        note = f"{best}; {best_peer}"
        yield Row(SUBJECT, case, "the fastest", times[best], "the fastest", times[best_peer], note)
