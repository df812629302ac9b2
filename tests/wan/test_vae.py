"""The video autoencoder against diffusers' AutoencoderKLWan at random weights."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx

from tfm_jax.errors import InputError
from tfm_jax.wan.components import VAE, abstract_model, abstract_parameters, named_parameters
from tfm_jax.wan.names import vae_rows
from tfm_jax.wan.sizes import vae_sizes
from tfm_jax.wan.vae import VaeConfig, WanVae

SMALL = VaeConfig(base_dim=8)
OTHER = VaeConfig(
    base_dim=12,
    z_dim=3,
    dim_mult=(1, 3, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    latents_mean=(0.5, -1.0, 0.25),
    latents_std=(2.0, 0.5, 1.5),
)
CONFIGS = {"small": SMALL, "other": OTHER}

# Names and shapes of some tensors of the published model.
ORIGINAL_NAMES = {
    "conv1.weight": ("quant_conv.weight", (32, 32, 1, 1, 1)),
    "conv2.bias": ("post_quant_conv.bias", (16,)),
    "encoder.conv1.weight": ("encoder.conv_in.weight", (96, 3, 3, 3, 3)),
    "encoder.downsamples.2.resample.1.weight": ("encoder.down_blocks.2.resample.1.weight", (96, 96, 3, 3)),
    "encoder.downsamples.3.residual.0.gamma": ("encoder.down_blocks.3.norm1.gamma", (96, 1, 1, 1)),
    "encoder.downsamples.3.residual.6.bias": ("encoder.down_blocks.3.conv2.bias", (192,)),
    "encoder.downsamples.3.shortcut.weight": ("encoder.down_blocks.3.conv_shortcut.weight", (192, 96, 1, 1, 1)),
    "encoder.downsamples.8.time_conv.weight": ("encoder.down_blocks.8.time_conv.weight", (384, 384, 3, 1, 1)),
    "encoder.middle.0.residual.2.weight": ("encoder.mid_block.resnets.0.conv1.weight", (384, 384, 3, 3, 3)),
    "encoder.head.2.weight": ("encoder.conv_out.weight", (32, 384, 3, 3, 3)),
    "decoder.conv1.weight": ("decoder.conv_in.weight", (384, 16, 3, 3, 3)),
    "decoder.middle.1.norm.gamma": ("decoder.mid_block.attentions.0.norm.gamma", (384, 1, 1)),
    "decoder.middle.1.to_qkv.weight": ("decoder.mid_block.attentions.0.to_qkv.weight", (1152, 384, 1, 1)),
    "decoder.middle.2.residual.3.gamma": ("decoder.mid_block.resnets.1.norm2.gamma", (384, 1, 1, 1)),
    "decoder.upsamples.3.time_conv.weight": ("decoder.up_blocks.0.upsamplers.0.time_conv.weight", (768, 384, 3, 1, 1)),
    "decoder.upsamples.4.shortcut.weight": ("decoder.up_blocks.1.resnets.0.conv_shortcut.weight", (384, 192, 1, 1, 1)),
    "decoder.upsamples.11.resample.1.bias": ("decoder.up_blocks.2.upsamplers.0.resample.1.bias", (96,)),
    "decoder.upsamples.14.residual.6.weight": ("decoder.up_blocks.3.resnets.2.conv2.weight", (96, 96, 3, 3, 3)),
    "decoder.head.0.gamma": ("decoder.norm_out.gamma", (96, 1, 1, 1)),
}


def make_reference(config: VaeConfig) -> AutoencoderKLWan:
    """diffusers' autoencoder with random tensors: norm scales near 1 and small biases."""
    model = AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("gamma"):
                value.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                value.copy_(0.1 * noise)
            else:
                value.copy_(noise * value[0].numel() ** -0.5)
    return model.eval()


def original_names(state: dict[str, torch.Tensor], config: VaeConfig) -> dict[str, torch.Tensor]:
    rename = {row.diffusers: row.original for row in vae_rows(config)}
    return {rename[name]: value for name, value in state.items()}


def fill(config: VaeConfig, state: dict[str, torch.Tensor], layout: str, dtype=jnp.float32) -> WanVae:
    """Our autoencoder with the weights of a torch state dict. Checks that each tensor matches one parameter."""
    vae = abstract_model(VAE, config, dtype)
    params = named_parameters(vae)
    rows = vae_rows(config)
    assert sorted(row.ours for row in rows) == sorted(params)
    assert sorted(getattr(row, layout) for row in rows) == sorted(state)
    for row in rows:
        value = jnp.asarray(einops.rearrange(state[getattr(row, layout)].float().numpy(), row.axes), dtype)
        assert value.shape == params[row.ours].shape, row
        params[row.ours].set_value(value)
    return vae


def random_video(batch: int, frames: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(frames)
    return rng.uniform(-1, 1, (batch, frames, height, width, 3)).astype(np.float32)


def reference_encode(model: AutoencoderKLWan, video: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        mu = model.encode(torch.tensor(video).permute(0, 4, 1, 2, 3)).latent_dist.mode()
    mu = mu.permute(0, 2, 3, 4, 1).numpy()
    return (mu - np.float32(model.config.latents_mean)) / np.float32(model.config.latents_std)


def reference_decode(model: AutoencoderKLWan, latents: np.ndarray) -> np.ndarray:
    z = latents * np.float32(model.config.latents_std) + np.float32(model.config.latents_mean)
    with torch.no_grad():
        video = model.decode(torch.tensor(z).permute(0, 4, 1, 2, 3)).sample
    return video.permute(0, 2, 3, 4, 1).numpy()


def relative(ours: jax.Array, reference: np.ndarray) -> float:
    assert ours.shape == reference.shape
    return float(np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max())


def cosine(ours: jax.Array, reference: np.ndarray) -> float:
    a, b = np.asarray(ours, np.float64).ravel(), np.asarray(reference, np.float64).ravel()
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def references() -> dict[str, AutoencoderKLWan]:
    return {name: make_reference(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def vaes(references) -> dict[tuple[str, str], WanVae]:
    loaded = {}
    for name, config in CONFIGS.items():
        state = references[name].state_dict()
        loaded[name, "diffusers"] = fill(config, state, "diffusers")
        loaded[name, "original"] = fill(config, original_names(state, config), "original")
    return loaded


@pytest.mark.parametrize(
    ("name", "layout", "batch", "frames", "height", "width"),
    [
        ("small", "diffusers", 1, 1, 24, 40),
        ("small", "diffusers", 2, 5, 24, 40),
        ("small", "original", 2, 5, 24, 40),
        ("small", "original", 1, 17, 24, 40),
        ("small", "diffusers", 1, 21, 24, 8),
        ("other", "diffusers", 2, 1, 12, 20),
        ("other", "original", 2, 17, 28, 12),
    ],
)
def test_equals_diffusers(references, vaes, name, layout, batch, frames, height, width):
    video = random_video(batch, frames, height, width)
    latents = reference_encode(references[name], video)
    decoded = reference_decode(references[name], latents)
    assert np.mean(np.abs(decoded) < 1) > 0.5, "most of the comparison would be between clipped values"
    assert relative(vaes[name, layout].encode(jnp.asarray(video)), latents) <= 1e-4
    assert relative(vaes[name, layout].decode(jnp.asarray(latents)), decoded) <= 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_close_to_float32(references, name):
    reference = references[name]
    vae = fill(CONFIGS[name], reference.state_dict(), "diffusers", jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(vae))} == {jnp.dtype(jnp.bfloat16)}
    video = random_video(1, 17, 16, 24)
    latents = reference_encode(reference, video)
    decoded = reference_decode(reference, latents)
    assert cosine(vae.encode(jnp.asarray(video)), latents) >= 0.999
    assert cosine(vae.decode(jnp.asarray(latents)), decoded) >= 0.999


def test_later_frames_do_not_change_earlier_latents(vaes):
    vae = vaes["small", "diffusers"]
    video = random_video(1, 17, 24, 40)
    changed = video.copy()
    changed[:, 9:] *= -1
    before, after = vae.encode(jnp.asarray(video)), vae.encode(jnp.asarray(changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(before[:, 3] - after[:, 3]).max() > 1e-3


def test_decoded_video_is_clipped(vaes):
    decoded = vaes["small", "diffusers"].decode(10 * jax.random.normal(jax.random.key(0), (1, 5, 3, 5, 16)))
    assert np.abs(decoded).max() == 1


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_memory_does_not_grow_with_frames(vaes, method):
    def temporary_bytes(frames: int) -> int:
        shape = (2, frames, 32, 32, 3) if method == "encode" else (2, 1 + (frames - 1) // 4, 8, 8, 3)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        compiled = jax.jit(getattr(WanVae, method)).lower(vaes["other", "diffusers"], x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(17), temporary_bytes(65)
    assert long - short <= 0.01 * short, (short, long)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 16, 3), "video has 3 frames; expected 4n + 1"),
        ((1, 5, 20, 16, 3), "video is 20x16; expected multiples of 8"),
        ((1, 5, 16, 20, 3), "video is 16x20; expected multiples of 8"),
    ],
)
def test_video_of_wrong_size_is_refused(vaes, shape, message):
    with pytest.raises(InputError) as error:
        vaes["small", "diffusers"].encode(jnp.zeros(shape))
    assert str(error.value) == message


def test_full_size_has_the_published_tensors():
    with torch.device("meta"):
        state = AutoencoderKLWan().state_dict()
    rows = vae_rows(VaeConfig())
    assert len(rows) == 194
    assert {row.diffusers for row in rows} == set(state)
    by_original = {row.original: row for row in rows}
    assert len(by_original) == 194
    for original, (diffusers, shape) in ORIGINAL_NAMES.items():
        assert by_original[original].diffusers == diffusers
        assert tuple(state[diffusers].shape) == shape
    shapes = {name: value.shape for name, value in abstract_parameters(VAE, VaeConfig(), jnp.float32).items()}
    assert sorted(row.ours for row in rows) == sorted(shapes)
    assert sum(np.prod(shape) for shape in shapes.values()) == 126_892_531
    for row in rows:
        torch_shape = tuple(state[row.diffusers].shape)
        assert einops.rearrange(np.broadcast_to(0, torch_shape), row.axes).shape == shapes[row.ours], row


@pytest.mark.parametrize(
    "config",
    [
        VaeConfig(),
        VaeConfig(base_dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True)),
        VaeConfig(base_dim=8, dim_mult=(2, 1, 4, 4), num_res_blocks=3),
    ],
)
def test_config_is_read_off_the_original_tensors(config):
    with torch.device("meta"):
        state = original_names(make_reference(config).state_dict(), config)
    sizes = vae_sizes({name: tuple(value.shape) for name, value in state.items()})
    assert VaeConfig(**sizes) == config


def test_tensors_of_another_model_are_refused(references):
    def message(shapes: dict[str, tuple[int, ...]]) -> str:
        with pytest.raises(InputError) as error:
            vae_sizes(shapes)
        return str(error.value)

    def shapes(name: str) -> dict[str, tuple[int, ...]]:
        state = original_names(references[name].state_dict(), CONFIGS[name])
        return {name: tuple(value.shape) for name, value in state.items()}

    diffusers = {name: tuple(value.shape) for name, value in references["small"].state_dict().items()}
    assert message(diffusers).startswith("autoencoder has no tensor conv2.weight; expected the original layout")
    cut = {name: shape for name, shape in shapes("small").items() if not name.startswith("encoder.downsamples.10.")}
    assert message(cut).startswith("encoder.downsamples has block widths [[8, 8], [16, 16], [32, 32], [32]]")
    odd = shapes("small") | {"encoder.downsamples.1.residual.6.weight": (12, 8, 3, 3, 3)}
    assert message(odd).startswith("encoder.downsamples has block widths [[8, 12],")
    missing = {name: shape for name, shape in shapes("small").items() if "downsamples.4.residual.6" not in name}
    assert message(missing).startswith("autoencoder has no tensor encoder.downsamples.4.residual.6.weight")


def test_config_with_missing_statistics_is_refused():
    with pytest.raises(InputError, match="latents_mean has 16 values; expected z_dim = 4"):
        VaeConfig(z_dim=4)
    with pytest.raises(InputError, match="temporal_downsample has 3 values; expected 1, one fewer than dim_mult"):
        VaeConfig(dim_mult=(1, 2))
