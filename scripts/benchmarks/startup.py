"""From the start of Python to the end of the first step, with an empty and a filled cache of compiled programs.

Every start is a process of its own (`one_start.py`). The peer takes a step with diffusers and PEFT, and compiles
nothing.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.sizes import Sizes
from benchmarks.timing import Row

SUBJECT, PEER = "startup", "diffusers + PEFT"
ROUNDS = 3


def measure(sizes: Sizes) -> Iterator[Row]:
    starts: dict[str, list[dict[str, float]]] = {"empty cache": [], "filled cache": [], PEER: []}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="benchmark.") as cache:
            starts["empty cache"].append(start("ours", sizes, cache))
            starts["filled cache"].append(start("ours", sizes, cache))
            starts[PEER].append(start("peer", sizes, cache))
    median = {
        name: {stage: statistics.median(each[stage] for each in found) for stage in found[0]}
        for name, found in starts.items()
    }
    for name in ("empty cache", "filled cache"):
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in median[name].items() if stage != "all")
        case = f"to the end of the first step, {sizes.startup}"
        yield Row(SUBJECT, case, name, median[name]["all"], PEER, median[PEER]["all"], stages)
    ours, theirs = (median[name]["import"] for name in ("empty cache", PEER))
    yield Row(SUBJECT, "imports", "", ours, PEER, theirs)


def start(whose: str, sizes: Sizes, cache: str) -> dict[str, float]:
    """Start a process, and return the seconds of its stages, and of all of it."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "benchmarks.one_start", whose, sizes.device]
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    return {**json.loads(done.stdout.splitlines()[-1]), "all": seconds}
