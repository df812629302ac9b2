"""The search for a mesh and a remat policy, with plans that are made up."""

from types import SimpleNamespace

import pytest
from helpers.plans import fake_plan, fake_topology, run_14b

from tfm_jax.config import MeshConfig
from tfm_jax.errors import CompilerError, InputError
from tfm_jax.planning.chips import GIB, Topology
from tfm_jax.planning.plan import describe, flops
from tfm_jax.planning.search import SAVED_ACTIVATIONS, candidates, search


def test_candidates_split_everything_evenly_and_hold_the_weights():
    found = candidates(run_14b(), fake_topology("v5e", 16))
    assert MeshConfig(data=1, fsdp=4, sequence=4) in [candidate.mesh for candidate in found]
    for mesh, arguments, *_ in found:
        assert mesh.data * mesh.fsdp * mesh.sequence * mesh.tensor == 16
        assert 4 % (mesh.data * mesh.fsdp) == 32760 % mesh.sequence == 40 % mesh.tensor == 0
        assert arguments < 15.75 * GIB
    # No mesh can hold what `none` saves. Meshes that are estimated to hold what `attention` saves come first.
    assert all(memory[0] > 15.75 * GIB for _, _, memory, _ in found)
    holds = [memory[1] < 15.75 * GIB for _, _, memory, _ in found]
    assert holds == sorted(holds, reverse=True)
    assert any(holds)
    assert not all(holds)
    first = [candidate.bytes_sent for candidate, holding in zip(found, holds, strict=True) if holding]
    assert first == sorted(first)


def test_candidates_that_no_policy_makes_fit_are_sorted_by_memory():
    found = candidates(run_14b(batch=64), fake_topology("v5e", 8))
    assert all(min(memory) > 15.75 * GIB for _, _, memory, _ in found)
    assert [memory[-1] for _, _, memory, _ in found] == sorted(memory[-1] for _, _, memory, _ in found)


def test_candidates_split_data_over_slices():
    chips = [SimpleNamespace(platform="tpu", slice_index=number // 8) for number in range(16)]
    found = candidates(run_14b(batch=16), Topology("2xv5e:2x4", "v5e", chips))
    assert found
    assert all(candidate.mesh.data % 2 == 0 for candidate in found)


def test_no_candidate_is_one_line():
    with pytest.raises(InputError, match=r"^--topology=v5e:11: no mesh .* batch of 4"):
        candidates(run_14b(), fake_topology("v5e", 11))


def test_search_takes_least_recomputation_first_and_then_least_sent(capsys):
    tried = []

    def make(run, where):
        mesh, remat = (getattr(run.mesh, axis) for axis in ("data", "fsdp", "sequence", "tensor")), run.train.remat
        mesh = tuple(mesh)
        tried.append((mesh, remat))
        needs = {"none": 40, "attention": 17.8, "full": 11}[remat] - 2 * len({m for m, _ in tried})
        return fake_plan(mesh, round(needs * GIB), sent=100 - len(tried), remat=remat, flops=flops(run, 4))

    found = search(run_14b(), fake_topology("v5e", 16), 4, make=make)
    assert [p.remat for p in found] == ["attention"] * 3 + ["full"]
    assert [p.bytes_sent for p in found[:3]] == sorted(p.bytes_sent for p in found[:3])
    # `none` needs several times the memory and is never compiled. The first mesh only fits with full; the second fits
    # with attention, so that full is not tried again.
    assert [remat for _, remat in tried] == ["attention", "full", *("attention",) * 3]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 2 * 5
    assert "compiling the 4 most promising" in lines[0]
    assert "1/4 data=2 fsdp=2 sequence=4 tensor=1 remat=attention: compiling" in lines[1]


def test_search_continues_after_a_failure_of_the_compiler(capsys):
    def make(run, where):
        if run.mesh.data > 1 or where.name == "v5e:8":
            raise CompilerError("no such kernel")
        return fake_plan()

    found = search(run_14b(), fake_topology("v5e", 16), 4, make=make)
    assert found
    assert "remat=attention: no such kernel" in capsys.readouterr().err
    with pytest.raises(CompilerError, match="on every mesh"):
        search(run_14b(), fake_topology("v5e", 8), 1, make=make)


def test_search_ranks_a_tight_fit_last_and_tries_the_next_policy(capsys):
    def make(run, where):
        needs = {"attention": 15.3, "full": 9}[run.train.remat]
        return fake_plan(needed=round(needs * GIB), remat=run.train.remat, flops=flops(run, 4))

    found = search(run_14b(), fake_topology("v5e", 16), 1, make=make)
    assert [(p.remat, p.tight) for p in found] == [("full", False), ("attention", True)]
    assert "only 0.45 GiB to spare" in describe(found[1])


def test_search_only_tries_the_requested_policy():
    tried = []

    def make(run, where):
        tried.append(run.train.remat)
        return fake_plan()

    search(run_14b(), fake_topology("v5e", 16), 2, ["none"], make)
    assert tried == ["none"] * 2


def test_search_without_a_fit_returns_the_plan_closest_to_fitting():
    def make(run, where):
        return fake_plan(needed=(30 if run.train.remat == "full" else 50) * GIB)

    (found,) = search(run_14b(), fake_topology("v5e", 16), 2, make=make)
    assert not found.fits
    assert found.needed == 30 * GIB


def test_the_policy_that_recomputes_least_is_tried_first():
    assert next(iter(SAVED_ACTIVATIONS)) == "none"
