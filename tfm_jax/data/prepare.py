"""Clips -> latents and text embeddings on disk, once, so that training never runs the encoders."""

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from tfm_jax import config as configs
from tfm_jax import video
from tfm_jax.config import section
from tfm_jax.data.metadata import read_metadata
from tfm_jax.data.records import Record, RecordWriter
from tfm_jax.errors import InputError
from tfm_jax.wan import load_text_encoder, load_tokenizer, load_vae
from tfm_jax.wan.tokenizer import encode_prompts


@section
class PrepareRun:
    """The sections that preparing data reads."""

    model: configs.ModelConfig
    clip: configs.ClipConfig
    data: configs.DataConfig


def prepare(run: PrepareRun) -> int:
    """Encode every clip that metadata.csv names and write `run.data.path`, whole or not at all.

    Returns:
        The number of clips.

    Raises:
        InputError: a row, a clip or the model is not as expected, or the folder to write is not empty.
    """
    if run.data.source is None:
        raise InputError("data.source is missing; expected the folder of metadata.csv and its clips")
    rows = read_metadata(run.data.source)
    clip = run.clip
    tokenizer = load_tokenizer(run.model.path)
    text_encoder = load_text_encoder(run.model.path, run.model.dtype)
    vae = load_vae(run.model.path)
    facts = {"model": str(run.model.path), **configs.plain(run)["clip"]}
    halting = []
    with RecordWriter(run.data.path, facts) as writer:
        for row in tqdm(rows, desc="preparing", unit="clip"):
            pixels = video.read_clip(row.path, clip.frames, clip.height, clip.width, clip.fps)
            if (pixels[1:] == pixels[:-1]).all(axis=(1, 2, 3)).any():
                halting.append(row.video)
            latents = np.asarray(vae.encode(jnp.asarray(video.from_uint8(pixels))[None]))[0]
            embeddings = np.asarray(encode_prompts(tokenizer, text_encoder, [row.prompt]).astype(jnp.float32))[0]
            tokens = int(tokenizer([row.prompt])[1].sum())
            writer.write(Record(latents, embeddings[:tokens], row.prompt, row.video))
    if halting:
        print(
            f"note: {len(halting)} clips show a frame twice in a row, such as {halting[0]}: "
            f"they stand still or have fewer than clip.fps={clip.fps:g} frames a second"
        )
    return len(rows)
