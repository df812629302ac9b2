"""Opens the prepared clips of a training run, and checks that they fit the model, the settings and the mesh."""

import dataclasses
import math
import operator

from jax.sharding import Mesh

from tfm_jax import config as configs
from tfm_jax import processes
from tfm_jax.config.reading import shown
from tfm_jax.data.batches import Batches
from tfm_jax.data.order import is_held_out
from tfm_jax.data.records import Records, check_encoder, open_records
from tfm_jax.errors import InputError
from tfm_jax.sharding import check_split
from tfm_jax.wan import find_base
from tfm_jax.wan.components import TEXT_ENCODER, VAE
from tfm_jax.wan.transformer import TransformerConfig, token_grid


def open_batches(
    data: configs.DataConfig,
    clip: configs.ClipConfig,
    model: configs.ModelConfig,
    batch_size: int,
    seed: int,
    mesh: Mesh,
) -> Batches:
    """Open the clips, print how many of which sizes there are, and return the batches of those to train on.

    Raises:
        InputError: the clips are missing or damaged, were prepared with other settings or another model, are fewer
            than a batch has rows, have prompts that are too long for the model, or have a number of tokens that the
            mesh cannot divide.
    """
    records = open_records(data.path)
    records[0]  # so that damage that affects all clips is noticed before the model is loaded
    _check_clip_settings(records, clip)
    _check_encoders(records, model)
    clips = [number for number, entry in enumerate(records.index) if not is_held_out(entry.video, data.held_out)]
    if not clips:
        raise InputError(f"data.held_out={data.held_out}: holds out all clips of {data.path}; expected a smaller one")
    text_len = find_base(model).config.text_len
    _check_prompts(records, text_len)
    batches = Batches(records, batch_size, seed, mesh, text_len, clips=clips, caption_dropout=data.caption_dropout)
    processes.print_once(_describe(batches))
    for shape in batches.buckets:
        check_split(model.heads, math.prod(token_grid(shape)), mesh)
    return batches


def describe_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def check_widths(records: Records, model: configs.ModelConfig, transformer: TransformerConfig) -> None:
    """Raise InputError unless the latents and the text embeddings have the widths that the transformer takes."""
    if (records.channels, records.text_dim) != (transformer.channels, transformer.text_dim):
        raise InputError(
            f"{records.folder}: prepared with {records.channels} channels and text width {records.text_dim}; the "
            f"transformer of {model.path} takes {transformer.channels} channels and text width {transformer.text_dim}; "
            "prepare the data with this model"
        )


def _describe(batches: Batches) -> str:
    total, buckets = len(batches.records), batches.buckets
    held_out = f", of which {total - len(batches.clips)} are held out" if total > len(batches.clips) else ""
    sizes = [describe_shape(shape) + (f" ({count})" if len(buckets) > 1 else "") for shape, count in buckets.items()]
    return f"data: {total} clips in {batches.records.folder}{held_out}, latents {', '.join(sizes)}"


def _check_clip_settings(records: Records, clip: configs.ClipConfig) -> None:
    """Raise InputError unless the clips were prepared with the clip settings of the configuration.

    Fields that did not exist yet when the clips were prepared have their defaults.
    """
    prepared = configs.from_plain(configs.ClipConfig, records.manifest.clip, f"{records.folder}: clip")
    for field in dataclasses.fields(clip):
        value, before = getattr(clip, field.name), getattr(prepared, field.name)
        if value != before:
            found = f"clip.{field.name}={shown(value)}: data.path={records.folder} was prepared with {shown(before)}"
            raise InputError(f"{found}; expected the same value")


def _check_prompts(records: Records, text_len: int) -> None:
    """Raise InputError if a prompt has more tokens than the transformer takes."""
    number, longest = max(enumerate(entry.tokens for entry in records.index), key=operator.itemgetter(1))
    if longest > text_len:
        found = f"{records.folder}: the prompt of clip {number} has {longest} tokens"
        raise InputError(f"{found}; expected at most {text_len}, as many as the transformer takes")


def _check_encoders(records: Records, model: configs.ModelConfig) -> None:
    """Raise InputError if the model has another autoencoder or text encoder than the one that made the clips."""
    missing = [part.name for part in (VAE, TEXT_ENCODER) if not check_encoder(records, model.path, part)]
    if missing:
        names = " and no ".join(missing)
        processes.print_once(f"note: {model.path} has no {names}, so nothing could be compared with that of the clips")
