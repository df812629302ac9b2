"""The sections of a configuration. Each section checks its values, and the docstrings of fields appear in the help."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tfm_jax.arrays import Dtype
from tfm_jax.config.fields import (
    Buckets,
    Fraction,
    ModelPath,
    NonEmptyPath,
    NonNegative,
    Positive,
    Ranks,
    Rate,
    Remat,
    Seed,
    Solver,
    require,
    section,
)
from tfm_jax.errors import InputError


@section
class ModelConfig:
    path: ModelPath
    """Directory of the weights in the Diffusers, original (Wan-AI), ComfyUI or tfm_jax layout, or one safetensors file
    with the transformer. wan_tiny selects the embedded model, unless a file or directory of that name exists."""
    dim: Positive
    """Width of the transformer. This field and the next three must match the weights."""
    ffn_dim: Positive
    """Width of the feed-forward network."""
    heads: Positive
    """Number of attention heads."""
    layers: Positive
    """Number of transformer blocks."""
    dtype: Dtype = "bfloat16"
    """Data type of the frozen weights and of the computation. Adapters, norms and the objective are always float32."""
    quantize: Literal["int8"] | None = None
    """int8 stores the kernels of the blocks in 8 bits, with one scale per output channel: half the memory of bfloat16,
    and weights that are slightly rounded. null stores them in model.dtype, in which both are computed with."""

    def __post_init__(self) -> None:
        width, rest = divmod(self.dim, self.heads)
        fits = not rest and width >= 6 and width % 2 == 0  # rotary positions turn pairs of channels along three axes
        require(fits, "heads", self.heads, f"a divisor of dim={self.dim} that gives heads of an even width, 6 or more")


@section
class ClipConfig:
    frames: Positive
    """Number of frames of a clip: 4 n + 1, such as 81."""
    height: Positive
    """Height in pixels: a multiple of 16."""
    width: Positive
    """Width in pixels: a multiple of 16."""
    buckets: Buckets = ()
    """Other sizes of training clips: a list of [frames, height, width]. Each clip gets the size with the nearest aspect
    ratio; of these, the one with the most frames that the video has. [] gives all clips frames x height x width."""
    max_pixels: Annotated[int, Field(ge=1024)] | None = None
    """Instead of clip.buckets: the largest height x width of training clips, for which sizes with the usual aspect
    ratios from 1:2 to 2:1 are chosen."""
    fps: Rate = 16.0
    """Frames per second with which clips are read and samples are written. native reads the frames of each video as
    they are, at the video's own rate; samples need a number."""
    part: Literal["start", "centre", "random", "windows"] = "start"
    """Part of a video that becomes a training clip. random: depends on data.seed and the name of the video only.
    windows: as many clips as fit, one after the other, all with the prompt of the video."""
    short: Literal["skip", "cut", "refuse"] = "skip"
    """What to do with a video that has too few frames. skip: leave it out. cut: use fewer frames, 4 n + 1. refuse:
    stop before anything is encoded."""
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    """How frames are scaled, with antialiasing. bilinear: as in the official code, which also rounds the size and the
    crop to whole pixels."""

    def __post_init__(self) -> None:
        require((self.frames - 1) % 4 == 0, "frames", self.frames, "4 n + 1, such as 81")
        require(self.height % 16 == 0, "height", self.height, "a multiple of 16")
        require(self.width % 16 == 0, "width", self.width, "a multiple of 16")
        for bucket in self.buckets:
            fits = len(bucket) == 3 and min(bucket) > 0 and bucket[0] % 4 == 1 and not any(n % 16 for n in bucket[1:])
            expected = "[frames, height, width]: 4 n + 1 frames, and multiples of 16, such as [81, 480, 832]"
            require(fits, "buckets", list(bucket), expected)
        unambiguous = not self.buckets or self.max_pixels is None
        require(unambiguous, "max_pixels", self.max_pixels, "null, because clip.buckets are given")

    @property
    def rate(self) -> float:
        """Frames per second, for programs that write videos.

        Raises:
            InputError: `fps` is native, which says nothing about the videos that a model makes.
        """
        if self.fps == "native":
            raise InputError("clip.fps=native: only videos have a rate of their own; expected a number, such as 16")
        return self.fps

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        return latent_size(self.frames, self.height, self.width)


def latent_size(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the frames, height and width of the latents of a clip; the strides of the autoencoder are 4, 8 and 8."""
    return (frames - 1) // 4 + 1, height // 8, width // 8


@section
class DataConfig:
    source: NonEmptyPath | None = None
    """List of clips for tfm-prepare: a folder that contains metadata.csv, .json or .jsonl with the fields video and
    prompt; such a file; a folder of pairs such as a.mp4 and a.txt; or ShareGPT4Video's annotations."""
    absolute_paths: bool = False
    """Whether the list may contain absolute paths, which may point anywhere."""
    seed: Seed = 0
    """Seed of the parts that tfm-prepare chooses with clip.part=random."""
    dtype: Dtype = "bfloat16"
    """Data type in which tfm-prepare stores latents and text embeddings. float32 takes twice the space."""
    max_rejected: Fraction = 0.05
    """Largest fraction of the videos that may turn out to be unusable. If there are more, tfm-prepare stops."""
    path: NonEmptyPath
    """Folder of the latents and text embeddings, which tfm-prepare writes and tfm-train reads."""
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the videos whose clips are not trained on. Which videos depends only on their names."""
    caption_dropout: Fraction = 0.0
    """Probability with which a clip is trained with the empty prompt instead of its own, for classifier-free
    guidance."""


@section
class LoraConfig:
    rank: Positive = 32
    """Rank of the adapters."""
    ranks: Ranks = dataclasses.field(default_factory=dict)
    """Other ranks for some of the targets, such as {q: 16, ffn.0: 64}."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The output of each adapter is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA, Kalajdzievski 2023)."""
    dora: bool = False
    """Also train the norm of the weights of each output, apart from their direction (DoRA, Liu et al. 2024). Only
    diffusers loads the result; see tfm-export."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("q", "k", "v", "o", "ffn.0", "ffn.2")
    """Linear layers that get an adapter, selected by how their names end: q selects self_attn.q and cross_attn.q."""
    init: NonEmptyPath | None = None
    """LoRA file (safetensors, any dialect) to start from; null starts from new adapters. Linear layers, ranks and scale
    must be the same as here."""


@section
class ObjectiveConfig:
    kind: Literal["tfm", "fm", "fm_direction", "tfm_mse", "fm_warp"] = "tfm"
    """tfm: temporal-aware path with the direction and residual losses. fm: straight path with mean squared error. The
    others are controls: fm_direction combines the path of fm with the losses of tfm, tfm_mse combines the path of tfm
    with the loss of fm, and fm_warp is fm at the noise level that the frames of tfm have on average."""
    rho: Annotated[float, Field(gt=0)] = 4.0
    """Weight of the distance to the clean frame, relative to the distances to the neighbouring frames."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the residual loss."""
    shift: Annotated[float, Field(gt=0)] = 5.0
    """Shift of the noise levels towards pure noise; 1 means no shift."""
    law: Literal["uniform", "logit_normal"] = "uniform"
    """How often each noise level is drawn. uniform: all 1000 levels of the shifted schedule equally often, as in the
    paper. logit_normal: before the shift, the logit of the noise level has a normal distribution."""
    logit_mean: float = 0.0
    """Mean for logit_normal; above 0, noisier levels are drawn more often."""
    logit_std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation for logit_normal."""
    weight: Literal["bell", "none", "min_snr"] = "bell"
    """Weight of the loss at each noise level. bell: highest in the middle, zero at pure noise, as in the paper. none:
    the same for all. min_snr, only for kind=fm: as if the squared error of the clean latents had the signal-to-noise
    ratio as its weight, or 5 if that is less (Hang et al. 2023)."""
    low: Fraction = 0.0
    """Start of the range of noise levels to train on, as a fraction of the schedule of 1000 levels, which runs from
    pure noise (0) to clean (1)."""
    high: Fraction = 1.0
    """End (exclusive) of the range of noise levels to train on, as a fraction of that schedule."""

    def __post_init__(self) -> None:
        require(self.low < self.high, "low", self.low, f"less than high={self.high}")
        sound = self.weight != "min_snr" or self.kind == "fm"
        require(sound, "weight", self.weight, f"bell or none, because kind={self.kind} is not fm")


@section
class OptimizerConfig:
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate after the warm-up."""
    warmup_steps: NonNegative = 0
    """Number of steps of linear warm-up: step n, counted from 1, uses learning_rate * n / (warmup_steps + 1)."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate changes after the warm-up. constant: not at all. cosine and linear: it falls, along half a
    cosine or a straight line, and would reach final_factor * learning_rate in the step after the last one."""
    final_factor: Fraction = 0.0
    """Where cosine and linear end, as a fraction of learning_rate."""
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the first moment."""
    b2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay, applied to both factors of every adapter."""
    lora_b_factor: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the B factors, relative to that of the A factors (LoRA+)."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Maximum global norm of the gradient; a larger gradient is scaled down to it. null disables clipping."""


@section
class TrainConfig:
    output: NonEmptyPath
    """Folder of the run, for config.yaml, metrics.jsonl, checkpoints/, validation.jsonl and samples/."""
    steps: Positive | None = None
    """Number of optimizer steps. Give either this or train.epochs."""
    epochs: Positive | None = None
    """Instead of train.steps: how often every clip is seen. The last step may begin another epoch, because the number
    of steps is rounded up."""
    batch_size: Positive = 1
    """Number of clips, over all devices, that are computed at the same time: a multiple of mesh.data x mesh.fsdp."""
    accumulate: Positive = 1
    """Number of batches per optimizer step. Their gradients are averaged, so that a step is that of one batch of
    batch_size x accumulate clips, up to rounding, in the memory of batch_size clips."""
    seed: Seed = 0
    """Seed of the initial adapters, the order of the clips, the noise and the noise levels."""
    checkpoint_every: Positive = 500
    """Number of steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Positive = 3
    """Number of most recent checkpoints to keep."""
    keep_every: Positive | None = None
    """The checkpoints of every so many steps are kept for ever, in addition to the most recent ones: a multiple of
    checkpoint_every. null keeps only the most recent ones."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the adapters, such as 0.999, for tfm-export --ema. Step n,
    counted from 1, uses at most n / (n + 9), so that the start is forgotten sooner. null: no average."""
    max_bad_steps: Positive = 3
    """A step whose loss, gradient or update is not finite is skipped. The run stops after this many in a row, or after
    train.steps if that is smaller."""
    log_every: Positive = 1
    """Number of steps between the lines printed on the console; metrics.jsonl records every step."""
    eval_every: Positive | None = None
    """Number of steps between evaluations on the held-out clips (data.held_out); the last step is evaluated, too. null:
    no evaluation."""
    eval_clips: Positive = 32
    """Largest number of held-out clips to evaluate. Each takes 20 passes through the transformer: ten noise levels for
    two losses."""
    sample_every: Positive | None = None
    """Number of steps between samples from the prompts in sampling.prompts, with the other settings of sampling, at the
    size of clip; the last step is sampled, too. null: no samples."""
    tensorboard: bool = False
    """Write event files for TensorBoard to tensorboard/ in the folder of the run."""
    wandb: str | None = None
    """Project of Weights & Biases to which metrics and samples are sent. null: none."""
    remat: Remat = "full"
    """Selects which activations of each block are saved for the backward pass; the others are recomputed. "full": only
    the input of the block is saved. "attention": the outputs of attention, too. "attention_offload": the same, with
    these outputs in host memory. "none": all outputs of matrix products, too. Saving fewer needs less memory but takes
    longer."""

    def __post_init__(self) -> None:
        expected = "a number of steps, or a number of epochs in train.epochs"
        require(self.steps is not None or self.epochs is not None, "steps", "null", expected)
        expected = f"null, because train.steps={self.steps}; for epochs, set train.steps to null"
        require(self.steps is None or self.epochs is None, "epochs", self.epochs, expected)
        kept = self.keep_every is None or self.keep_every % self.checkpoint_every == 0
        require(kept, "keep_every", self.keep_every, f"a multiple of checkpoint_every={self.checkpoint_every}")

    @property
    def clips_per_step(self) -> int:
        """Number of clips of an optimizer step, over all devices."""
        return self.batch_size * self.accumulate

    def number_of_steps(self, clips: int) -> int:
        """Return the number of optimizer steps of a run with this number of clips."""
        return self.steps or -(-(self.epochs or 0) * clips // self.clips_per_step)


@section
class MeshConfig:
    data: Annotated[int, Field(ge=-1)] = -1
    """Number of devices over which only the batch is split; -1 uses all remaining devices."""
    fsdp: Positive = 1
    """Number of devices over which the batch and the weights are split."""
    sequence: Positive = 1
    """Number of devices over which the tokens of a clip are split, and the weights in addition to mesh.fsdp. It must
    divide the number of tokens."""
    tensor: Positive = 1
    """Number of devices over which the heads and the feed-forward channels are split. It must divide the number of
    heads."""

    def __post_init__(self) -> None:
        require(self.data != 0, "data", self.data, "1 or more, or -1 for all remaining devices")


@section
class SamplingConfig:
    prompts: NonEmptyPath = Path("prompts.txt")
    """Text file of prompts, one per line."""
    prompt: Annotated[str, Field(min_length=1)] | None = None
    """A single prompt, instead of the file."""
    videos_per_prompt: Positive = 1
    """Number of videos of each prompt. Video n has the noise of seed + n."""
    output: NonEmptyPath = Path("samples")
    """Folder for 000.mp4, 001.mp4, ..., their latents and contact_sheet.png. Existing videos are kept."""
    lora: NonEmptyPath | tuple[NonEmptyPath, ...] | None = None
    """LoRA file (safetensors, any dialect), or a list of files; their changes add up. A number after a file is its
    strength: [a.safetensors:0.7, b.safetensors]. null samples from the base model."""
    solver: Solver = "euler"
    """How the steps are taken. euler: as in the TFM release. unipc: as in Wan2.1. dpmpp_2m: DPM-Solver++(2M)."""
    steps: Positive = 50
    """Number of steps."""
    shift: Annotated[float, Field(gt=0)] = 5.0
    """Shift of the noise levels towards pure noise; 1 means no shift."""
    guidance: Annotated[float, Field(ge=0, le=1000)] = 5.0
    """Scale of classifier-free guidance; 1 disables it, which halves the time of a step."""
    guidance_interval: tuple[Fraction, ...] = (0.0, 1.0)
    """Part of the steps that is guided, as fractions [first, last]. The other steps take half the time."""
    negative_prompt: str = ""
    """Text that guidance steers away from."""
    seed: Seed = 0
    """Seed of the initial noise. The noise of each video is drawn from this seed and the number of the prompt."""
    noise: Literal["per_prompt", "shared"] = "per_prompt"
    """Whether each prompt has its own noise, or all have that of the first prompt, as in the TFM release."""
    latents: NonEmptyPath | None = None
    """Initial noise, instead of drawing it: a safetensors file whose tensor `latents` is [videos, channels, frames,
    height, width], as diffusers takes it. If it holds one video, all start from it."""
    tile: tuple[Positive, ...] | None = None
    """Height and width of the tiles in which the latents are decoded, such as [30, 52]. They overlap by half. This
    needs less memory on the device, more time and more memory on the host. null decodes whole frames."""

    def __post_init__(self) -> None:
        interval = self.guidance_interval
        fits = len(interval) == 2 and interval[0] < interval[1]
        require(fits, "guidance_interval", list(interval), "two rising fractions, such as [0, 0.8]")
        fits = self.tile is None or (len(self.tile) == 2 and min(self.tile) >= 2)
        require(fits, "tile", list(self.tile or ()), "a height and a width of at least 2, such as [30, 52]")
        last = self.seed + self.videos_per_prompt - 1
        require(last < 2**32, "videos_per_prompt", self.videos_per_prompt, f"seeds below 2^32, not up to {last}")

    def place(self, number: int) -> tuple[int, int]:
        """Return the number of a video's prompt, and the number of the video among those of the prompt."""
        return divmod(number, self.videos_per_prompt)

    @property
    def loras(self) -> tuple[Path, ...]:
        """The LoRA files with their strengths."""
        return (self.lora,) if isinstance(self.lora, Path) else self.lora or ()


@section
class TrainingSections:
    """The sections that determine what a training step computes, on any mesh."""

    model: ModelConfig
    clip: ClipConfig
    train: TrainConfig
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)


@section
class Config(TrainingSections):
    """All sections that a YAML file may contain."""

    data: DataConfig
    sampling: SamplingConfig
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
