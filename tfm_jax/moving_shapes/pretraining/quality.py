"""What a trained base model makes of captions that it knows the words of: sampled, and measured against real clips."""

import shutil
from pathlib import Path

from tfm_jax import config as configs
from tfm_jax.data.metadata import read_metadata
from tfm_jax.moving_shapes.evaluation.report import Counts, compare, measure_folder, show
from tfm_jax.moving_shapes.world import Stage, write_clips
from tfm_jax.sampling.pipeline import SampleRun, sample
from tfm_jax.wan.transformer import TransformerConfig

STEPS = 20
SEED = 2000
"""Of the clips that captions are taken from and samples are compared with; no recipe of training comes near it."""


def sample_captions(model: Path, config: TransformerConfig, laws: tuple[str, ...], output: Path, count: int) -> str:
    """Sample `count` captions of one object into `output`/samples, made anew, and measure the samples.

    Returns:
        The table of the evaluation: shares of clips with the right colour, shape, direction, with one object in every
        frame, and the rest.
    """
    stage = Stage(17, (64, 64), 16)
    clips, prompts, samples = output / "clips" / "reference", output / "prompts.txt", output / "samples"
    for folder in (clips, samples):
        shutil.rmtree(folder, ignore_errors=True)
    write_clips(clips, 2 * count, stage.frames, stage.size, stage.fps, seed=SEED, laws=laws, objects=(1,))
    captions = [row.prompt for row in read_metadata(clips)][:count]
    prompts.write_text("\n".join(captions) + "\n", encoding="utf-8")
    sample(
        SampleRun(
            model=configs.ModelConfig(
                path=model, dim=config.dim, ffn_dim=config.ffn_dim, heads=config.heads, layers=config.layers,
                dtype="float32",
            ),
            clip=configs.ClipConfig(frames=stage.frames, height=stage.size[0], width=stage.size[1], fps=stage.fps),
            sampling=configs.SamplingConfig(prompts=prompts, output=samples, steps=STEPS),
        )
    )  # fmt: skip
    generated = measure_folder(samples, prompts, stage, least=2)
    reference = measure_folder(clips, None, stage, least=2)
    rows, compared = compare(generated, reference)
    return show({"samples": rows}, Counts(len(generated), len(reference), compared))
