"""The generated part of docs/performance.md, with plans that are made up."""

import math

import pytest
from helpers.paths import ROOT
from helpers.plans import fake_plan, fake_topology

from tfm_jax.errors import CompilerError, InputError
from tfm_jax.planning import roofline_page, scaling
from tfm_jax.planning.roofline import CLASSES, Roofline, Row

BEGIN, END = roofline_page.BEGIN, roofline_page.END


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """Plans of all cases, except for those of H100s, which the compiler refuses."""

    def compile(file, options):
        if options[0].startswith("--topology=h100"):
            raise CompilerError("no compiler for H100")
        parts = [Row(name, 2, 10**12, 10**9, 3 * 10**9, 0.25, 0.002, 0) for name in CLASSES]
        found = Roofline(1.5, parts, parts[:1], parts[-1:], [], 1e12, 1e11)
        return fake_plan(roofline=found, flops={"forward": 10**15, "backward": 197 * 10**12}).as_json()

    monkeypatch.setattr(scaling, "_compile", compile)

    def topology(name):
        kind, _, shape = name.partition(":")
        return fake_topology(kind, math.prod(map(int, shape.split("x"))))

    monkeypatch.setattr(roofline_page, "find_topology", topology)
    return roofline_page.plan_cases(scaling.PlanCache(tmp_path / "plans.json"))


def test_only_the_part_between_the_lines_is_written(rows, tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    roofline_page.write_section(rows, page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\nEvery row")
    assert text.endswith(f"{END}after\n")
    assert "old\n" not in text
    assert "| v5p-8 (4 chips) | 14B | data=4 | 11.61 | 1.50 | 51% | 3.0 | 2.0 | 250.0 |" in text
    assert "| 4 x H100 80 GB | 14B | fsdp=4 | 5.39 | not compiled |" in text
    assert text.count("### ") == 6
    assert "--topology=v5e:4x4 --roofline \\\n        --train.batch_size=4 --mesh.fsdp=4 --mesh.sequence=4" in text
    assert max(len(line) for line in text.splitlines() if "|" not in line) <= 120


def test_edits_of_the_page_while_plans_are_compiled_are_kept(rows, tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")

    def edited():
        page.write_text(f"edited\n{BEGIN}old\n{END}after\n")
        yield from rows

    roofline_page.write_section(edited(), page)
    assert page.read_text().startswith(f"edited\n{BEGIN}")


def test_a_page_without_the_lines_is_refused_before_anything_is_compiled(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"{BEGIN}\n")
    with pytest.raises(InputError, match="expected a page with the lines"):
        roofline_page.write_section(iter(lambda: pytest.fail("compiled"), None), page)
    assert page.read_text() == f"{BEGIN}\n"


def test_the_page_of_the_repository_has_the_lines():
    text = (ROOT / "docs/performance.md").read_text()
    assert text.count(BEGIN) == text.count(END) == 1
