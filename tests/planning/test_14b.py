"""The 14B model at the size of the paper compiles for TPUs: 480 x 832 x 81, rank 32. Needs the TPU compiler."""

import json
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from tfm_jax.planning.plan import Plan


def plan_of_14b(*options):
    """The plan that scripts/plan.py prints for the configuration of 14B."""
    file = str(ROOT / "configs/wan2.1_t2v_14b.yaml")
    command = [sys.executable, str(ROOT / "scripts/plan.py"), "--config", file, *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Plan.from_json(json.loads(done.stdout))


@pytest.fixture(scope="module")
def pod():
    return plan_of_14b("--topology=v5p:4x4x4", "--mesh.fsdp=8", "--train.batch_size=64")


def test_14b_compiles_for_a_pod_within_5_minutes_of_two_cores_and_8_gb(pod):
    assert pod.fits
    assert pod.cpu_seconds < 600
    assert pod.compiler_memory < 8e9
    assert pod.roofline.flops == pytest.approx(sum(pod.flops.values()) / 64, rel=0.01)


def test_no_activation_of_14b_is_copied_to_another_layout(pod):
    """What remains is saving activations for the backward pass, and loading them."""
    bounds = {row.name: row.bound for row in pod.roofline.classes}
    assert bounds["copies and layout"] < 0.01 * pod.roofline.bound


@pytest.mark.slow
@pytest.mark.parametrize(("where", "sequence"), [("v5e:2x4", 2), ("v5e:4x4", 4), ("v6e:2x4", 2), ("v5p:2x2x1", 1)])
def test_14b_fits_on_small_machines_with_four_clips(where, sequence):
    found = plan_of_14b(f"--topology={where}", "--mesh.fsdp=4", f"--mesh.sequence={sequence}")
    assert found.fits
    assert (found.clips, found.tokens, found.mesh["sequence"]) == (4, 32760, sequence)
    assert found.roofline.flops == pytest.approx(sum(found.flops.values()) / found.devices, rel=0.01)
    assert found.seconds_at_peak < found.roofline.bound < 3 * found.seconds_at_peak
    assert 0.2 < found.best_utilisation < 0.8
    assert not found.roofline.unknown


@pytest.mark.slow
def test_14b_samples_480p_on_small_machines():
    """One video at a time. A v5e-8 has 8 chips of 15.75 GiB."""
    found = plan_of_14b("--sampling", "--topology=v5e:2x4", "--mesh.sequence=8")
    assert found.fits
    assert (found.clips, found.tokens, found.steps) == (1, 32760, 50)
    sizes = {name: size / 2**30 for name, size in found.networks.items()}
    assert sizes["transformer"] == pytest.approx(14.29e9 * 2 / 8 / 2**30, rel=0.02)
    assert sizes["text encoder"] == pytest.approx(5.68e9 * 2 / 8 / 2**30, rel=0.02)
    assert sizes["autoencoder"] == pytest.approx(126.9e6 * 4 / 2**30, rel=0.02)
