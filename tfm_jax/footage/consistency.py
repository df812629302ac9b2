"""Consistency of what a video shows, by features of a network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from tfm_jax.errors import InputError
from tfm_jax.footage.metric import Frame
from tfm_jax.inputs import read_json, short_repr

Embed: TypeAlias = Callable[[Frame], Float[np.ndarray, "features"]]
"""Returns the features of a frame, as a vector of length 1."""

Kind: TypeAlias = Literal["dino", "clip"]


class Recipe(NamedTuple):
    """How VBench uses a network."""

    metric: str
    model_types: tuple[str, ...]
    """Values of model_type in config.json that such a network may have."""
    model: str
    """Name of the class in transformers."""
    options: dict[str, Any]
    """Arguments of the class."""
    features: Callable[[Any, Any], Any]
    """Returns the features of a batch of pictures, given the model and the pictures."""
    scaling: str
    cropped: bool
    """Whether only the square in the centre of the frame is used."""
    mean: tuple[float, float, float]
    """Mean and standard deviation of the colours that the network was trained with."""
    deviation: tuple[float, float, float]


RECIPES: dict[Kind, Recipe] = {
    "dino": Recipe(
        metric="subject_consistency",
        model_types=("vit",),
        model="ViTModel",
        options={"add_pooling_layer": False},
        features=lambda model, pixels: model(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 0],
        scaling="bilinear",
        cropped=False,
        mean=(0.485, 0.456, 0.406),
        deviation=(0.229, 0.224, 0.225),
    ),
    "clip": Recipe(
        metric="background_consistency",
        model_types=("clip", "clip_vision_model"),
        model="CLIPVisionModelWithProjection",
        options={},
        features=lambda model, pixels: model(pixels).image_embeds,
        scaling="bicubic",
        cropped=True,
        mean=(0.48145466, 0.4578275, 0.40821073),
        deviation=(0.26862954, 0.26130258, 0.27577711),
    ),
}


class Consistency:
    """Mean similarity of each frame with the previous frame and with the first, as VBench defines it.

    The similarity is the cosine between features, at least 0. With DINO this is VBench's subject consistency, with CLIP
    its background consistency; VBench uses ViT-B/16 of DINO and ViT-B/32 of CLIP. VBench's result for several videos is
    the mean over all frames, ours the mean over the videos, which differs if their lengths do.
    """

    def __init__(self, kind: Kind, embed: Embed):
        self._name, self._embed = RECIPES[kind].metric, embed
        self._first: np.ndarray | None = None
        self._last: np.ndarray | None = None
        self._sum, self._count = 0.0, 0

    def add(self, frame: Frame) -> None:
        features = self._embed(frame)
        if self._first is None or self._last is None:
            self._first = features
        else:
            similar = [max(0.0, float(features @ other)) for other in (self._last, self._first)]
            self._sum += sum(similar) / 2
            self._count += 1
        self._last = features

    def values(self) -> dict[str, float]:
        return {self._name: self._sum / self._count}


def load(kind: Kind, folder: Path) -> Embed:
    """Load a network from a folder in the format of transformers. It runs in PyTorch, on a GPU if there is one.

    Raises:
        InputError: PyTorch is not installed, or the folder does not contain such a network, with all weights.
    """
    torch, recipe = _torch(kind), RECIPES[kind]
    _check_type(kind, folder)
    import transformers

    network = getattr(transformers, recipe.model)
    try:
        model, found = network.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **recipe.options
        )
    except Exception as error:  # transformers raises exceptions of many types for a damaged folder
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"--{kind}={folder}: cannot be loaded ({reason}); expected an intact model") from error
    if missing := sorted(found["missing_keys"]):
        raise InputError(f"--{kind}={folder}: {len(missing)} tensors are missing, such as {missing[0]}; expected all")
    return _embedder(torch, recipe, model.eval().to("cuda" if torch.cuda.is_available() else "cpu"))


def _embedder(torch: Any, recipe: Recipe, model: Any) -> Embed:
    side, device = model.config.image_size, model.device
    mean, deviation = (torch.tensor(colour, device=device)[:, None, None] for colour in (recipe.mean, recipe.deviation))

    @torch.inference_mode()
    def embed(frame: Frame) -> Float[np.ndarray, "features"]:
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).to(device).permute(2, 0, 1)[None].float()
        pixels = _scaled(torch, pixels, side, recipe.scaling)
        pixels = _centre(pixels, side) if recipe.cropped else pixels
        [features] = recipe.features(model, (pixels / 255 - mean) / deviation)
        return torch.nn.functional.normalize(features, dim=0).cpu().numpy()

    return embed


def _scaled(torch: Any, pixels: Any, side: int, mode: str) -> Any:
    """Scale pictures so that their shorter side has `side` pixels, without smoothing, as VBench does."""
    height, width = pixels.shape[-2:]
    shorter = min(height, width)
    size = [int(side * length / shorter) for length in (height, width)]
    return torch.nn.functional.interpolate(pixels, size, mode=mode, align_corners=False)


def _centre(pixels: Any, side: int) -> Any:
    top, left = (round((length - side) / 2) for length in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]


def _check_type(kind: Kind, folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"--{kind}={folder}: no such folder; expected a model in the format of transformers")
    file, expected = folder / "config.json", RECIPES[kind].model_types
    found = read_json(file).get("model_type")
    if found not in expected:
        raise InputError(f"{file}: model_type is {short_repr(found)}; expected {' or '.join(expected)} for --{kind}")


def _torch(kind: Kind) -> Any:
    try:
        import torch
    except ImportError:
        raise InputError(f"--{kind}: the network runs in PyTorch; run pip install 'tfm-jax[torch]'") from None
    return torch
