"""Consistency: the formula, and networks in the format of transformers against transformers' own preprocessing."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from tfm_jax.errors import InputError
from tfm_jax.footage.consistency import Consistency, load

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES), add_pooling_layer=False).save_pretrained(folder / "dino")
    CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=16)).save_pretrained(folder / "clip")
    return folder


def frame(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_the_formula():
    """Each frame counts with the mean of two cosines, which are at least 0."""
    angles = np.radians([0, 60, 90, 300])
    vectors = iter(np.stack([np.cos(angles), np.sin(angles)], -1))
    metric = Consistency("dino", lambda _: next(vectors))
    for _ in angles:
        metric.add(frame(4, 4))
    cosines = [[0.5, 0.5], [np.cos(np.radians(30)), 0], [0, 0.5]]
    assert metric.values() == {"subject_consistency": pytest.approx(np.mean(cosines))}


def test_features_equal_those_of_transformers(folders):
    """At the size of the network, preprocessing only scales colours, so that there is nothing to do differently."""
    picture = frame(32, 32)
    dino, clip = load("dino", folders / "dino"), load("clip", folders / "clip")
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    inputs = ViTImageProcessor(size={"height": 32, "width": 32}, **imagenet)(picture, return_tensors="pt")
    with torch.no_grad():
        expected = ViTModel.from_pretrained(folders / "dino", add_pooling_layer=False)(**inputs).last_hidden_state[0, 0]
    assert dino(picture) == pytest.approx((expected / expected.norm()).numpy(), abs=1e-5)
    inputs = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)(picture, return_tensors="pt")
    with torch.no_grad():
        expected = CLIPVisionModelWithProjection.from_pretrained(folders / "clip")(**inputs).image_embeds[0]
    assert clip(picture) == pytest.approx((expected / expected.norm()).numpy(), abs=1e-5)


def test_scaling_and_cropping(folders):
    """DINO sees the whole frame, CLIP only the square in its centre."""
    dino, clip = load("dino", folders / "dino"), load("clip", folders / "clip")
    wide = frame(32, 48)
    assert dino(wide.repeat(2, 0).repeat(2, 1)) == pytest.approx(dino(wide), abs=1e-5)
    assert clip(wide) == pytest.approx(clip(wide[:, 8:40]), abs=1e-5)
    assert np.abs(dino(wide) - dino(wide[:, 8:40])).max() > 0.01


def test_bad_networks(folders, tmp_path, monkeypatch):
    def refused(message: str, kind, folder) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load(kind, folder)
        assert "\n" not in str(caught.value)

    refused("--dino=.*none: no such folder", "dino", tmp_path / "none")
    refused(r"config.json: no such file", "dino", tmp_path)
    refused("config.json: model_type is 'vit'; expected clip or clip_vision_model for --clip", "clip", folders / "dino")
    shutil.copytree(folders / "dino", tmp_path / "less")
    weights = load_file(tmp_path / "less/model.safetensors")
    lost = sorted(weights)[0]
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "less/model.safetensors", {"format": "pt"})
    refused(f"1 tensors are missing, such as {lost}", "dino", tmp_path / "less")
    (tmp_path / "less/model.safetensors").write_bytes(b"damaged")
    refused("--dino=.*less: cannot be loaded", "dino", tmp_path / "less")
    config = json.loads((folders / "dino/config.json").read_text())
    (tmp_path / "less/config.json").write_text(json.dumps(config | {"model_type": None}))
    refused("model_type is None", "dino", tmp_path / "less")
    monkeypatch.setitem(sys.modules, "torch", None)
    refused("--clip: the network runs in PyTorch; run pip install 'tfm-jax\\[torch\\]'", "clip", folders / "clip")
