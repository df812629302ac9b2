"""Random damage to every kind of input: either the right content is read, or `InputError` is raised.

`make test` tries a few cases, always the same; the slow tests try thousands of new ones.
"""

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from helpers.clips import encode
from helpers.configured import configured
from helpers.fuzzing import DEEP, JUNK, TEXT, damaged_bytes, damaged_json, damaged_text
from helpers.paths import ROOT, WAN_TINY
from helpers.records import write_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from tfm_jax import config, video
from tfm_jax.checkpoint import Checkpoints
from tfm_jax.config import reading
from tfm_jax.data.format import Record
from tfm_jax.data.metadata import read_metadata
from tfm_jax.data.prepare import PrepareRun
from tfm_jax.data.records import open_records
from tfm_jax.errors import InputError
from tfm_jax.lora.files import read_lora
from tfm_jax.prompts import read_prompts
from tfm_jax.sampling.outputs import SampleRun
from tfm_jax.train.run import TrainRun
from tfm_jax.video_headers import MAX_SECONDS, read_header
from tfm_jax.wan import load_tokenizer
from tfm_jax.wan.components import COMPONENTS, VAE, abstract_parameters
from tfm_jax.wan.pth import open_pth
from tfm_jax.wan.sources import find_source
from tfm_jax.wan.tensors import open_safetensors, safetensors_in

MODEL = WAN_TINY
CONFIG = ROOT / "configs" / "wan_tiny.yaml"

Fuzz = Callable[[st.DataObject, Path], None]
"""A function that draws damaged input, writes it into a folder, and reads it."""


def refused(read: Callable[[], Any]) -> Any:
    """Return the result of `read`, or None if it raises InputError. Any other exception fails the test."""
    try:
        return read()
    except InputError:
        return None


def fresh(file: Path, content: str | bytes) -> Path:
    """Write a new file instead of overwriting an old one, which may still be mapped into memory."""
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return file


# --- Tables and text -------------------------------------------------------------------------------------------------


def metadata(data: st.DataObject, folder: Path) -> None:
    fresh(folder / "0.mp4", "")
    sound = 'video,prompt\n0.mp4,a disc\n"0.mp4","a ""blue"" disc, two\nlines"\n'
    piece = TEXT | st.sampled_from(["video", "prompt", ",", "\n", '"', "0.mp4", "\r", "../", "http://", "\ufeff"])
    text = st.lists(piece, max_size=20).map("".join)
    content = data.draw(damaged_text(sound, piece) | damaged_bytes(sound.encode()) | text)
    fresh(folder / "metadata.csv", content)
    for row in refused(partial(read_metadata, folder)) or []:
        assert row.path.resolve().is_relative_to(folder.resolve())


def metadata_lists(data: st.DataObject, folder: Path) -> None:
    """JSON, JSONL, ShareGPT4Video and pairs. What is accepted is in the right place and can be stored."""
    fresh(folder / "0.mp4", "")
    row = {"video": "0.mp4", "prompt": "a disc"}
    caption = {"idx": "-1", "content": "a disc"}
    annotation = {"video_path": "0.mp4", "video_id": "0", "captions": [{**caption, "idx": "0"}, caption]}
    kind = data.draw(st.sampled_from(["list.json", "list.jsonl", "sharegpt4video_40k.jsonl", "0.txt"]))
    if kind == "list.json":
        damaged = damaged_json([row, {**row, "prompt": "猫"}])
    else:
        some = damaged_json(annotation if kind.startswith("share") else row)
        damaged = st.lists(some | TEXT | st.sampled_from(["\r", "\ufeff", DEEP]), max_size=4).map("\n".join)
    content = data.draw(damaged | damaged.flatmap(lambda text: damaged_bytes(text.encode("utf-8", "replace"))))
    for name in ("0.txt", "sharegpt4video_40k.jsonl"):
        (folder / name).unlink(missing_ok=True)
    file = fresh(folder / kind, content)
    anywhere = data.draw(st.booleans())
    source = folder if kind == "0.txt" else file
    for clip in refused(partial(read_metadata, source, anywhere)) or []:
        assert clip.path.resolve().is_relative_to(folder.resolve()) or (anywhere and clip.video.startswith("/"))
        assert f"{clip.video}{clip.prompt}".encode()


def prompts(data: st.DataObject, folder: Path) -> None:
    content = data.draw(st.binary(max_size=40) | st.lists(TEXT | st.just("\n"), max_size=9).map("".join))
    found = refused(partial(read_prompts, fresh(folder / "prompts.txt", content)))
    assert found is None or all(prompt.strip() for prompt in found)


# --- Configurations --------------------------------------------------------------------------------------------------

KINDS = st.sampled_from([TrainRun, SampleRun, PrepareRun])


def check(data: st.DataObject, read: Callable[[type], Any]) -> None:
    """Every accepted configuration can be written as plain values."""
    found = refused(partial(read, data.draw(KINDS)))
    assert found is None or config.plain(found)


def sound_values() -> dict[str, Any]:
    """The configuration of the embedded model, with all required fields."""
    values = reading.read(CONFIG)
    values["train"]["output"] = values["sampling"]["output"] = values["data"]["path"] = "new"
    return values


def configuration_text(data: st.DataObject, folder: Path) -> None:
    signs = [
        ":", ": ", "\n", "\n  ", "- ", "&a ", "*a", "!!int ", "[", "]", "{", "}", "'", '"', "|", "%", "---\n", "<<",
        "#",
    ]  # fmt: skip
    odd = ["!!int x", "!!float y", "!!bool x", "!!timestamp x", "2020-13-45", "1:30", "0x1f", "9" * 5000, "[" * 3000]
    piece = st.sampled_from(signs) | st.sampled_from(odd) | TEXT
    sound = yaml.safe_dump(sound_values())
    content = data.draw(damaged_text(sound, piece) | damaged_bytes(sound.encode()) | st.lists(piece).map("".join))
    file = fresh(folder / "config.yaml", content)
    check(data, lambda kind: config.load(kind, file))


def configuration_values(data: st.DataObject, folder: Path) -> None:
    file = fresh(folder / "config.yaml", data.draw(damaged_json(sound_values())))
    check(data, lambda kind: config.load(kind, file))


def arguments(data: st.DataObject, folder: Path) -> None:
    file = fresh(folder / "config.yaml", json.dumps(sound_values()))
    names = st.sampled_from(sorted(reading._fields(config.Config)))
    values = (
        TEXT | JUNK.map(str) | JUNK.map(json.dumps) | st.sampled_from(["4", "16", "0.5", "null", "[q, k]", "[[", "fm"])
    )
    option = st.builds("--{}={}".format, names, values)
    odd = st.builds("--{}".format, names) | TEXT | TEXT.map("--{}".format)
    drawn = data.draw(
        st.lists(option | option | odd, max_size=3).filter(lambda found: not {"-h", "--help"} & set(found))
    )

    def read(kind: type) -> Any:
        try:
            return configured(kind, [f"--config={file}", *drawn])
        except SystemExit:  # tyro reports a malformed option
            raise InputError("malformed") from None

    check(data, read)


# --- Tensors ---------------------------------------------------------------------------------------------------------

LORA = {
    f"diffusion_model.blocks.{layer}.self_attn.{name}.lora_{part}.weight": np.ones(shape, np.float32)
    for layer in range(2)
    for name in "qk"
    for part, shape in (("A", (2, 4)), ("B", (4, 2)))
}
LORA_FILE = save(LORA, {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 2})})
HEADER_SIZE = struct.unpack("<Q", LORA_FILE[:8])[0]
HEADER = json.loads(LORA_FILE[8 : 8 + HEADER_SIZE])


def read_all(file: Path) -> None:
    for entry in open_safetensors(file).values():
        assert 0 in entry.shape or entry.read(...).shape == entry.shape


def check_lora(file: Path) -> None:
    refused(partial(read_all, file))
    lora = refused(partial(read_lora, file))
    assert lora is None or all(np.isfinite(factor).all() for pair in lora.adapters.values() for factor in pair)


def lora_bytes(data: st.DataObject, folder: Path) -> None:
    check_lora(fresh(folder / "lora", data.draw(damaged_bytes(LORA_FILE, 8 + HEADER_SIZE) | st.binary(max_size=64))))


def lora_header(data: st.DataObject, folder: Path) -> None:
    header = data.draw(damaged_json(HEADER)).encode()
    check_lora(fresh(folder / "lora", struct.pack("<Q", len(header)) + header + LORA_FILE[8 + HEADER_SIZE :]))


def lora_tensors(data: st.DataObject, folder: Path) -> None:
    """A valid file with tensors that may be a LoRA of any dialect, or none."""
    prefix = st.sampled_from(["diffusion_model.", "transformer.", "base_model.model.", "pipe.dit.", "", "unet."])
    place = st.sampled_from(
        ["blocks.0.self_attn.q", "blocks.0.attn1.to_q", "blocks.1.ffn.0", "blocks.-1.ffn.0", "blocks.0"]
    )
    part = st.sampled_from(["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "bias"])
    kohya = st.just("lora_unet_blocks_0_self_attn_q")
    names = st.builds("{}.{}".format, kohya | st.builds("{}{}".format, prefix, place), part)
    shapes = st.sampled_from([(2, 4), (4, 2), (3, 4), (), (1,), (0, 4), (2, 2, 2)])
    values = st.sampled_from([1, 2, 0, -1, float("nan"), float("inf")])
    types = st.sampled_from([np.float32, np.float32, np.float16, np.float64, np.int8, np.bool_])
    tensors = st.dictionaries(names, st.builds(_full, shapes, values, types), max_size=5)
    drawn = data.draw(tensors | st.builds(dict.__or__, st.just(LORA), tensors))
    check_lora(fresh(folder / "lora", save(drawn)))


def _full(shape: tuple[int, ...], value: float, dtype: Any) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.full(shape, value).astype(dtype)


def lora_metadata(data: st.DataObject, folder: Path) -> None:
    fields = data.draw(damaged_json({"transformer.r": 2, "transformer.lora_alpha": 2}) | JUNK.map(json.dumps) | TEXT)
    try:
        content = save(LORA, {"lora_adapter_metadata": fields})
    except UnicodeEncodeError:  # safetensors writes only UTF-8
        return
    check_lora(fresh(folder / "lora", content))


def index(data: st.DataObject, folder: Path) -> None:
    fresh(folder / "a.safetensors", LORA_FILE)
    sound = {"metadata": {"total_size": 8}, "weight_map": dict.fromkeys(LORA, "a.safetensors")}
    fresh(folder / "a.safetensors.index.json", data.draw(damaged_json(sound) | JUNK.map(json.dumps)))
    for file in refused(partial(safetensors_in, folder)) or []:
        assert file.parent == folder


def pth(data: st.DataObject, folder: Path) -> None:
    file = folder / "model.pth"
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, file)
    fresh(file, data.draw(damaged_bytes(file.read_bytes())))
    for entry in (refused(partial(open_pth, file)) or {}).values():
        assert 0 in entry.shape or entry.read(...).shape == entry.shape


# --- Models ----------------------------------------------------------------------------------------------------------


def architecture(data: st.DataObject, folder: Path) -> None:
    """Every accepted configuration describes a network that can be built."""
    component = data.draw(st.sampled_from(COMPONENTS))
    place = folder / component.name
    place.mkdir(exist_ok=True)
    weights = place / f"{component.stem}.safetensors"
    if not weights.exists():
        weights.symlink_to(MODEL / component.name / weights.name)
    sound = json.loads((MODEL / component.name / "config.json").read_text())
    fresh(place / "config.json", data.draw(damaged_json(sound) | JUNK.map(json.dumps)))
    source = refused(partial(find_source, folder, component))
    if source and component is not VAE and source.config.layers < 10:  # building an autoencoder takes seconds
        abstract_parameters(component, source.config, jnp.float32)


def tokenizer(data: st.DataObject, folder: Path) -> None:
    (folder / "tokenizer").mkdir(exist_ok=True)
    damaged = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (MODEL / "tokenizer" / name).read_bytes()
        if name == damaged:
            content = data.draw(damaged_bytes(content) | damaged_json(json.loads(content)))
        fresh(folder / "tokenizer" / name, content)
    found = refused(partial(load_tokenizer, folder))
    if found:
        refused(lambda: found(["a red disc moves right"]))


# --- Clips, prepared data and checkpoints ----------------------------------------------------------------------------


CODECS = {"mp4": "", "mkv": "matroska libx264", "avi": "avi mpeg4", "wmv": "asf wmv2", "flv": "flv flv"}
"""File suffix -> container and codec; `write_clip` writes mp4 files."""


def sound_clip(folder: Path, suffix: str) -> bytes:
    """Return a valid video of 5 frames of 16 x 16 pixels."""
    file = folder / f"sound.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    if not file.exists() and suffix == "mp4":
        video.write_clip(file, pixels, 16)
    elif not file.exists():
        container, codec = CODECS[suffix].split()
        encode(file, pixels, container=container, codec=codec)
    return file.read_bytes()


def clip(data: st.DataObject, folder: Path) -> None:
    kind = data.draw(st.sampled_from(list(CODECS)))
    sound = sound_clip(folder, kind)
    file = fresh(folder / f"clip.{kind}", data.draw(damaged_bytes(sound) | damaged_bytes(sound, 600)))
    header = refused(partial(read_header, file))
    assert header is None or 0 <= header.frames_at(16) <= 16 * MAX_SECONDS
    found = refused(lambda: video.read_clip(file, 5, 16, 16, 16))
    assert found is None or found.shape == (5, 16, 16, 3)


def image(data: st.DataObject, folder: Path) -> None:
    kind = data.draw(st.sampled_from(["png", "jpg", "webp"]))
    original = folder / f"sound.{kind}"
    if not original.exists():
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(original, exif=exif)
    sound = original.read_bytes()
    file = fresh(folder / f"image.{kind}", data.draw(damaged_bytes(sound) | damaged_bytes(sound, 100)))
    header = refused(partial(read_header, file))
    assert header is None or header.frames == 1
    found = refused(lambda: video.read_clip(file, 1, 16, 16, 16))
    assert found is None or found.shape == (1, 16, 16, 3)


def records(data: st.DataObject, folder: Path) -> None:
    """A record that is read equals the one that was written, whatever happened to the files."""
    place = folder / "latents"
    rng = np.random.default_rng(0)
    latents, text = rng.standard_normal((1, 2, 2, 4), np.float32), rng.standard_normal((3, 4), np.float32)
    if not place.exists():
        write_dataset(place, [Record(latents, text, "a disc", "0.mp4")])
    files = sorted(place.iterdir())
    file = data.draw(st.sampled_from(files))
    sound = file.read_bytes()
    fresh(file, data.draw(damaged_bytes(sound)))
    try:
        found = refused(lambda: open_records(place)[0])
        if found:
            np.testing.assert_array_equal(found.latents, latents)
            np.testing.assert_array_equal(found.text, text)
    finally:
        fresh(file, sound)


def checkpoint(data: st.DataObject, folder: Path) -> None:
    """A checkpoint that is restored equals the one that was saved, whatever happened to its files."""
    place = folder / "checkpoints"
    arrays = {"a": jnp.arange(6.0).reshape(2, 3), "step": jnp.int32(1)}
    if not place.exists():
        with Checkpoints(place, max_to_keep=1) as checkpoints:
            checkpoints.save(1, arrays, {"alpha": 4.0})
    files = sorted(path for path in place.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    sound = file.read_bytes()
    fresh(file, data.draw(damaged_bytes(sound)))
    try:
        with Checkpoints(place) as checkpoints:
            found = refused(checkpoints.restore)
        if found:
            assert found.metadata == {"alpha": 4.0}
            np.testing.assert_array_equal(found.arrays["a"], arrays["a"])
    finally:
        fresh(file, sound)


QUICK: dict[Fuzz, int] = {
    metadata: 400, metadata_lists: 400, prompts: 100, configuration_text: 200, configuration_values: 150,
    arguments: 100, lora_bytes: 200, lora_header: 300, lora_tensors: 200, lora_metadata: 200, index: 150, pth: 200,
    architecture: 200, tokenizer: 100, clip: 800, image: 300, records: 60, checkpoint: 60,
}  # fmt: skip
"""Function -> number of cases in `make test`."""


def fuzz(target: Fuzz, folder: Path, cases: int, **more: Any) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    settled = settings(max_examples=cases, deadline=None, database=None, suppress_health_check=checks, **more)
    settled(given(st.data())(lambda data: target(data, folder)))()


@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.__name__)
def test_a_few_cases(target: Fuzz, tmp_path):
    fuzz(target, tmp_path, QUICK[target], derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", QUICK, ids=lambda target: target.__name__)
def test_many_cases(target: Fuzz, tmp_path):
    fuzz(target, tmp_path, 15 * QUICK[target])


@pytest.mark.parametrize("kind", CODECS)
def test_a_clip_cut_at_every_length(tmp_path, kind):
    sound = sound_clip(tmp_path, kind)
    stride = 1 if kind in ("mp4", "mkv") else 7
    for length in range(0, len(sound), stride):
        file = fresh(tmp_path / f"clip.{kind}", sound[:length])
        refused(partial(read_header, file))
        found = refused(partial(video.read_clip, file, 5, 16, 16, 16))
        assert found is None or found.shape == (5, 16, 16, 3), length
