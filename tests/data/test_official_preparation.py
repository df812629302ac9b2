"""The latents and text embeddings of tfm-prepare against the steps of the official code (pzrain/TFM), in PyTorch.

The official code takes the first frames of a video as they are, at most `clip.frames` of them, and cuts shorter videos
to 4 n + 1 frames. It scales each frame bilinearly so that it covers the target size, cuts out the middle, and maps the
pixels to -1..1. The autoencoder gives the mean of the latents, which are normalised. All of this happens again in every
training step, in bfloat16; here it happens in float32.

The videos here store RGB. Most videos store colour at half the resolution, and programs differ in how they enlarge it.
"""

import csv
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from helpers.clips import encode, smooth_clip
from helpers.paths import WAN_TINY
from helpers.tiny_world import execute
from helpers.wan_reference import relative
from PIL import Image

from tfm_jax.arrays import pad_text
from tfm_jax.data.records import Record, open_records

FRAMES, HEIGHT, WIDTH = 9, 48, 80
CLIPS = {
    "wide.mp4": ((12, 70, 150), "A red disc moves right, slowly, while the camera's view remains still."),
    "tall.mp4": ((9, 130, 62), 'The scene’s light shifts: "dusk", then night. It\'s calm &amp; dark.'),
    "short.mp4": ((7, 40, 56), ""),
}
"""Name -> size of the video in frames and pixels, and its prompt."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
"""data.dtype -> the largest error, relative to the largest value."""


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("NAS") / "ShareGPT4Video" / "zip_folder" / "pixabay"
    folder.mkdir(parents=True)
    for number, (name, (size, _)) in enumerate(CLIPS.items()):
        encode(folder / name, smooth_clip(*size, seed=number), codec="libx264rgb", pix_fmt="rgb24")
    return folder


@pytest.fixture(scope="module", params=TOLERANCE)
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def records(videos, dtype, tmp_path_factory) -> dict[str, Record]:
    """What tfm-prepare makes of a list in the form of the official metadata_example.csv.

    The list has two columns of numbers that mean nothing, as pandas writes them, and absolute paths.
    """
    folder = tmp_path_factory.mktemp("training")
    with open(folder / "metadata_example.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["", "Unnamed: 0", "video", "prompt"])
        table.writerows([n, n, videos / name, prompt] for n, (name, (_, prompt)) in enumerate(CLIPS.items()))
    execute("prepare_data", [
        "--config=wan_tiny", f"--data.source={folder}/metadata_example.csv", "--data.absolute_paths=true",
        f"--data.path={folder}/latents", f"--clip.frames={FRAMES}", f"--clip.height={HEIGHT}", f"--clip.width={WIDTH}",
        "--clip.fps=native", "--clip.short=cut", "--clip.resize=bilinear", f"--data.dtype={dtype}",
    ])  # fmt: skip
    found = open_records(folder / "latents")
    return {Path(record.video).name: record for record in (found[n] for n in range(len(found)))}


def official_pixels(file: Path) -> torch.Tensor:
    """Return the pixels of a clip, `[1, 3, t, y, x]` in -1..1."""
    with av.open(str(file)) as container:
        frames = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    count = min(FRAMES, (len(frames) - 1) // 4 * 4 + 1)
    clip = np.stack([scale_and_crop(frame) for frame in frames[:count]])
    return (torch.from_numpy(clip).float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


def scale_and_crop(frame: Image.Image) -> np.ndarray:
    scale = max(WIDTH / frame.width, HEIGHT / frame.height)
    size = round(frame.width * scale), round(frame.height * scale)
    left, top = round((size[0] - WIDTH) / 2), round((size[1] - HEIGHT) / 2)
    whole = frame.resize(size, Image.Resampling.BILINEAR)  # as torchvision does it with pictures of Pillow
    return np.asarray(whole.crop((left, top, left + WIDTH, top + HEIGHT)))


@pytest.fixture(scope="module")
def pipeline() -> WanPipeline:
    return WanPipeline.from_pretrained(WAN_TINY, torch_dtype=torch.float32)


def official_latents(vae: AutoencoderKLWan, pixels: torch.Tensor) -> np.ndarray:
    """Return normalised latents `[f, h, w, c]`."""
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mode()[0]
    latents = mean.permute(1, 2, 3, 0).numpy()
    return (latents - np.float32(vae.config.latents_mean)) / np.float32(vae.config.latents_std)


@pytest.mark.parametrize("name", CLIPS)
def test_latents(videos, records, pipeline, dtype, name):
    expected = official_latents(pipeline.vae, official_pixels(videos / name))
    found = records[name].latents
    assert found.dtype == dtype
    assert relative(found, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", CLIPS)
def test_text_embeddings(records, pipeline, dtype, name):
    record = records[name]
    assert record.prompt == CLIPS[name][1]
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(record.prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    assert record.text.dtype == dtype
    assert relative(pad_text([record.text], 512)[0], expected[0].numpy()) < TOLERANCE[dtype]


def test_all_clips_of_the_list_are_prepared(videos, records):
    assert {record.video for record in records.values()} == {str(videos / name) for name in CLIPS}
