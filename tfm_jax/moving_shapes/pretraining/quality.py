"""Samples videos from a trained base model, and compares them with real clips."""

import shutil
from pathlib import Path

from tfm_jax import config as configs
from tfm_jax.data.metadata import read_metadata
from tfm_jax.moving_shapes.evaluation.folders import measure_folder
from tfm_jax.moving_shapes.evaluation.report import ClipCounts, format_table
from tfm_jax.moving_shapes.evaluation.set_metrics import compare
from tfm_jax.moving_shapes.scene import ClipSpec
from tfm_jax.moving_shapes.world import write_clips
from tfm_jax.prompts import write_prompts
from tfm_jax.sampling.pipeline import SampleRun, sample
from tfm_jax.wan.transformer import TransformerConfig

STEPS = 20
GUIDANCE = 2.0
"""As in configs/wan_tiny.yaml. More guidance gives worse shapes."""
SEED = 2000
"""Seed of the clips that provide the captions and the reference, far from the seeds of the training clips."""


def evaluate_model(model: Path, config: TransformerConfig, output: Path, count: int) -> str:
    """Sample one video for each of `count` captions of a single moving object, and measure the videos.

    The videos replace `output`/samples, and the real clips for the comparison replace `output`/clips/reference.

    Returns:
        The evaluation table for the console.
    """
    spec = ClipSpec()
    clips, prompts, samples = output / "clips" / "reference", output / "prompts.txt", output / "samples"
    for folder in (clips, samples):
        shutil.rmtree(folder, ignore_errors=True)
    write_clips(clips, 2 * count, spec.frames, spec.size, spec.fps, seed=SEED, laws=("uniform",), num_objects=(1,))
    write_prompts(prompts, [row.prompt for row in read_metadata(clips)][:count])
    sample(
        SampleRun(
            model=configs.ModelConfig(
                path=model, dim=config.dim, ffn_dim=config.ffn_dim, heads=config.heads, layers=config.layers,
                dtype="float32",
            ),
            clip=configs.ClipConfig(frames=spec.frames, height=spec.size[0], width=spec.size[1], fps=spec.fps),
            sampling=configs.SamplingConfig(prompts=prompts, output=samples, steps=STEPS, guidance=GUIDANCE),
        )
    )  # fmt: skip
    generated = measure_folder(samples, prompts, spec, minimum=2)
    reference = measure_folder(clips, None, spec, minimum=2)
    rows, compared = compare(generated, reference)
    return format_table({"samples": rows}, ClipCounts(len(generated), len(reference), compared))
