"""The prepared clips of a training run: what is checked and printed before the model is loaded."""

from pathlib import Path

import numpy as np
import pytest
from helpers.paths import WAN_TINY
from helpers.records import CLIP, SHAPE, make_records, write_dataset
from jax.sharding import AbstractMesh

from tfm_jax.config import ClipConfig, DataConfig, ModelConfig
from tfm_jax.errors import InputError
from tfm_jax.sharding import MESH_AXES, check_split, one_device_mesh
from tfm_jax.train import data as module
from tfm_jax.train.data import open_batches
from tfm_jax.wan.components import TEXT_ENCODER, VAE
from tfm_jax.wan.fingerprint import fingerprint

ENCODERS = {component.name: fingerprint(WAN_TINY, component) for component in (VAE, TEXT_ENCODER)}
OTHER = (2, 6, 4, 16)


def opened(folder: Path, model: Path = WAN_TINY, **options):
    """Open the clips in a folder for a run on one device, with two clips per step."""
    sizes = ModelConfig(path=model, dim=128, ffn_dim=512, heads=4, layers=8)
    return open_batches(DataConfig(path=folder, **options), ClipConfig(**CLIP), sizes, 2, 0, one_device_mesh())


@pytest.fixture
def folder(tmp_path) -> Path:
    """Nine clips of two sizes, prepared by the embedded model."""
    write_dataset(tmp_path / "latents", make_records(9, (SHAPE, SHAPE, OTHER)), encoders=ENCODERS)
    return tmp_path / "latents"


def test_the_sizes_are_printed(folder, capsys):
    batches = opened(folder)
    assert list(batches.clips) == list(range(9))
    assert capsys.readouterr().out == f"data: 9 clips in {folder}, latents 5 x 4 x 6 x 16 (6), 2 x 6 x 4 x 16 (3)\n"


def test_held_out_clips_are_not_trained_on(folder, capsys):
    batches = opened(folder, held_out=0.5)
    assert 0 < len(batches.clips) < 9
    assert f"9 clips in {folder}, of which {9 - len(batches.clips)} are held out, lat" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"data.held_out=0.999999: holds out all clips of .*latents; expected a smal"):
        opened(folder, held_out=0.999999)


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
def test_clips_of_another_encoder_are_refused(tmp_path, name):
    write_dataset(tmp_path / "latents", make_records(3), encoders=ENCODERS | {name: "0123456789abcdef"})
    message = rf"data.path=.*latents: was prepared with the {name} 0123456789abcdef, but model.path=.* {ENCODERS[name]}"
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "latents")


def test_a_model_without_encoders_is_noted(folder, tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "transformer").symlink_to(WAN_TINY / "transformer")
    opened(folder, model)
    assert f"note: {model} has no vae and no text_encoder, so nothing could be compared" in capsys.readouterr().out
    (model / "vae").symlink_to(WAN_TINY / "vae")
    opened(folder, model)
    assert f"note: {model} has no text_encoder, so nothing could be compared" in capsys.readouterr().out


def test_a_prompt_must_not_have_more_tokens_than_the_transformer_takes(tmp_path):
    records = make_records(3)
    text = np.zeros((65, records[0].text.shape[1]), records[0].text.dtype)
    records[1] = records[1]._replace(text=text)
    write_dataset(tmp_path / "latents", records, encoders=ENCODERS)
    message = r"latents: the prompt of clip 1 has 65 tokens; expected at most 64, as many as the transformer takes"
    with pytest.raises(InputError, match=message):
        opened(tmp_path / "latents")


def test_the_mesh_must_divide_the_tokens_of_every_size(folder, monkeypatch):
    """There are 30 and 12 tokens, and tokens are split over three or four devices."""
    mesh = AbstractMesh((1, 1, 3, 1), MESH_AXES)
    monkeypatch.setattr(module, "check_split", lambda heads, tokens, _: check_split(heads, tokens, mesh))
    opened(folder)
    mesh = AbstractMesh((1, 1, 4, 1), MESH_AXES)
    with pytest.raises(InputError, match=r"mesh.sequence=4 does not divide the 30 tokens of a clip"):
        opened(folder)
