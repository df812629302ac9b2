"""Names of topologies, and the devices and memory of chips."""

import numpy as np
import pytest
from helpers.plans import fake_topology

from tfm_jax.config import MeshConfig
from tfm_jax.errors import InputError
from tfm_jax.planning import chips
from tfm_jax.planning.chips import CHIPS, GIB, find_topology
from tfm_jax.sharding import make_mesh


@pytest.mark.parametrize(
    "name",
    ["v9:2x2", "v5e", "v5e:", "v5e:2y2", "v5e:2x4 ", "h100:2x2x2", "2xh100:4", "-1xv5e:2x4", "0xv5e:2x4", "h100:0"],
)
def test_an_unknown_topology_is_one_line(name):
    with pytest.raises(InputError) as caught:
        find_topology(name)
    assert str(caught.value).startswith(f"--topology={name}: expected")
    assert "v5e:4x4" in str(caught.value)


@pytest.mark.parametrize(("name", "wheel"), [("v5e:2x4", "jax[tpu]=="), ("h100:4", "jax-cuda13-pjrt==")])
def test_a_compiler_that_is_missing_is_one_line_with_the_command(monkeypatch, name, wheel):
    monkeypatch.setattr(chips, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"^--topology=\S+: .* is not installed; run pip install") as caught:
        find_topology(name)
    assert wheel in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ("v5p:8", "v5p:2x2x2 has 8 chips"),
        ("v5p:4", "v5p:2x2x1 has 4 chips"),
        ("v4:32", "v4:2x4x4 has 32 chips"),
        ("v5e:8", "v5e:2x4 has 8 chips"),
        ("v6e:16", "v6e:4x4 has 16 chips"),
        ("v5p:12", "the chips along each axis, such as"),
        ("v5p:3x3x3", "a shape that exists, such as"),
    ],
)
def test_a_number_of_chips_is_answered_with_the_shape(shape, hint):
    assert hint in chips._shape_hint(shape)


def test_memory_of_gpus_is_what_jax_takes_of_it(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert fake_topology("h100", 4).memory == round(0.75 * CHIPS["h100"].memory)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert fake_topology("h100", 4).memory == round(0.9 * CHIPS["h100"].memory)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")  # the newer name
    assert fake_topology("h100", 4).memory == round(0.95 * CHIPS["h100"].memory)
    assert fake_topology("v5e", 4).memory == round(15.75 * GIB)
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(InputError, match="XLA_CLIENT_MEM_FRACTION=most: expected a number"):
        _ = fake_topology("h100", 4).memory


def test_devices_of_a_chip():
    assert fake_topology("tpu7x", 8).chips == 4
    assert np.isclose(CHIPS["tpu7x"].peak, 2307e12 / 2)
    assert np.isclose(CHIPS["tpu7x"].bandwidth, 7380e9 / 2)
    assert np.isclose(CHIPS["tpu7x"].interconnect, 600e9 / 2)


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "2xv5e:2x2"])
def test_tpus_form_a_mesh(name):
    where = find_topology(name)
    slices, per_chip = (2 if name.startswith("2x") else 1), CHIPS[where.kind].per_chip
    assert where.chips == 4 * slices
    assert make_mesh(MeshConfig(data=slices, fsdp=4 * per_chip), where.devices).size == 4 * slices * per_chip
