"""Exporting a LoRA from the checkpoints of a run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import virtual_devices
from helpers.checkpoints import FACTORS, damage, names, state
from helpers.paths import ROOT

from tfm_jax.checkpoint import Checkpoints
from tfm_jax.errors import InputError
from tfm_jax.lora.files import read_lora
from tfm_jax.train.export import export


def test_export_uses_the_newest_undamaged_checkpoint(folder, tmp_path, capsys):
    files = [tmp_path / f"{name}.safetensors" for name in ("newest", "chosen", "left")]
    assert export(folder.parent, files[0], "comfy", np.dtype(np.float32)) == (2, 2)
    assert export(folder.parent, files[1], "comfy", np.dtype(np.float32), step=1) == (1, 2)
    damage(folder)
    assert export(folder.parent, files[2], "comfy", np.dtype(np.float32)) == (1, 2)
    assert capsys.readouterr().out.startswith(f"note: {folder / '2'} is damaged and not used: ")
    loras = [read_lora(file) for file in files]
    for lora, step in zip(loras, (2, 1, 1), strict=True):
        for linear, (a, b) in lora.adapters.items():
            ours = [state(step)[f"{FACTORS}/lora_{factor}/value"][linear.layer] for factor in "ab"]
            np.testing.assert_allclose(lora.alpha / lora.rank * b @ a, np.asarray(ours[0] @ ours[1]).T, atol=1e-5)
    with pytest.raises(InputError, match=r"checkpoints/2: damaged: .*; undamaged steps: 1"):
        export(folder.parent, tmp_path / "none.safetensors", "comfy", np.dtype(np.float32), step=2)
    damage(folder, 1)
    with pytest.raises(InputError, match="contains no usable checkpoint"):
        export(folder.parent, tmp_path / "none.safetensors", "comfy", np.dtype(np.float32))
    assert names(folder) == ["1", "2"]
    assert not (tmp_path / "none.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("", "a directory; expected the name of a new file"),
        (".", "a directory; expected the name of a new file"),
        ("mine", "mine: already exists; expected a new file"),
        ("mine/lora.safetensors", "/mine is a file; expected a directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(two_steps, tmp_path, monkeypatch, file, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpoints, "restore", lambda *_, **__: pytest.fail("read before the check"))
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match=message):
        export(two_steps, Path(file), "comfy", np.dtype(np.float32))


def test_export_without_a_device(two_steps, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "export_lora.py"), str(two_steps), str(tmp_path / "lora.safetensors")],
        env=virtual_devices.environment(1) | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX finds no device")
    assert done.stderr.count("\n") == 1
