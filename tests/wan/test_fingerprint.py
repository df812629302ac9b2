"""Fingerprints of the encoders: the same for every layout and data type, another one for other weights."""

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import WAN_TINY
from helpers.random_model import random_source
from safetensors.numpy import load_file, save_file

from tfm_jax.errors import InputError
from tfm_jax.wan.components import TEXT_ENCODER, VAE
from tfm_jax.wan.fingerprint import fingerprint, fingerprint_source
from tfm_jax.wan.saving import save
from tfm_jax.wan.tensors import LazyTensor
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.vae import VaeConfig

WRITTEN = (("diffusers", "float32"), ("original", "bfloat16"), ("tfm_jax", "bfloat16"))
CONFIGS = {
    VAE: VaeConfig(base_dim=8, dim_mult=(1, 4), num_res_blocks=1, temporal_downsample=(True,)),
    TEXT_ENCODER: TextEncoderConfig(vocab_size=40, dim=20, heads=2, head_dim=6, ffn_dim=24, layers=2),
}
CONSTANTS = {VAE: {"latents_mean": (0.5,) * 16}, TEXT_ENCODER: {"eps": 1e-3}}


@pytest.fixture(params=CONFIGS, ids=lambda component: component.name, scope="module")
def source(request):
    """A network in memory, with random weights."""
    return random_source(request.param, CONFIGS[request.param], np.random.default_rng(0))


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> list[Path]:
    """Model directories that contain this network in several layouts and data types."""
    folder = tmp_path_factory.mktemp("written")
    for layout, dtype in WRITTEN:
        save(source, folder / layout, layout, dtype)
    return [folder / layout for layout, _ in WRITTEN]


def test_layouts_and_data_types_agree(source, written):
    assert {fingerprint(folder, source.component) for folder in written} == {fingerprint_source(source)}


def test_other_weights_and_constants_differ(source):
    def with_tensor(name, values):
        return source._replace(tensors={**source.tensors, name: LazyTensor(values.shape, Path(), values.__getitem__)})

    row = source.component.rows(source.config)[0]
    one = source.read(row).copy()
    one.flat[0] += 0.1
    constants = dataclasses.replace(source.config, **CONSTANTS[source.component])
    others = [source, source._replace(config=constants), with_tensor(row.ours, one), with_tensor(row.ours, one[:2])]
    assert len({fingerprint_source(other) for other in others}) == 4


def test_a_model_without_the_network(source, written, tmp_path):
    (other,) = {VAE, TEXT_ENCODER} - {source.component}
    assert [fingerprint(folder, other) for folder in [*written, tmp_path]] == [None] * 4
    with pytest.raises(InputError, match="none: no such directory"):
        fingerprint(tmp_path / "none", other)


def test_a_tensor_is_missing_or_misshapen(source, written):
    [file] = (written[0] / source.component.name).glob("*.safetensors")
    tensors = load_file(file)
    name = source.component.rows(source.config)[0].diffusers
    values = tensors.pop(name)
    for damaged in ({}, {name: values.reshape(-1)}):
        save_file(tensors | damaged, file)
        with pytest.raises(InputError, match=rf"config\.json: tensor {name} is missing or misshapen; download it"):
            fingerprint(written[0], source.component)
    save_file(tensors | {name: values}, file)
    assert fingerprint(written[0], source.component) == fingerprint_source(source)


def test_fingerprints_stay_the_same(source):
    """Written down once: with other fingerprints, all prepared data would be refused."""
    assert (
        fingerprint_source(source)
        == {"vae": "8f0b8f90f0fdcf80", "text_encoder": "731806072d8e1b61"}[source.component.name]
    )


def test_few_values_are_read():
    start = time.process_time()
    assert fingerprint(WAN_TINY, VAE) != fingerprint(WAN_TINY, TEXT_ENCODER)
    assert time.process_time() - start < 1
