"""The networks of diffusers and transformers with random weights, and programs that run them."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import peft
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from einops import rearrange

from benchmarks.ours import inputs
from benchmarks.sizes import Sizes, Work
from benchmarks.timing import Program
from tfm_jax.config import OptimizerConfig
from tfm_jax.wan.transformer import TransformerConfig

TARGETS = ".*blocks.*(to_q|to_k|to_v|to_out.0|ffn.net.0.proj|ffn.net.2)"
"""The linear layers that our default selects, by their names in diffusers."""


def device_of(sizes: Sizes) -> torch.device:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch.device("cuda" if sizes.device == "gpu" else "cpu")


def program(sizes: Sizes, run: Callable[[], Any]) -> Program:
    """Return a program that waits until the device has done its work."""

    def waiting() -> Any:
        result = run()
        if sizes.device == "gpu":
            torch.cuda.synchronize()
        return result

    return waiting


@contextlib.contextmanager
def created_on(sizes: Sizes) -> Iterator[None]:
    """Create modules on the device and in the dtype of the benchmark."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, sizes.dtype))
    try:
        with device_of(sizes):
            yield
    finally:
        torch.set_default_dtype(before)


def transformer(config: TransformerConfig, sizes: Sizes) -> Any:
    with created_on(sizes):
        model: Any = WanTransformer3DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.head_dim,
            in_channels=config.channels,
            out_channels=config.channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.layers,
        )
    return model.eval().requires_grad_(False)


def autoencoder(base_dim: int, sizes: Sizes) -> Any:
    with created_on(sizes._replace(dtype="float32")):
        model: Any = AutoencoderKLWan(base_dim=base_dim)
    return model.eval().requires_grad_(False)


def tensor(array: np.ndarray, sizes: Sizes, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return an array on the device, in the dtype of the benchmark or in `dtype`."""
    return torch.from_numpy(array).to(device_of(sizes), dtype or getattr(torch, sizes.dtype))


def channels_first(array: np.ndarray) -> np.ndarray:
    """Return `b f h w c` as `b c f h w`, the layout of diffusers."""
    return np.ascontiguousarray(rearrange(array, "b f h w c -> b c f h w"))


def training(work: Work, sizes: Sizes) -> dict[str, Program]:
    """Return programs that take a step, with and without gradient checkpointing. Both share one model."""
    model = transformer(work.config, sizes)
    model.add_adapter(peft.LoraConfig(r=work.rank, lora_alpha=work.rank, target_modules=TARGETS))
    model.train()
    settings = OptimizerConfig()
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=settings.weight_decay)
    clean, text = (tensor(x, sizes) for x in (channels_first(inputs(work)[0]), inputs(work)[1]))

    def step(prepare: Callable[[], None]) -> Program:
        def run() -> None:
            prepare()
            noise = torch.randn_like(clean)
            sigma = torch.rand(len(clean), 1, 1, 1, 1, device=clean.device, dtype=clean.dtype)
            x_t = (1 - sigma) * clean + sigma * noise
            velocity = model(x_t, 1000 * sigma.flatten(), text).sample
            torch.nn.functional.mse_loss(velocity.float(), (noise - clean).float()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return program(sizes, run)

    return {
        "diffusers + PEFT, checkpointing": step(model.enable_gradient_checkpointing),
        "diffusers + PEFT": step(model.disable_gradient_checkpointing),
    }
