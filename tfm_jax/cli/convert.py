"""Convert Wan2.1 weights between three layouts: Diffusers, original (Wan-AI), and tfm_jax, which loads fastest.

    tfm-convert weights/Wan2.1-T2V-1.3B weights/wan-1.3b --to=tfm_jax --dtype=bfloat16

Every network that the source contains (transformer, vae, text_encoder) is converted; the tokenizer and the scheduler's
configuration are copied. The tensors are streamed one by one, so that models of any size need little memory.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm
from tyro.conf import Positional

from tfm_jax.arrays import DTYPES, Dtype
from tfm_jax.cli import command
from tfm_jax.config import NonEmptyPath, section
from tfm_jax.errors import InputError
from tfm_jax.files import check_new_directory
from tfm_jax.inputs import read_json
from tfm_jax.wan.components import COMPONENTS, TRANSFORMER
from tfm_jax.wan.names import Layout
from tfm_jax.wan.saving import Progress, find_scheduler, save_model
from tfm_jax.wan.sources import SIDECAR_SUFFIX, Change, find_source_or_none, no_change
from tfm_jax.wan.tokenizer import find_tokenizer


@section
class Options:
    source: Positional[NonEmptyPath]
    """Directory of the weights, in any layout."""
    target: Positional[NonEmptyPath]
    """Directory to write; it must be new or empty."""
    to: Layout
    """Layout to write."""
    dtype: Dtype = "bfloat16"
    """Data type of the kernels. The autoencoder is always float32."""


def execute(argv: Sequence[str]) -> None:
    options = command.parse(Options, argv, "tfm-convert", __doc__).options()
    convert(options.source, options.target, options.to, options.dtype)


def convert(source: Path, target: Path, layout: Layout, dtype: Dtype, change: Change = no_change) -> None:
    """Write the model in the directory `source` to `target`. `change` gives what is added to the transformer: see
    `Source`."""
    check_new_directory("target", target)
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"target={target}: is inside the source {source}; expected another directory")
    networks = [found for component in COMPONENTS if (found := find_source_or_none(source, component))]
    networks = [n._replace(change=change) if n.component is TRANSFORMER else n for n in networks]
    tokenizer, scheduler = find_tokenizer(source), find_scheduler(source)
    if not networks:
        raise InputError(f"{source}: contains no network of Wan2.1; expected weights in any of the three layouts")
    with written() as progress:
        save_model(networks, tokenizer, target, layout, DTYPES[dtype], scheduler=scheduler, progress=progress)
    names = [network.component.name for network in networks]
    names += [name for name, file in (("tokenizer", tokenizer), ("scheduler", scheduler)) if file]
    print(f"{target}: {', '.join(names)} ({layout} layout, {dtype})")
    _report_sidecar_files(target)


@contextlib.contextmanager
def written() -> Iterator[Progress]:
    """Show how many bytes have been written."""
    with tqdm(unit="B", unit_scale=True, desc="written") as bar:

        def progress(name: str, written: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(written)

        yield progress


def _report_sidecar_files(target: Path) -> None:
    for file in sorted(target.glob(f"*{SIDECAR_SUFFIX}")):
        fields = ", ".join(read_json(file))
        print(f"{file}: records {fields} of this model; other programs ignore this file and assume those of Wan2.1")


def main() -> None:
    command.run(execute)
