"""tfm-prepare --inspect: its statistics, and the picture of what the latents contain."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import WAN_TINY
from helpers.records import write_dataset
from PIL import Image

from tfm_jax.config import load
from tfm_jax.data import inspection
from tfm_jax.data.format import Entry, Record
from tfm_jax.data.inspection import CONTACT_SHEET, choose, inspect
from tfm_jax.data.order import is_held_out
from tfm_jax.data.prepare import PrepareRun
from tfm_jax.errors import InputError
from tfm_jax.wan.components import VAE
from tfm_jax.wan.fingerprint import fingerprint
from tfm_jax.wan.vae import WanVae

SHAPES = [(1, 2, 3, 16), (2, 2, 3, 16), (1, 2, 3, 16), (1, 2, 3, 16)]
TOKENS = [3, 512, 7, 2]
ENCODERS = {"vae": fingerprint(WAN_TINY, VAE), "text_encoder": "fedcba9876543210"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four clips of two sizes; three more were rejected."""
    rng = np.random.default_rng(0)
    records = [
        Record(rng.standard_normal(shape, np.float32), np.ones((tokens, 8), np.float32), f"prompt {n}", f"{n}.mp4")
        for n, (shape, tokens) in enumerate(zip(SHAPES, TOKENS, strict=True))
    ]
    write_dataset(tmp_path / "latents", records, encoders=ENCODERS)
    reasons = ["has 60 frames; expected 81", "has 7 frames; expected 81", "contains no video stream"]
    lines = [json.dumps({"line": n, "video": f"bad {n}.mp4", "reason": reason}) for n, reason in enumerate(reasons)]
    (tmp_path / "latents" / "rejected.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path / "latents"


def prepare_run(folder: Path, **fields) -> PrepareRun:
    return load(PrepareRun, "wan_tiny", {"data.path": str(folder), **fields})


@pytest.fixture
def fake_vae(monkeypatch):
    """Every frame is painted in the grey level that is the first number of the latents."""

    def decode(vae, latents):
        _, f, h, w, _ = latents.shape
        return jnp.full((1, 4 * (f - 1) + 1, 8 * h, 8 * w, 3), latents[0, 0, 0, 0, 0])

    monkeypatch.setattr(WanVae, "decode", decode)


def test_statistics(folder, fake_vae, capsys):
    inspect(prepare_run(folder, **{"data.held_out": 0.5}))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    size = sum(file.stat().st_size for file in folder.glob("*array_record*"))
    assert lines[0] == f"{folder}: 4 clips, {size:,} bytes in 2 shards, float32"
    assert lines[1] == f"encoders: vae {ENCODERS['vae']}, text_encoder fedcba9876543210, from weights/wan"
    assert lines[3:5] == ["1 x 16 x 24 1 x 2 x 3 x 16 3", "5 x 16 x 24 2 x 2 x 3 x 16 1"]
    assert lines[5].startswith("prompts: 2 to 512 tokens, 131 on average; 1 have 512")
    assert lines[6] == "rejected: 3"
    assert lines[7] == "2 like bad 0.mp4: has 60 frames; expected 81"
    assert lines[8] == "1 like bad 2.mp4: contains no video stream"
    held_out = sum(is_held_out(f"{n}.mp4", 0.5) for n in range(4))
    assert lines[9] == f"held out: {held_out} of 4 clips (data.held_out=0.5)"
    assert lines[10] == f"{folder}/{CONTACT_SHEET}: 4 clips, decoded from their latents"


def test_the_picture(folder, fake_vae, monkeypatch):
    labels, draw = [], inspection.video.contact_sheet
    monkeypatch.setattr(inspection.video, "contact_sheet", lambda *args: (labels.extend(args[1]), draw(*args))[1])
    inspect(prepare_run(folder))
    assert sorted(labels) == [f"{n}.mp4: prompt {n}" for n in range(4)]
    picture = np.asarray(Image.open(folder / CONTACT_SHEET))
    record = inspection.open_records(folder)[int(labels[0][0])]
    expected = inspection.video.to_uint8(record.latents[0, 0, 0, :1].repeat(3))
    np.testing.assert_array_equal(picture[60, 60], expected)
    assert not list(folder.glob(".*"))


def test_a_folder_without_rejected_clips(folder, fake_vae, capsys):
    (folder / "rejected.jsonl").unlink()
    inspect(prepare_run(folder))
    said = capsys.readouterr().out
    assert "rejected: none" in said
    assert "held out" not in said


def test_clips_are_chosen_from_all_sizes():
    common = [Entry(f"{n}.mp4", (1, 2, 3, 16), 5, "") for n in range(1000)]
    rare = [Entry(f"{n}.mp4", (2, 2, 3, 16), 5, "") for n in range(2)]
    chosen = choose([*common, *rare], seed=0)
    assert len(set(chosen)) == inspection.SHOWN
    assert sorted(number for number in chosen if number >= 1000) == [1000, 1001]
    assert chosen == choose([*common, *rare], seed=0) != choose([*common, *rare], seed=1)


def test_another_autoencoder_is_refused(folder, fake_vae):
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(ENCODERS["vae"], "0123456789abcdef"))
    with pytest.raises(InputError, match=r"was prepared with the vae 0123456789abcdef, but model.path=.*; use that"):
        inspect(prepare_run(folder))
    assert not (folder / CONTACT_SHEET).exists()


def test_damaged_rejections(folder, fake_vae):
    for content in ("{", "5\n", '{"video": "a.mp4"}\n', "[]\n"):
        (folder / "rejected.jsonl").write_text(content)
        with pytest.raises(InputError, match=r"rejected.jsonl: is damaged; prepare the data again"):
            inspect(prepare_run(folder))
