"""Conversions between layouts keep the whole model: every byte of the tensors, every field, tokenizer, scheduler."""

import errno
import itertools
import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers.paths import WAN_TINY

from tfm_jax.errors import InputError
from tfm_jax.wan.components import COMPONENTS, TEXT_ENCODER, TRANSFORMER, VAE, abstract_parameters
from tfm_jax.wan.saving import SCHEDULER_FILE, find_scheduler, save, save_model
from tfm_jax.wan.sources import Source, find_source
from tfm_jax.wan.tensors import LazyTensor
from tfm_jax.wan.text_encoder import TextEncoderConfig
from tfm_jax.wan.tokenizer import find_tokenizer
from tfm_jax.wan.vae import VaeConfig

LAYOUTS = ("diffusers", "original", "comfy", "tfm_jax")


def convert(source, target, layout):
    sources = [find_source(source, component) for component in COMPONENTS]
    dtype = ml_dtypes.bfloat16  # of the embedded model
    save_model(sources, find_tokenizer(source), target, layout, dtype, scheduler=find_scheduler(source))


def files(directory):
    """Content of all files by name, with JSON parsed."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    return {name: json.loads(text) if name.endswith(".json") else text for name, text in found.items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The embedded model in each layout. The statistics of its latents are not Wan2.1's."""
    directory = tmp_path_factory.mktemp("converted")
    for layout in LAYOUTS:
        convert(WAN_TINY, directory / layout, layout)
    return directory


def test_a_copy_is_the_same(converted):
    assert files(converted / "diffusers") == files(WAN_TINY)


@pytest.mark.parametrize(
    ("source", "target"), [pair for pair in itertools.product(LAYOUTS, LAYOUTS) if len({*pair}) == 2]
)
def test_every_pair_of_layouts(converted, tmp_path, source, target):
    """All files are equal, so any program that reads them makes the same video."""
    convert(converted / source, tmp_path / "target", target)
    assert files(tmp_path / "target") == files(converted / target)


def test_configurations_are_those_of_the_source(converted):
    for component in COMPONENTS:
        expected = find_source(WAN_TINY, component).config
        for layout in LAYOUTS:
            assert find_source(converted / layout, component).config == expected


def test_only_constants_that_are_not_wan2_1s_are_written_beside(converted):
    beside = list((converted / "original").glob("*.tfm_jax.json"))
    assert [path.name for path in beside] == ["Wan2.1_VAE.tfm_jax.json"]
    assert json.loads(beside[0].read_text()).keys() == {"latents_mean", "latents_std"}


def in_memory(component, config) -> Source:
    shapes = {name: value.shape for name, value in abstract_parameters(component, config, jnp.float32).items()}
    tensors = {name: LazyTensor(shape, Path("memory"), np.zeros(shape).__getitem__) for name, shape in shapes.items()}
    return Source(component, "tfm_jax", config, Path("memory"), tensors)


SMALL = {"base_dim": 4, "dim_mult": (1, 2), "num_res_blocks": 1, "temporal_downsample": (True,)}
TEXT = {"vocab_size": 40, "dim": 20, "heads": 2, "head_dim": 6, "ffn_dim": 24, "layers": 2}


@pytest.mark.parametrize(
    ("component", "config", "beside"),
    [
        (VAE, VaeConfig(**SMALL), set()),
        (
            VAE,
            VaeConfig(**SMALL, z_dim=2, latents_mean=(0.0, 1.0), latents_std=(1.0, 2.0)),
            {"latents_mean", "latents_std"},
        ),
        (TEXT_ENCODER, TextEncoderConfig(**TEXT), set()),
        (TEXT_ENCODER, TextEncoderConfig(**TEXT, buckets=16, max_distance=64, eps=1e-5), {"max_distance", "eps"}),
    ],
)
def test_the_original_layout_holds_every_architecture(tmp_path, component, config, beside):
    save(in_memory(component, config), tmp_path, "original", jnp.float32)
    assert find_source(tmp_path, component).config == config
    written = list(tmp_path.glob("*.tfm_jax.json"))
    assert {field for path in written for field in json.loads(path.read_text())} == beside


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"latents_std": [0]}', r"latents_std\[0\] is 0; expected greater than 0"),
        ('{"latents_std": [1]}', "latents_std has 1 values; expected z_dim = 16"),
        ('{"dim": 4}', "unknown field dim; expected one of base_dim"),
        ('{"other": 4}', "other is 4; Extra inputs are not permitted"),
        ("{", "not JSON"),
    ],
)
def test_a_damaged_file_beside(converted, tmp_path, content, words):
    shutil.copy(converted / "original" / "Wan2.1_VAE.pth", tmp_path)
    beside = tmp_path / "Wan2.1_VAE.tfm_jax.json"
    beside.write_text(content)
    with pytest.raises(InputError, match=f"^{beside}: {words}"):
        find_source(tmp_path, VAE)


def test_statistics_that_are_nowhere(tmp_path):
    config = VaeConfig(**SMALL, z_dim=2, latents_mean=(0.0, 1.0), latents_std=(1.0, 2.0))
    save(in_memory(VAE, config), tmp_path, "original", jnp.float32)
    (tmp_path / "Wan2.1_VAE.tfm_jax.json").unlink()
    with pytest.raises(InputError, match=r"Wan2\.1_VAE\.pth: latents_mean has 16 values; expected z_dim = 2"):
        find_source(tmp_path, VAE)


@pytest.mark.parametrize("layout", ["original", "tfm_jax"])
def test_the_scheduler_of_the_source_goes_along(tmp_path, layout):
    shutil.copytree(WAN_TINY, tmp_path / "source")
    theirs = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0, "use_flow_sigmas": True}
    (tmp_path / "source" / SCHEDULER_FILE).write_text(json.dumps(theirs))
    convert(tmp_path / "source", tmp_path / "between", layout)
    convert(tmp_path / "between", tmp_path / "back", "diffusers")
    assert json.loads((tmp_path / "back" / SCHEDULER_FILE).read_text()) == theirs
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "UniPCMultistepScheduler"]


def test_a_scheduler_of_no_class(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / SCHEDULER_FILE).write_text('{"_class_name": 5}')
    with pytest.raises(
        InputError, match=r"scheduler_config\.json: _class_name is 5; expected the name of a diffusers scheduler"
    ):
        find_scheduler(tmp_path)


def test_two_transformers(tmp_path):
    shutil.copytree(WAN_TINY / "transformer", tmp_path / "transformer")
    (tmp_path / "transformer_2").mkdir()
    with pytest.raises(InputError, match=r"has two transformers, as in Wan2\.2; expected Wan2\.1"):
        find_source(tmp_path, TRANSFORMER)


# --- Nothing is left behind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["", ".", "/", "file", "full"])
def test_targets_are_refused_before_any_work(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full", "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("tfm_jax.wan.saving.save", lambda *_: pytest.fail("work began"))
    with pytest.raises(InputError, match=r"^target="):
        save_model([in_memory(VAE, VaeConfig(**SMALL))], None, Path(target), "diffusers", jnp.float32)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("ending", [KeyboardInterrupt, OSError(errno.EFBIG, "File too large"), RuntimeError])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_ends_it(tmp_path, ending, layout):
    def progress(name, written):
        raise ending

    source = in_memory(VAE, VaeConfig(**SMALL))
    expected = ending if isinstance(ending, type) else type(ending)
    with pytest.raises(expected):
        save_model([source], None, tmp_path / "target", layout, jnp.float32, progress=progress)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_posix_fallocate(tmp_path, monkeypatch):
    source = in_memory(VAE, VaeConfig(**SMALL))
    for name in ("with", "without"):
        for layout in LAYOUTS:
            save_model([source], None, tmp_path / name / layout, layout, jnp.float32)
        monkeypatch.delattr("os.posix_fallocate", raising=False)
    assert files(tmp_path / "with") == files(tmp_path / "without")


def test_pytorch_is_missed_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        InputError, match=r"Wan2\.1_VAE\.pth: writing this file needs PyTorch; run pip install 'tfm-jax\[torch\]'"
    ):
        save_model([in_memory(VAE, VaeConfig(**SMALL))], None, tmp_path / "target", "original", jnp.float32)
    assert not list(tmp_path.iterdir())
