"""Convert Wan2.1 weights between four layouts: Diffusers, original (Wan-AI), comfy (ComfyUI), and tfm_jax, which loads
fastest.

    tfm-convert weights/Wan2.1-T2V-1.3B weights/wan-1.3b --to=tfm_jax --dtype=bfloat16
    tfm-convert weights/Wan2.1-T2V-1.3B wan2.1_t2v_1.3b.safetensors --to=comfy

Every network that the source contains (transformer, vae, text_encoder) is converted; the tokenizer and the scheduler's
configuration are copied. With --to=comfy, a target that ends with .safetensors gets the transformer alone. The tensors
are streamed one by one, so that models of any size need little memory.
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
from tfm_jax.files import check_new_directory, check_new_file
from tfm_jax.inputs import read_json
from tfm_jax.wan.components import COMPONENTS, TRANSFORMER
from tfm_jax.wan.names import ModelLayout
from tfm_jax.wan.saving import SPIECE_FILE, Progress, find_scheduler, save_model, save_single_file
from tfm_jax.wan.sources import SIDECAR_SUFFIX, Change, find_source, find_source_or_none, no_change, sidecar_file
from tfm_jax.wan.tokenizer import find_tokenizer


@section
class Options:
    source: Positional[NonEmptyPath]
    """Directory of the weights, in any layout, or one safetensors file as ComfyUI has it."""
    target: Positional[NonEmptyPath]
    """Directory to write, which must be new or empty; with --to=comfy also a new .safetensors file."""
    to: ModelLayout
    """Layout to write."""
    dtype: Dtype = "bfloat16"
    """Data type of the kernels. The autoencoder is always float32."""


def execute(argv: Sequence[str]) -> None:
    options = command.parse(Options, argv, "tfm-convert", __doc__).options()
    convert(options.source, options.target, options.to, options.dtype)


def convert(source: Path, target: Path, layout: ModelLayout, dtype: Dtype, change: Change = no_change) -> None:
    """Write the model in the directory or file `source` to `target`. `change` gives what is added to the transformer:
    see `Source`."""
    if layout == "comfy" and target.suffix == ".safetensors":
        check_new_file(target)
        check_new_file(sidecar_file(target))  # that of another model would be taken for ours
        transformer = find_source(source, TRANSFORMER)._replace(change=change)
        with written() as progress:
            save_single_file(transformer, target, DTYPES[dtype], progress)
        names = [TRANSFORMER.name]
    else:
        names = _convert_model(source, target, layout, dtype, change)
    print(f"{target}: {', '.join(names)} ({layout} layout, {dtype})")
    _report_sidecar_files(target)


def _convert_model(source: Path, target: Path, layout: ModelLayout, dtype: Dtype, change: Change) -> list[str]:
    """Write everything that `source` contains into the directory `target`, and return the names of the parts."""
    check_new_directory("target", target)
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"target={target}: is inside the source {source}; expected another directory")
    networks = [found for component in COMPONENTS if (found := find_source_or_none(source, component))]
    networks = [n._replace(change=change) if n.component is TRANSFORMER else n for n in networks]
    tokenizer, scheduler = find_tokenizer(source), find_scheduler(source)
    if not networks:
        raise InputError(f"{source}: contains no network of Wan2.1; expected weights in any of the four layouts")
    with written() as progress:
        save_model(networks, tokenizer, target, layout, DTYPES[dtype], scheduler=scheduler, progress=progress)
    if layout == "comfy" and not Path(tokenizer or "", SPIECE_FILE).is_file():
        print(f"note: {source} has no {SPIECE_FILE}, so ComfyUI finds no tokenizer in the text encoder's file")
    names = [network.component.name for network in networks]
    return names + [name for name, file in (("tokenizer", tokenizer), ("scheduler", scheduler)) if file]


@contextlib.contextmanager
def written() -> Iterator[Progress]:
    """Show how many bytes have been written."""
    with tqdm(unit="B", unit_scale=True, desc="written") as bar:

        def progress(name: str, written: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(written)

        yield progress


def _report_sidecar_files(target: Path) -> None:
    files = sorted(target.rglob(f"*{SIDECAR_SUFFIX}")) if target.is_dir() else [sidecar_file(target)]
    for file in filter(Path.exists, files):
        fields = ", ".join(read_json(file))
        print(f"{file}: records {fields} of this model; other programs ignore this file and assume those of Wan2.1")


def main() -> None:
    command.run(execute)
