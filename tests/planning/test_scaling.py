"""The page docs/scaling.md, with plans that are made up."""

import json
import math

import pytest
from helpers.plans import fake_plan, fake_topology

from tfm_jax.errors import InputError
from tfm_jax.planning import scaling
from tfm_jax.planning.chips import GIB
from tfm_jax.planning.plan import Phase


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Replaces the compiler of docs/scaling.md by made-up plans; lists the options of what it compiled."""
    calls = []

    def compile(file, options):
        calls.append(options)
        chips = math.prod(map(int, options[0].partition(":")[2].split("x")))
        remat = options[-1].partition("=")[2]
        flops = {"forward": 1, "backward": 2, "recomputed": {"none": 0, "full": 10**19}.get(remat, 10**15)}
        if options[-1] == "--sampling":
            phases = {
                name: Phase(size * GIB, GIB) for name, size in (("encoding", 2), ("denoising", 4), ("decoding", 4))
            }
            networks = {"transformer": 3 * GIB, "text encoder": GIB, "autoencoder": GIB}
            video = {"flops_per_video": 197 * 10**15, "steps": 50, "flops": {"forward": 10**15}}
            return fake_plan(
                needed=5 * GIB, chips=chips, remat=None, networks=networks, phases=phases, **video
            ).as_json()
        return fake_plan(needed=(14 if remat == "full" else 99) * GIB, chips=chips, remat=remat, flops=flops).as_json()

    monkeypatch.setattr(scaling, "_compile", compile)
    monkeypatch.setattr(scaling, "find_topology", lambda name: fake_topology(name.partition(":")[0], math.prod(
        map(int, name.partition(":")[2].split("x")))))  # fmt: skip
    return calls


def test_an_interrupted_page_is_continued(compiled, tmp_path):
    file = tmp_path / "plans.json"
    cache = scaling.PlanCache(file)
    rows = list(scaling.best_plans(cache, 2, ["v5e-16"]))
    assert len(compiled) == len(json.loads(file.read_text())) == 4 * 2 * 2
    continued = scaling.PlanCache(file)
    assert list(scaling.best_plans(continued, 2, ["v5e-16"])) == rows
    assert len(compiled) == 16

    curves = scaling.scaling_curves(continued)
    assert [[p.chips for p in plans] for plans in curves.values()] == [[8, 16, 32, 64, 128, 256, 512, 1024]] * 2
    by_policy = scaling.remat_plans(continued)
    assert [p.remat for p in by_policy] == ["full", "attention", "attention_offload", "none"]
    sampling = scaling.sampling_plans(continued)
    command = "python scripts/scaling.py"
    page = scaling.write_document(rows, by_policy, curves, sampling, tmp_path / "docs", command).read_text()
    assert "compiled without the hardware\nand not run" in page
    assert page.count("| v5e-16 |") == 4
    lines = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert [len(set(table)) for table in (lines[:6], lines[6:12], lines[12:30], lines[30:])] == [1, 1, 1, 1]
    assert len(lines) == 6 + 6 + 2 + 2 * 8 + 2 + 4 * 2
    row = "| v5e-8 | 720p | 3.00 | 1.00 | 1.00 | 3.00 | 5.00 | 5.00 | 15.75 | fits | 197.0 | 125 |"
    assert row in page
    assert (tmp_path / "docs/scaling.png").stat().st_size < 60_000


def test_the_page_shows_what_is_not_compiled_yet(compiled, tmp_path):
    cache = scaling.PlanCache(tmp_path / "plans.json", compile_missing=False)
    rows = list(scaling.best_plans(cache, 2, ["v5e-8"]))
    by_policy, curves = scaling.remat_plans(cache), scaling.scaling_curves(cache)
    sampling = scaling.sampling_plans(cache)
    page = scaling.write_document(rows, by_policy, curves, sampling, tmp_path, "scaling.py").read_text()
    assert not compiled
    assert "| v5e-8 | 14B | 480p | not compiled |" in page
    assert "| v5e-8 | 480p | not compiled |" in page


@pytest.mark.parametrize("content", ['{"a": 1}', "[]", "{", '{"a": {"program": 1}}'])
def test_a_file_of_something_else_is_one_line(tmp_path, content):
    (tmp_path / "plans.json").write_text(content)
    with pytest.raises(InputError, match="not a file of plans written by scaling"):
        scaling.PlanCache(tmp_path / "plans.json")
