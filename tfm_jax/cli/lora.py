"""Work with LoRA files of any dialect.

    tfm-lora inspect kites.safetensors
    tfm-lora convert kites.safetensors kites_kohya.safetensors --dialect=kohya
    tfm-lora merge --model=weights/Wan2.1-T2V-1.3B-Diffusers --lora='[kites.safetensors:0.7, style.safetensors]' merged
    tfm-lora diff kites.safetensors other.safetensors
    tfm-lora extract weights/base weights/tuned tuned.safetensors --rank=32

A file with keys that do not belong to a LoRA for Wan2.1-T2V is refused.
"""

from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from tfm_jax.arrays import DTYPES, Dtype
from tfm_jax.cli import command
from tfm_jax.cli.convert import convert
from tfm_jax.config import NonEmptyPath, Positive, section
from tfm_jax.config.reading import shown
from tfm_jax.files import check_new_file
from tfm_jax.lora.applying import check_fits, weight_change
from tfm_jax.lora.combining import parse_choice, read_loras
from tfm_jax.lora.comparing import compare
from tfm_jax.lora.extracting import extract
from tfm_jax.lora.files import read_lora, write_lora
from tfm_jax.lora.inspecting import describe, draw, norms, read_contents
from tfm_jax.lora.keys import Dialect
from tfm_jax.wan.components import TRANSFORMER
from tfm_jax.wan.names import ModelLayout
from tfm_jax.wan.sources import find_source


@section
class Inspect:
    """Show the dialect, rank, alpha and dtype of a LoRA file, which linear layers it changes, and by how much."""

    file: Positional[NonEmptyPath]
    """LoRA file."""
    model: NonEmptyPath | None = None
    """Directory of the model that the LoRA must fit; null takes the number of blocks from the LoRA."""
    png: NonEmptyPath | None = None
    """PNG file to which the norms are plotted, too."""

    def execute(self) -> None:
        contents = read_contents(self.file)
        layers = None
        if self.model:
            config = find_source(self.model, TRANSFORMER).config
            check_fits(contents.lora, config, self.file)
            layers = config.layers
        print(describe(self.file, contents, layers))
        if self.png:
            draw(norms(contents.lora), self.png)
            print(f"{self.png}: the norms as a picture")


@section
class Convert:
    """Write a LoRA file in another dialect."""

    source: Positional[NonEmptyPath]
    """LoRA file in any dialect."""
    target: Positional[NonEmptyPath]
    """Safetensors file to write; it must not exist."""
    dialect: Dialect = "comfy"
    """Dialect to write; see tfm-export."""
    dtype: Dtype | None = None
    """Data type to write; null keeps that of the file."""

    def execute(self) -> None:
        check_new_file(self.target)
        contents = read_contents(self.source)
        dtype = DTYPES[self.dtype] if self.dtype else contents.dtype
        lora = contents.lora
        write_lora(self.target, lora, self.dialect, dtype, lora.metadata)
        more = f" and {len(lora.differences)} differences" if lora.differences else ""
        print(f"{self.target}: {len(lora.adapters)} adapters{more} ({self.dialect}, {dtype})")


@section
class Merge:
    """Add LoRAs to the weights of a model, and write the whole model."""

    model: NonEmptyPath
    """Directory of the weights, in any layout, or one safetensors file as ComfyUI has it."""
    target: Positional[NonEmptyPath]
    """Directory to write, which must be new or empty; with --to=comfy also a new .safetensors file for the transformer
    alone."""
    lora: NonEmptyPath | tuple[NonEmptyPath, ...]
    """LoRA file, or a list of files with or without strengths: [a.safetensors:0.7, b.safetensors]."""
    to: ModelLayout = "diffusers"
    """Layout to write."""
    dtype: Dtype = "bfloat16"
    """Data type of the kernels."""

    def execute(self) -> None:
        files = (self.lora,) if isinstance(self.lora, Path) else self.lora
        source = find_source(self.model, TRANSFORMER)
        lora = read_loras([parse_choice(file) for file in files])
        check_fits(lora, source.config, f"--lora={shown(self.lora)}")
        convert(self.model, self.target, self.to, self.dtype, weight_change(lora))


@section
class Diff:
    """Compare two LoRAs: for each linear layer, the cosine of the angle between the changes and the ratio of their
    norms."""

    first: Positional[NonEmptyPath]
    """LoRA file in any dialect."""
    second: Positional[NonEmptyPath]
    """LoRA file in any dialect."""

    def execute(self) -> None:
        first, second = read_lora(self.first), read_lora(self.second)
        by_linear, together = compare(first, second)
        for linear, (cosine, ratio) in by_linear.items():
            print(f"{linear!s:26}  cosine {cosine:7.4f}  norm ratio {ratio:8.4f}")
        print(f"all of these together       cosine {together.cosine:7.4f}  norm ratio {together.ratio:8.4f}")
        for file, adapters, others in (
            (self.first, first.adapters, second.adapters),
            (self.second, second.adapters, first.adapters),
        ):
            if only := [str(linear) for linear in adapters if linear not in others]:
                print(f"only in {file}: {len(only)} linear layers, such as {only[0]}")
        if first.differences or second.differences:
            print(f"differences of whole tensors: {len(first.differences)} and {len(second.differences)}, not compared")
        if first.magnitudes or second.magnitudes:
            print("magnitudes of a DoRA: not compared")


@section
class Extract:
    """Write the LoRA that comes closest to the difference between two models."""

    base: Positional[NonEmptyPath]
    """Directory of the weights of the base model, in any layout, or one safetensors file."""
    tuned: Positional[NonEmptyPath]
    """Directory or file of the weights of the fine-tuned model."""
    target: Positional[NonEmptyPath]
    """Safetensors file to write; it must not exist."""
    rank: Positive
    """Rank of the adapters."""
    dialect: Dialect = "comfy"
    """Dialect to write; see tfm-export."""
    dtype: Dtype = "bfloat16"
    """Data type of the factors."""

    def execute(self) -> None:
        check_new_file(self.target)
        base, tuned = (find_source(path, TRANSFORMER) for path in (self.base, self.tuned))
        lora, shares = extract(base, tuned, self.rank)
        metadata = {"base_model": str(self.base), "tuned_model": str(self.tuned), "rank": str(self.rank)}
        write_lora(self.target, lora, self.dialect, DTYPES[self.dtype], metadata)
        lowest = min(shares, key=shares.__getitem__)
        more = f" and {len(lora.differences)} differences of other tensors" if lora.differences else ""
        print(f"{self.target}: {len(lora.adapters)} adapters{more} ({self.dialect}, {self.dtype})")
        print(
            f"share of the squared norm of each difference: {shares[lowest]:.2%} in {lowest}, the lowest; "
            f"{sum(shares.values()) / len(shares):.2%} on average"
        )


COMMANDS = {"inspect": Inspect, "convert": Convert, "merge": Merge, "diff": Diff, "extract": Extract}


def execute(argv: Sequence[str]) -> None:
    command.parse_subcommand(COMMANDS, argv, "tfm-lora", __doc__).options().execute()


def main() -> None:
    command.run(execute)
