"""Show the roofline of a plan as tables, on the console or in Markdown."""

from collections.abc import Callable, Iterable, Sequence

from tfm_jax.planning.plan import Plan
from tfm_jax.planning.roofline import Roofline, Row

COLUMNS = ("runs", "TFLOP", "GB", "GB sent", "bound, ms", "share", "hidden, ms", "compiler's estimate, Mcycles")

Table = Callable[[Sequence[str], Iterable[Sequence[str]]], str]


def describe_roofline(plan: Plan) -> str:
    """Describe the roofline of a plan on the console, in a few lines and three tables."""
    found = plan.roofline
    if found is None:
        return "no roofline, because the compiler rejected the program"
    memory, links = found.bandwidth / 1e9, found.interconnect / 1e9
    formula = sum(plan.flops.values()) / plan.devices / 1e12
    lines = [
        f"roofline of a {_device(plan)}: {plan.peak_flops / 1e12:.0f} TFLOP/s, {memory:.0f} GB/s of memory, "
        f"{links:.0f} GB/s sent",
        f"  bound     {found.bound:.3g} s per step; a step takes longer, and nothing was run",
        f"            model FLOPs utilisation at most {plan.best_utilisation:.0%}",
        f"  products  {found.flops / 1e12:.5g} TFLOP in the compiled program, {formula:.5g} TFLOP by formula",
    ]
    if found.unknown:
        lines.append(f"            without those of unknown kernels: {', '.join(found.unknown)}")
    tables = {"largest operations": found.largest, "transfers between devices": found.collectives}
    lists = [_table(title, rows, found, _aligned) for title, rows in tables.items() if rows]
    return "\n\n".join(["\n".join(lines), class_table(plan, _aligned), *lists])


def class_table(plan: Plan, table: Table) -> str:
    """Return the table of the classes of operations, and their sum.

    Args:
        table: formats a header and rows, such as `tfm_jax.markdown.table`.
    """
    assert plan.roofline
    return _table(f"step of a {_device(plan)}", plan.roofline.classes, plan.roofline, table)


def _device(plan: Plan) -> str:
    return "chip" if plan.devices == plan.chips else "device"


def _table(title: str, rows: Sequence[Row], found: Roofline, table: Table) -> str:
    count = len(COLUMNS) - (not any(row.cycles for row in found.classes))
    return table((title, *COLUMNS[:count]), (_cells(row, found.bound)[: count + 1] for row in rows))


def _cells(row: Row, bound: float) -> tuple[str, ...]:
    return (
        row.name,
        f"{row.runs:,}",
        f"{row.flops / 1e12:.1f}",
        f"{row.bytes / 1e9:.1f}",
        f"{row.sent / 1e9:.1f}",
        f"{row.bound * 1e3:,.1f}",
        f"{row.bound / bound:.1%}",
        f"{row.hidden * 1e3:,.1f}",
        f"{row.cycles / 1e6:,.0f}" if row.cycles else "-",
    )


def _aligned(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in plain text, with the first column aligned to the left and all others to the right."""
    lines = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(x.rjust(width) for x, width in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
