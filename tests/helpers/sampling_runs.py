"""Sampling runs with a small random model."""

from pathlib import Path

from safetensors.numpy import load_file, save_file

from tfm_jax.config import ClipConfig, ModelConfig, SamplingConfig
from tfm_jax.sampling.pipeline import SampleRun

PROMPTS = ["a red disc moves right", "a blue square", "一个蓝色的圆 🔵"]
VIDEOS = ["000.mp4", "001.mp4", "002.mp4"]
LATENTS = ["000.safetensors", "001.safetensors", "002.safetensors"]
STEPS = 2
SIZE = {"dim": 96, "ffn_dim": 256, "heads": 4, "layers": 4}


def run_of(model: Path, output: Path, **settings) -> SampleRun:
    """Return a run of two steps, by default; `settings` are fields of `SamplingConfig`."""
    prompts = settings.pop("prompts", None) or model.parent / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    return SampleRun(
        model=ModelConfig(path=model, dtype="float32", **SIZE),
        clip=ClipConfig(frames=5, height=32, width=48),
        sampling=SamplingConfig(**{"prompts": prompts, "output": output, "steps": STEPS, **settings}),
    )


def content(folder: Path) -> dict[str, bytes]:
    """Map each file name in a folder to the content, which is left empty if it contains the path of the folder."""
    own = ("config.yaml", "samples.json")
    return {path.name: b"" if path.name in own else path.read_bytes() for path in folder.iterdir()}


def damage(component: Path, change) -> None:
    """Apply `change` to the tensors in the weights file of a network."""
    (file,) = component.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
