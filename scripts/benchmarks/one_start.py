"""Train one step, ours or with diffusers and PEFT, and print the seconds of each stage as JSON.

    python -m benchmarks.one_start ours|peer cpu|gpu

`startup.py` runs this program. It imports inside functions, because that is what it measures.
"""

import json
import sys
import time
from typing import Any, cast

stages: dict[str, float] = {}
since = time.perf_counter()


def lap(stage: str) -> None:
    """Note how long the stage took that has just ended."""
    global since
    now = time.perf_counter()
    stages[stage], since = now - since, now


def run_ours(device: str) -> None:
    import jax

    import tfm_jax.cli.train  # noqa: F401, all that the program imports
    from benchmarks import ours
    from benchmarks.sizes import SIZES

    lap("import")
    sizes = SIZES[device]
    split, batch = ours.adapted(sizes.startup, sizes), ours.batch(sizes.startup, sizes)
    step, state = ours.training_step(split, "attention")
    lap("build")
    lowered = cast(Any, step).lower(state, split.frozen, batch)
    lap("trace")
    compiled = lowered.compile()
    lap("compile")
    jax.block_until_ready(compiled(state, split.frozen, batch))
    lap("first step")


def run_peer(device: str) -> None:
    from benchmarks import peers
    from benchmarks.sizes import SIZES

    lap("import")
    run = peers.training(SIZES[device].startup, SIZES[device])["diffusers + PEFT"]
    lap("build")
    run()
    lap("first step")


if __name__ == "__main__":
    {"ours": run_ours, "peer": run_peer}[sys.argv[1]](sys.argv[2])
    print(json.dumps(stages))
