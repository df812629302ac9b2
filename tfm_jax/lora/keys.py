"""How LoRA files name their tensors.

A file has two factors for each linear layer with an adapter, and a DoRA also has magnitudes. A LoRA that distils a
model may also have differences: what is added to a whole weight (`.diff`), bias (`.diff_b`) or modulation table
(`.diff_m` or `.modulation.diff`).
"""

import re
from typing import Literal, NamedTuple, get_args

from tfm_jax.wan.names import (
    BLOCK_LINEARS,
    OUTER_LINEARS,
    BlockLinear,
    OuterLinear,
    TransformerLinear,
    transformer_rows,
)

Dialect = Literal["comfy", "diffsynth", "diffusers", "kohya"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)


class Keys(NamedTuple):
    """How a dialect names the module of a linear layer (as a format string) and the parts of the module."""

    module: str
    a: str
    b: str
    magnitude: str = ""
    """Empty if the dialect has no DoRA."""

    def key(self, linear: TransformerLinear, part: str) -> str:
        """Return the key of a part: A, B, alpha or magnitude."""
        names = {"A": self.a, "B": self.b, "alpha": "alpha", "magnitude": self.magnitude}
        return f"{self.module.format(linear)}.{names[part]}"


DIALECT_KEYS: dict[Dialect, Keys] = {
    "comfy": Keys("diffusion_model.{0.original}", "lora_A.weight", "lora_B.weight"),
    "diffsynth": Keys("{0.original}", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers": Keys("transformer.{0.diffusers}", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "kohya": Keys("lora_unet_{0.kohya}", "lora_down.weight", "lora_up.weight"),
}

LOADED_BY: dict[Dialect, str] = {
    "comfy": "diffusers, ComfyUI and DiffSynth",
    "diffsynth": "DiffSynth",
    "diffusers": "diffusers",
    "kohya": "diffusers, ComfyUI and musubi-tuner",
}
"""The programs that load each dialect."""

_PREFIX = r"(?: diffusion_model\. | pipe\.dit\. | transformer\. | base_model\.model\. )?"
_FACTOR = re.compile(
    rf"""(?: lora_unet_(?P<kohya> [^.]+ ) | {_PREFIX} (?P<module> .+? ) )
         \.(?P<part> alpha | lora_(?: A | B | down | up )(?: \.default )?\.weight
                  | lora_magnitude_vector(?: \.default )?(?: \.weight )? )""",
    re.VERBOSE,
)
_DIFFERENCE = re.compile(rf"{_PREFIX} (?P<module> .+? ) \.(?P<part> diff | diff_b | diff_m )", re.VERBOSE)
_NUMBER = "(0|[1-9][0-9]{0,5})"
_BLOCK = re.compile(rf"blocks\.{_NUMBER}\.(.+)")
_KOHYA_BLOCK = re.compile(rf"blocks_{_NUMBER}_(.+)")

_BLOCK_NAMES = {spelling: name for name, names in BLOCK_LINEARS.items() for spelling in (name, names.diffusers)}
_OUTER_NAMES = {spelling: name for name, names in OUTER_LINEARS.items() for spelling in (name, names.diffusers)}
_KOHYA_BLOCK_NAMES = {names.kohya: name for name, names in BLOCK_LINEARS.items()}
_KOHYA_OUTER_NAMES = {names.kohya: name for name, names in OUTER_LINEARS.items()}
_PARTS = {
    "lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
}  # fmt: skip

_TENSORS = {row.original for row in transformer_rows(1)}
_ENDINGS = {"diff": ".weight", "diff_b": ".bias", "diff_m": ".modulation"}


def network_order(linear: TransformerLinear) -> tuple[int, int]:
    """Return a key that sorts linear layers: those outside the blocks first, then block by block."""
    if isinstance(linear, OuterLinear):
        return -1, list(OUTER_LINEARS).index(linear.name)
    return linear.layer, list(BLOCK_LINEARS).index(linear.name)


def is_dora_scale(key: str) -> bool:
    """Whether a key names magnitudes that are not those of PEFT.

    Some programs mean norms along the other axis. ComfyUI means the same axis as PEFT if the lengths fit, but divides
    by the norms of the base's weights alone.
    """
    return key.endswith(".dora_scale")


def parse_factor(key: str) -> tuple[TransformerLinear, str] | None:
    """Return the linear layer and the part (A, B, alpha or magnitude) that a key names, or None if a Wan2.1-T2V LoRA
    has no such key."""
    match = _FACTOR.fullmatch(key)
    if not match:
        return None
    if match["kohya"]:
        linear = _find(match["kohya"], _KOHYA_BLOCK, _KOHYA_BLOCK_NAMES, _KOHYA_OUTER_NAMES)
    else:
        linear = _find(match["module"], _BLOCK, _BLOCK_NAMES, _OUTER_NAMES)
    return (linear, _PARTS[match["part"].split(".")[0]]) if linear else None


def _find(
    module: str, block: re.Pattern[str], block_names: dict[str, str], outer_names: dict[str, str]
) -> TransformerLinear | None:
    match = block.fullmatch(module)
    if not match:
        return OuterLinear(outer_names[module]) if module in outer_names else None
    return BlockLinear(int(match[1]), block_names[match[2]]) if match[2] in block_names else None


def parse_difference(key: str) -> str | None:
    """Return the original name of the tensor to which a difference is added, or None if the key names no difference."""
    match = _DIFFERENCE.fullmatch(key)
    if not match:
        return None
    module, part = match["module"], match["part"]
    name = module if part == "diff" and module.endswith("modulation") else module + _ENDINGS[part]
    return name if _BLOCK.sub(r"blocks.0.\2", name) in _TENSORS else None


def difference_key(name: str) -> str:
    """Return the key of a difference in a file for ComfyUI."""
    module, _, ending = name.rpartition(".")
    part = {"weight": f"{module}.diff", "bias": f"{module}.diff_b"}.get(ending, f"{name}.diff")
    return f"diffusion_model.{part}"
