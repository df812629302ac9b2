"""Tables that map tensor names and shapes in public checkpoints to ours. All other modules take these names from here.

Each tensor of a network is described by one `Row`. A parameter of stacked layers (`blocks`) has one row per layer.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from tfm_jax.wan.tensors import Shape
from tfm_jax.wan.vae import Stage, VaeConfig

Layout = Literal["diffusers", "original", "tfm_jax"]
"""How the tensors of a network are named."""

ModelLayout = Literal["diffusers", "original", "comfy", "tfm_jax"]
"""How a directory of weights is organised; `tfm_jax.wan.sources` describes the layouts."""

Shapes = Mapping[str, Shape]
"""Tensor name -> shape."""

SINGLE_FILES: dict[str, dict[Layout, str]] = {
    "transformer": {"original": "blocks.0.self_attn.q.weight"},
    "vae": {"original": "decoder.upsamples.0.residual.2.weight"},
    "text_encoder": {
        "diffusers": "encoder.block.0.layer.0.SelfAttention.q.weight",
        "original": "blocks.0.attn.q.weight",
    },
}
"""Network -> how the tensors are named in one file for ComfyUI -> a tensor by which such a file is recognised.

ComfyUI reads the first naming of each network. Files of the text encoder with original names are for its extensions.
"""


class Row(NamedTuple):
    """One tensor of a public checkpoint."""

    ours: str
    """Dotted path of the parameter in our module, list indices included."""
    layer: int | None
    """Index along the leading axis of our stacked parameter; None if the parameter is not stacked."""
    original: str
    """Name in the files published by Wan-AI."""
    diffusers: str
    """Name in the Diffusers layout."""
    axes: str
    """einops pattern from torch's axes to ours: a permutation that also drops axes of length 1."""

    def name(self, layout: Layout) -> str:
        """Return the name of the tensor in files of `layout`."""
        return self.ours if layout == "tfm_jax" else getattr(self, layout)

    @property
    def torch_axes(self) -> list[str]:
        """Names of torch's axes, in order; "1" stands for an axis of length 1 that we drop."""
        return self.axes.split("->")[0].split()

    @property
    def our_axes(self) -> list[str]:
        """Names of our axes, in order, without the axis of stacked layers."""
        return self.axes.split("->")[1].split()

    def torch_shape(self, shape: Shape) -> Shape:
        """Return the shape of the tensor in torch, given the whole shape of our parameter, stacked or not."""
        lengths = dict(zip(self.our_axes, shape if self.layer is None else shape[1:], strict=True))
        return tuple(lengths.get(axis, 1) for axis in self.torch_axes)


LINEAR = "o i -> i o"
VECTOR = "d -> d"
PATCH = "o c p q r -> p q r c o"
TABLE = "1 n d -> n d"


# --- Transformer -----------------------------------------------------------------------------------------------------

#                      ours              original             diffusers
_TRANSFORMER_LINEARS = """
                       text_in           text_embedding.0     condition_embedder.text_embedder.linear_1
                       text_out          text_embedding.2     condition_embedder.text_embedder.linear_2
                       time_in           time_embedding.0     condition_embedder.time_embedder.linear_1
                       time_out          time_embedding.2     condition_embedder.time_embedder.linear_2
                       time_projection   time_projection.1    condition_embedder.time_proj
                       head              head.head            proj_out
"""
_BLOCK_LINEARS = """
                       self_attn.q       self_attn.q          attn1.to_q
                       self_attn.k       self_attn.k          attn1.to_k
                       self_attn.v       self_attn.v          attn1.to_v
                       self_attn.o       self_attn.o          attn1.to_out.0
                       cross_attn.q      cross_attn.q         attn2.to_q
                       cross_attn.k      cross_attn.k         attn2.to_k
                       cross_attn.v      cross_attn.v         attn2.to_v
                       cross_attn.o      cross_attn.o         attn2.to_out.0
                       ffn.up            ffn.0                ffn.net.0.proj
                       ffn.down          ffn.2                ffn.net.2
"""
_BLOCK_VECTORS = """
    self_attn.norm_q.scale   self_attn.norm_q.weight    attn1.norm_q.weight
    self_attn.norm_k.scale   self_attn.norm_k.weight    attn1.norm_k.weight
    cross_attn.norm_q.scale  cross_attn.norm_q.weight   attn2.norm_q.weight
    cross_attn.norm_k.scale  cross_attn.norm_k.weight   attn2.norm_k.weight
    norm_cross.scale         norm3.weight               norm2.weight
    norm_cross.bias          norm3.bias                 norm2.bias
"""


def _table(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


def _linear(layer: int | None, ours: str, original: str, diffusers: str) -> list[Row]:
    return [
        Row(f"{ours}.kernel", layer, f"{original}.weight", f"{diffusers}.weight", LINEAR),
        Row(f"{ours}.bias", layer, f"{original}.bias", f"{diffusers}.bias", VECTOR),
    ]


class LinearNames(NamedTuple):
    """The names of a linear layer; within its block, if it is part of one."""

    ours: str
    original: str
    diffusers: str

    @property
    def kohya(self) -> str:
        """Name in LoRA files of the kohya dialect."""
        return self.original.replace(".", "_")


BLOCK_LINEARS = {names.original: names for names in (LinearNames(*row) for row in _table(_BLOCK_LINEARS))}
"""Original name -> all names, for the ten linear layers of a block in the order of their use."""

OUTER_LINEARS = {names.original: names for names in (LinearNames(*row) for row in _table(_TRANSFORMER_LINEARS))}
"""Original name -> all names, for the linear layers outside the blocks."""

LORA_TARGETS = tuple(dict.fromkeys(n.removeprefix("self_attn.").removeprefix("cross_attn.") for n in BLOCK_LINEARS))
"""The shortest `lora.targets` that select every linear layer of a block."""


class BlockLinear(NamedTuple):
    """One linear layer of one transformer block, for which this package trains adapters. `str` is the original name."""

    layer: int
    """Index of the block."""
    name: str
    """Original name within the block, such as `self_attn.q` or `ffn.2`: a key of `BLOCK_LINEARS`."""

    @property
    def ours(self) -> str:
        """Dotted path in our module, where the layers of all blocks are stacked."""
        return f"blocks.{BLOCK_LINEARS[self.name].ours}"

    @property
    def original(self) -> str:
        return f"blocks.{self.layer}.{self.name}"

    @property
    def diffusers(self) -> str:
        return f"blocks.{self.layer}.{BLOCK_LINEARS[self.name].diffusers}"

    @property
    def kohya(self) -> str:
        return f"blocks_{self.layer}_{BLOCK_LINEARS[self.name].kohya}"

    def __str__(self) -> str:
        return self.original


class OuterLinear(NamedTuple):
    """One of the six linear layers outside the blocks, for which LoRA files of other programs may have adapters."""

    name: str
    """Original name, such as `text_embedding.0`: a key of `OUTER_LINEARS`."""

    @property
    def ours(self) -> str:
        return OUTER_LINEARS[self.name].ours

    @property
    def original(self) -> str:
        return self.name

    @property
    def diffusers(self) -> str:
        return OUTER_LINEARS[self.name].diffusers

    @property
    def kohya(self) -> str:
        return OUTER_LINEARS[self.name].kohya

    def __str__(self) -> str:
        return self.original


TransformerLinear = BlockLinear | OuterLinear
"""A linear layer of the transformer."""


def transformer_rows(layers: int) -> list[Row]:
    """List the tensors of a Wan2.1-T2V transformer (`wan/modules/model.py`; `transformer_wan.py` in diffusers)."""
    rows = [
        Row("patch_in.kernel", None, "patch_embedding.weight", "patch_embedding.weight", PATCH),
        Row("patch_in.bias", None, "patch_embedding.bias", "patch_embedding.bias", VECTOR),
        Row("head_modulation", None, "head.modulation", "scale_shift_table", TABLE),
    ]
    for names in OUTER_LINEARS.values():
        rows += _linear(None, *names)
    for n in range(layers):
        rows.append(Row("blocks.modulation", n, f"blocks.{n}.modulation", f"blocks.{n}.scale_shift_table", TABLE))
        for name, names in BLOCK_LINEARS.items():
            linear = BlockLinear(n, name)
            rows += _linear(n, f"blocks.{names.ours}", linear.original, linear.diffusers)
        for ours, original, diffusers in _table(_BLOCK_VECTORS):
            rows.append(Row(f"blocks.{ours}", n, f"blocks.{n}.{original}", f"blocks.{n}.{diffusers}", VECTOR))
    return rows


# --- Video autoencoder -----------------------------------------------------------------------------------------------

CONV3D = "o i t h w -> t h w i o"
CONV2D = "o i h w -> h w i o"
POINT3D = "o i 1 1 1 -> i o"
POINT2D = "o i 1 1 -> i o"
GAMMA3D = "c 1 1 1 -> c"
GAMMA2D = "c 1 1 -> c"


def _conv(ours: str, original: str, diffusers: str, axes: str) -> list[Row]:
    return [
        Row(f"{ours}.kernel", None, f"{original}.weight", f"{diffusers}.weight", axes),
        Row(f"{ours}.bias", None, f"{original}.bias", f"{diffusers}.bias", VECTOR),
    ]


def _gamma(ours: str, original: str, diffusers: str, axes: str) -> list[Row]:
    return [Row(f"{ours}.gamma", None, f"{original}.gamma", f"{diffusers}.gamma", axes)]


def _residual_block(ours: str, original: str, diffusers: str, *, shortcut: bool) -> list[Row]:
    rows = [
        *_gamma(f"{ours}.norm1", f"{original}.residual.0", f"{diffusers}.norm1", GAMMA3D),
        *_conv(f"{ours}.conv1", f"{original}.residual.2", f"{diffusers}.conv1", CONV3D),
        *_gamma(f"{ours}.norm2", f"{original}.residual.3", f"{diffusers}.norm2", GAMMA3D),
        *_conv(f"{ours}.conv2", f"{original}.residual.6", f"{diffusers}.conv2", CONV3D),
    ]
    if shortcut:
        rows += _conv(f"{ours}.shortcut", f"{original}.shortcut", f"{diffusers}.conv_shortcut", POINT3D)
    return rows


def _stage(ours: str, original: str, diffusers: str, stage: Stage) -> list[Row]:
    if not stage.resample:
        return _residual_block(ours, original, diffusers, shortcut=stage.features_in != stage.features_out)
    rows = _conv(f"{ours}.resample", f"{original}.resample.1", f"{diffusers}.resample.1", CONV2D)
    if stage.time:
        rows += _conv(f"{ours}.time_conv", f"{original}.time_conv", f"{diffusers}.time_conv", CONV3D)
    return rows


def _coder_ends(side: str) -> list[Row]:
    """List the tensors of the first convolution, the middle and the head; `side` is `encoder` or `decoder`."""
    middle = f"{side}.mid_block"
    return [
        *_conv(f"{side}.conv_in", f"{side}.conv1", f"{side}.conv_in", CONV3D),
        *_residual_block(f"{side}.mid.0", f"{side}.middle.0", f"{middle}.resnets.0", shortcut=False),
        *_gamma(f"{side}.mid.1.norm", f"{side}.middle.1.norm", f"{middle}.attentions.0.norm", GAMMA2D),
        *_conv(f"{side}.mid.1.to_qkv", f"{side}.middle.1.to_qkv", f"{middle}.attentions.0.to_qkv", POINT2D),
        *_conv(f"{side}.mid.1.proj", f"{side}.middle.1.proj", f"{middle}.attentions.0.proj", POINT2D),
        *_residual_block(f"{side}.mid.2", f"{side}.middle.2", f"{middle}.resnets.1", shortcut=False),
        *_gamma(f"{side}.norm_out", f"{side}.head.0", f"{side}.norm_out", GAMMA3D),
        *_conv(f"{side}.conv_out", f"{side}.head.2", f"{side}.conv_out", CONV3D),
    ]


def vae_rows(config: VaeConfig) -> list[Row]:
    """List the tensors of a Wan2.1 autoencoder (`wan/modules/vae.py`; `autoencoder_kl_wan.py` in diffusers)."""
    rows = [
        *_coder_ends("encoder"),
        *_coder_ends("decoder"),
        *_conv("quant_conv", "conv1", "quant_conv", POINT3D),
        *_conv("post_quant_conv", "conv2", "post_quant_conv", POINT3D),
    ]
    for i, stage in enumerate(config.encoder_stages()):
        rows += _stage(f"encoder.down.{i}", f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}", stage)
    for i, stage in enumerate(config.decoder_stages()):
        block, place = divmod(i, config.num_res_blocks + 2)
        inner = "upsamplers.0" if stage.resample else f"resnets.{place}"
        rows += _stage(f"decoder.up.{i}", f"decoder.upsamples.{i}", f"decoder.up_blocks.{block}.{inner}", stage)
    return rows


# --- Text encoder ----------------------------------------------------------------------------------------------------

#   ours                      original                         diffusers
_TEXT_BLOCK_LINEARS = """
    attention.q.kernel        attn.q.weight                    layer.0.SelfAttention.q.weight
    attention.k.kernel        attn.k.weight                    layer.0.SelfAttention.k.weight
    attention.v.kernel        attn.v.weight                    layer.0.SelfAttention.v.weight
    attention.o.kernel        attn.o.weight                    layer.0.SelfAttention.o.weight
    ffn.gate.kernel           ffn.gate.0.weight                layer.1.DenseReluDense.wi_0.weight
    ffn.up.kernel             ffn.fc1.weight                   layer.1.DenseReluDense.wi_1.weight
    ffn.down.kernel           ffn.fc2.weight                   layer.1.DenseReluDense.wo.weight
"""
_TEXT_BLOCK_VECTORS = """
    norm1.scale               norm1.weight                     layer.0.layer_norm.weight
    norm2.scale               norm2.weight                     layer.1.layer_norm.weight
"""
_TEXT_BLOCK_TABLES = """
    attention.position_bias   pos_embedding.embedding.weight   layer.0.SelfAttention.relative_attention_bias.weight
"""

TEXT_ENCODER_ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
"""Alternative name in transformers -> the name used here. Files may hold the embedding under either name or both."""


def text_encoder_rows(layers: int) -> list[Row]:
    """List the tensors of a umT5 encoder (`wan/modules/t5.py`; `modeling_umt5.py` in transformers)."""
    rows = [
        Row("embedding", None, "token_embedding.weight", "shared.weight", "v d -> v d"),
        Row("norm.scale", None, "norm.weight", "encoder.final_layer_norm.weight", VECTOR),
    ]
    tables = [(_TEXT_BLOCK_LINEARS, LINEAR), (_TEXT_BLOCK_VECTORS, VECTOR), (_TEXT_BLOCK_TABLES, "r n -> r n")]
    for n in range(layers):
        for table, axes in tables:
            for ours, original, diffusers in _table(table):
                rows.append(Row(f"blocks.{ours}", n, f"blocks.{n}.{original}", f"encoder.block.{n}.{diffusers}", axes))
    return rows
