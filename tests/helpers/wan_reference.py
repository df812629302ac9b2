"""The Wan transformer of diffusers with random weights, for comparison with ours."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from tfm_jax.wan.names import transformer_rows
from tfm_jax.wan.transformer import TransformerConfig

# The sizes differ in all that a port could confuse: heads, layers and head width, which splits unevenly for the RoPE.
SIZES = {
    "small": TransformerConfig(dim=48, ffn_dim=80, heads=2, layers=2, text_dim=20),
    "many heads": TransformerConfig(dim=96, ffn_dim=136, heads=6, layers=3, text_dim=36, freq_dim=64),
    "wide heads": TransformerConfig(dim=128, ffn_dim=200, heads=1, layers=1, text_dim=24),
}


def reference_transformer(config: TransformerConfig, seed: int = 0) -> WanTransformer3DModel:
    """Return a model with random tensors, including norms and biases, so that each affects the output."""
    model = WanTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=config.channels,
        out_channels=config.channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        eps=config.eps,
    )
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("weight") and weight.ndim == 1:
                weight.copy_(1 + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.1 * noise)
            else:
                weight.copy_(noise / np.sqrt(weight[0].numel()))
    return model.eval().requires_grad_(False)


def write_original(model: WanTransformer3DModel, config: TransformerConfig, directory: Path) -> None:
    """Write the model in the original layout of Wan-AI: one safetensors file and config.json."""
    tensors = model.state_dict()
    directory.mkdir(parents=True)
    renamed = {row.original: tensors[row.diffusers].contiguous() for row in transformer_rows(config.layers)}
    save_file(renamed, directory / "diffusion_pytorch_model.safetensors")
    values = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.channels,
        "model_type": "t2v",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "out_dim": config.channels,
        "text_len": 512,
    }
    (directory / "config.json").write_text(json.dumps(values))


def inputs(config: TransformerConfig, batch: int, f: int, h: int, w: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random latents `b f h w c`, timesteps and text embeddings."""
    rng = np.random.default_rng(seed)
    return {
        "latents": rng.standard_normal((batch, f, h, w, config.channels), np.float32),
        "timestep": rng.uniform(0, 1000, batch).astype(np.float32),
        "text": rng.standard_normal((batch, 512, config.text_dim), np.float32),
    }


def run_reference(model: torch.nn.Module, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Return the velocity that the reference predicts, `b f h w c`."""
    latents = torch.from_numpy(batch["latents"]).permute(0, 4, 1, 2, 3).contiguous()
    with torch.no_grad():
        out = model(latents, torch.from_numpy(batch["timestep"]), torch.from_numpy(batch["text"])).sample
    return out.permute(0, 2, 3, 4, 1).numpy()


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest absolute error divided by the largest absolute value of the reference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
