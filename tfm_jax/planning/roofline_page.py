"""Plan both models on a few machines, and write the rooflines of these plans into docs/performance.md."""

import contextlib
import datetime
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tfm_jax.errors import CompilerError, InputError
from tfm_jax.files import replacing
from tfm_jax.markdown import table
from tfm_jax.planning.chips import find_topology
from tfm_jax.planning.plan import Plan, flops
from tfm_jax.planning.roofline_tables import class_table
from tfm_jax.planning.scaling import MACHINES, MODELS, SMALL_BATCH, PlanCache, make_run


class Case(NamedTuple):
    """A model on a machine of docs/scaling.md, with the mesh that the page shows at 480p."""

    machine: str
    model: str
    mesh: dict[str, int]

    @property
    def topology(self) -> str:
        return MACHINES[self.machine]

    def options(self) -> dict[str, int | str]:
        """Return the fields of the configuration that the case sets."""
        mesh = {f"mesh.{axis}": size for axis, size in self.mesh.items()}
        return {"train.batch_size": SMALL_BATCH, **mesh, "train.remat": "attention"}

    def command(self) -> str:
        """Return the lines of a shell that show the roofline of the case."""
        options = " ".join(f"--{name}={value}" for name, value in self.options().items())
        program = f"tfm-plan --config {MODELS[self.model]} --topology={self.topology} --roofline"
        return f"    {program} \\\n        {options}"


CASES = [
    Case("v5e-8", "1.3B", {"data": 4, "sequence": 2}),
    Case("v5e-16", "14B", {"fsdp": 4, "sequence": 4}),
    Case("v5p-8 (4 chips)", "1.3B", {"data": 4}),
    Case("v5p-8 (4 chips)", "14B", {"data": 4}),
    Case("v6e-8", "1.3B", {"data": 4, "sequence": 2}),
    Case("v6e-8", "14B", {"fsdp": 4, "sequence": 2}),
    Case("4 x H100 80 GB", "1.3B", {"data": 4}),
    Case("4 x H100 80 GB", "14B", {"fsdp": 4}),
]

Rows = Iterable[tuple[Case, Plan | None]]

BEGIN, END = "<!-- begin: python scripts/rooflines.py -->\n", "<!-- end: python scripts/rooflines.py -->\n"
"""The lines of the page between which this module writes."""

COLUMNS = ("machine", "model", "mesh", "all products at peak, s", "bound, s", "utilisation at most",
           "GB sent", "hidden, ms", "not hidden, ms")  # fmt: skip

TEXT = """\
Every row is the training step of `tfm-train`: LoRA of rank 32 on all linear layers, 81 frames of 480 x 832,
{batch} clips, remat=attention, on the mesh that [scaling.md](scaling.md) shows for the machine. The steps were compiled
for chips that are not here, in {month} with jax {jax}, and not run. So the numbers are lower bounds, not
times. This command writes this section; after an interruption, the same command continues where it stopped:

    python scripts/rooflines.py

The bound of an operation is the largest of three: its matrix products at the chip's peak for bfloat16, its bytes at the
bandwidth of the memory (HBM), and what it sends at the bandwidth of all links of the chip. The rates are those of the
vendors, in [chips.py](../tfm_jax/planning/chips.py). Of a transfer that runs in the background, only what exceeds the
bounds of the operations that run meanwhile counts; the rest is hidden. The bound of a step is the sum.

A step takes longer than its bound for reasons that the bound does not know: matrices that do not fill the matrix unit,
the exponentials of attention, a kernel that reads an array twice, links that a transfer cannot use, and waiting. On
GPUs there are two more caveats: without a GPU, XLA does not tune its kernels, and an array that is still in the cache
counts as read from memory.

- all products at peak: the time of the matrix products alone, by the formulas of [flops.py](../tfm_jax/flops.py).
- utilisation at most: the operations that the model needs, without repeated ones, at peak, as a part of the bound.
- GB sent, hidden, not hidden: what each chip sends in a step, and the bounds of these transfers.

{summary}

The tables below show the work of one chip in one step. Products of a linear layer count there with what XLA fused to
them, and those of the adapters as LoRA; attention is the kernels; elementwise is everything else that computes. The
compiler's estimate is that of its cost model, which knows neither kernels nor transfers. `tfm-plan --roofline` also
lists the largest operations and the transfers.

{tables}"""


def plan_cases(cache: PlanCache) -> Iterator[tuple[Case, Plan | None]]:
    """Yield the plan of every case; None if it is not compiled."""
    for case in CASES:
        with contextlib.suppress(LookupError, CompilerError):
            run = make_run(case.model, "480p", SMALL_BATCH, case.options())
            yield case, cache.plan(case.model, run, find_topology(case.topology))
            continue
        yield case, None


def write_section(rows: Rows, page: Path) -> None:
    """Replace the part of the page between `BEGIN` and `END`.

    Raises:
        InputError: the page does not exist, or lacks one of the two lines.
    """
    _split(page)  # before the plans are compiled, so that a wrong page is reported at once
    section = _section(list(rows))
    before, after = _split(page)  # again, because compiling takes long, and somebody may have edited the page
    with replacing(page) as partial_file:
        partial_file.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}", encoding="utf-8")


def _split(page: Path) -> tuple[str, str]:
    """Return the text before `BEGIN` and after `END`."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise InputError(f"{page}: expected a page with the lines {BEGIN.strip()} and {END.strip()}")
    return before, after


def _section(rows: list[tuple[Case, Plan | None]]) -> str:
    tables = [_details(case, plan) for case, plan in rows if plan and plan.roofline]
    return TEXT.format(
        batch=SMALL_BATCH,
        month=f"{datetime.date.today():%B %Y}",
        jax=version("jax"),
        summary=table(COLUMNS, (_row(case, plan) for case, plan in rows)),
        tables="\n".join(tables),
    )


def _row(case: Case, plan: Plan | None) -> tuple[str, ...]:
    mesh = " ".join(f"{axis}={size}" for axis, size in case.mesh.items())
    names = (case.machine, case.model, mesh, f"{_seconds_at_peak(case):.2f}")
    if plan is None or plan.roofline is None:
        return (*names, *("not compiled",) * (len(COLUMNS) - len(names)))
    found = plan.roofline
    transfers = found.collectives
    costs = (sum(row.sent for row in transfers) / 1e9, *(
        1e3 * sum(getattr(row, part) for row in transfers) for part in ("hidden", "bound")
    ))  # fmt: skip
    return (*names, f"{found.bound:.2f}", f"{plan.best_utilisation:.0%}", *(f"{cost:.1f}" for cost in costs))


def _seconds_at_peak(case: Case) -> float:
    """Return the seconds for all matrix products of a step at peak, by formula."""
    topology = find_topology(case.topology)
    run = make_run(case.model, "480p", SMALL_BATCH, case.options())
    return sum(flops(run, SMALL_BATCH).values()) / len(topology.devices) / topology.chip.peak


def _details(case: Case, plan: Plan) -> str:
    heading = f"### {case.model} on {case.machine}"
    return f"{heading}\n\n{case.command()}\n\n{class_table(plan, table)}\n"
