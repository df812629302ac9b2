"""Write the rows of a run as JSON and as a Markdown page, and compare them with those of an earlier run."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.timing import Row
from tfm_jax import markdown
from tfm_jax.files import replacing
from tfm_jax.inputs import read_json

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "peft", "transformers", "accelerate")

TOLERANCE = 0.15
"""The fraction by which a ratio may fall before `compare` reports it. On a shared machine, ratios of medians of the
same two programs differ by up to a tenth from run to run."""

COLUMNS = ("what", "ours", "seconds", "peer", "seconds", "ratio", "note")


def describe_machine(device: Any) -> dict[str, Any]:
    """Return what the times depend on. `device` is a device of JAX."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "driver": _driver() if device.platform == "gpu" else "none",
        "cores": len(os.sched_getaffinity(0)),
        "load before": round(os.getloadavg()[0], 1),
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


def write(folder: Path, device: str, machine: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write `folder`/`device`.json and `folder`/`device`.md.

    Rows in an existing JSON file stay if they are of subjects that `rows` does not have; those of others are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{device}.json"
    subjects = {row.subject for row in rows}
    old = [(row, source) for row, source in read(file) if row.subject not in subjects] if file.exists() else []
    everything = [*old, *((row, dict(machine)) for row in rows)]
    runs: list[dict[str, Any]] = []
    for row, source in everything:
        if source not in [run["machine"] for run in runs]:
            runs.append({"machine": source, "rows": []})
        next(run for run in runs if run["machine"] == source)["rows"].append({**row._asdict(), "ratio": row.ratio})
    with replacing(file) as temporary:
        temporary.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    if growth := [row for row, _ in everything if row.subject == "growth"]:
        draw_growth(growth, folder / f"{device}_growth.png")
    with replacing(folder / f"{device}.md") as temporary:
        temporary.write_text(page(device, runs), encoding="utf-8")


def read(file: Path) -> list[tuple[Row, dict[str, Any]]]:
    """Return the rows of a JSON file, each with the description of the machine that it was measured on."""
    runs = read_json(file)["runs"]
    return [(Row(*(row[name] for name in Row._fields)), run["machine"]) for run in runs for row in run["rows"]]


def page(device: str, runs: Iterable[Mapping[str, Any]]) -> str:
    """Return the Markdown page: for each run, the machine and a table for each subject."""
    parts = [f"# Measured by `python scripts/benchmark.py --device={device}`", EXPLANATION]
    for run in runs:
        parts.append("; ".join(f"{name}: {value}" for name, value in run["machine"].items()) + ".")
        rows = [Row(*(row[name] for name in Row._fields)) for row in run["rows"]]
        for subject in dict.fromkeys(row.subject for row in rows):
            cells = [cells_of(row) for row in rows if row.subject == subject]
            parts += [f"## {subject.replace('_', ' ').capitalize()}", markdown.table(COLUMNS, cells)]
            if subject == "growth":
                parts.append(f"![time of a step beside the count of operations]({device}_growth.png)")
    return "\n\n".join(parts) + "\n"


def draw_growth(rows: Sequence[Row], file: Path) -> None:
    """Draw how the time of a step grows with each of its sizes, beside the growth of the operations.

    The first row is the step itself; each of the others has "FACTOR x the SIZE" as its case.
    """
    first, grown = rows[0], [(*row.case.split(" x the "), row) for row in rows[1:]]
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for size in dict.fromkeys(size for _, size, _ in grown):
        part = [(float(factor), row) for factor, of, row in grown if of == size]
        factors = [1.0, *(factor for factor, _ in part)]
        (line,) = axis.plot(factors, [1.0, *(row.seconds / first.seconds for _, row in part)], "o-", label=size)
        expected = [1.0, *(row.peer_seconds / first.seconds for _, row in part)]
        axis.plot(factors, expected, ":", color=line.get_color())
    axis.set_xlabel("how many times as large")
    axis.set_ylabel("how many times as long")
    axis.set_title("time of a step (dotted: its operations)", fontsize=10)
    axis.legend(fontsize=8)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=80, format="png")
    plt.close(figure)


EXPLANATION = """\
This page is generated. A ratio above 1 means that ours is faster than the peer. Ours and the peer did the same work in
the same process and took turns; the seconds are medians."""


def cells_of(row: Row) -> tuple[str, ...]:
    """Return the cells of a row of the table."""
    times = (f"{seconds:.3g}" for seconds in (row.seconds, row.peer_seconds))
    return row.case, row.ours, next(times), row.peer, next(times), f"{row.ratio:.2f}", row.note


def compare(before: Iterable[Row], now: Iterable[Row]) -> list[str]:
    """Return a line for each row whose ratio fell by more than `TOLERANCE`. Rows without a counterpart do not count."""
    stored = {row.key: row.ratio for row in before}
    lines = []
    for row in now:
        ratio = stored.get(row.key)
        if ratio is not None and row.ratio < ratio * (1 - TOLERANCE):
            name = ", ".join(part for part in row.key[:3] if part)
            lines.append(f"{name}: {row.ratio:.2f} x {row.peer}, was {ratio:.2f}")
    return lines
