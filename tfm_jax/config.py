"""Every setting of every program: frozen dataclasses, filled from a YAML file and from the command line.

A program declares the sections it uses as one dataclass (`class TrainConfig: model: ModelConfig; ...`) and calls
`parse(TrainConfig, argv)`. A YAML file may hold the sections of all programs. Values are checked when read.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform, get_type_hints

import pydantic
import yaml
from pydantic import Field

from tfm_jax import plain_yaml
from tfm_jax.errors import InputError
from tfm_jax.files import replacing

T = TypeVar("T")

_strict = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def section(cls: type[T]) -> type[T]:
    """A frozen dataclass of keyword fields that checks its values; the text below a field is its help."""
    return cast(type[T], pydantic.dataclasses.dataclass(frozen=True, config=_strict, kw_only=True)(cls))


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Dtype = Literal["float32", "bfloat16"]
Remat = Literal["full", "attention", "attention_offload", "none"]


@section
class ModelConfig:
    path: Path
    """Directory of the weights: Diffusers, original (Wan-AI) or converted layout."""
    dim: Positive
    """Width of the transformer. With the next three: which model this configuration is for, checked against path."""
    ffn_dim: Positive
    """Width of the feed-forward network."""
    heads: Positive
    """Attention heads."""
    layers: Positive
    """Transformer blocks."""
    dtype: Dtype = "bfloat16"
    """Type of the frozen weights and of the computation; adapters, norms and the objective are float32."""

    def __post_init__(self) -> None:
        width, rest = divmod(self.dim, self.heads)
        fits = not rest and width >= 6 and width % 2 == 0  # rotary positions turn pairs of channels along three axes
        _require(fits, "heads", self.heads, f"a divisor of dim={self.dim} that makes heads of an even width, 6 or more")


@section
class ClipConfig:
    frames: Positive
    """Pixel frames of a clip, 4 n + 1."""
    height: Positive
    """Pixels, a multiple of 16."""
    width: Positive
    """Pixels, a multiple of 16."""
    fps: Annotated[float, Field(gt=0)] = 16.0
    """Frames a second, of the clips read and of the samples written."""

    def __post_init__(self) -> None:
        _require((self.frames - 1) % 4 == 0, "frames", self.frames, "4 n + 1, such as 81")
        _require(self.height % 16 == 0, "height", self.height, "a multiple of 16")
        _require(self.width % 16 == 0, "width", self.width, "a multiple of 16")

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the clip's latents: the autoencoder's strides are 4, 8 and 8."""
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8


@section
class DataConfig:
    source: Path | None = None
    """Folder of metadata.csv (columns video, prompt) and the clips it names. prepare_data.py reads it."""
    path: Path
    """Folder of the prepared latents and text embeddings. prepare_data.py writes it, train.py reads it."""


@section
class LoraConfig:
    rank: Positive = 32
    """Rank of every adapter."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The adapter is scaled by alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("q", "k", "v", "o", "ffn.0", "ffn.2")
    """Linear maps that get an adapter, by the end of their name: q is self_attn.q and cross_attn.q."""


@section
class ObjectiveConfig:
    kind: Literal["tfm", "fm", "fm_direction", "tfm_mse", "fm_warp"] = "tfm"
    """tfm: temporal-aware path, direction and residual loss. fm: straight path, mean squared error. Controls between
    them: fm_direction has the path of fm and the loss of tfm, tfm_mse the path of tfm and the loss of fm, fm_warp is fm
    on the mean of tfm's clocks."""
    rho: Annotated[float, Field(gt=0)] = 4.0
    """Pull of the clean frame against the pull of its neighbours."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the residual term."""
    shift: Annotated[float, Field(gt=0)] = 5.0
    """Shift of the noise levels towards pure noise."""
    low: Fraction = 0.0
    """Train on noise levels of this index on the grid and above it, as a fraction: 0 is pure noise."""
    high: Fraction = 1.0
    """Train on noise levels below this index on the grid, as a fraction: 1 is clean."""

    def __post_init__(self) -> None:
        _require(self.low < self.high, "low", self.low, f"less than high={self.high}")


@section
class OptimizerConfig:
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Constant after the warm-up."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up: step n, from 1, learns at learning_rate * n / (warmup_steps + 1)."""
    b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    b2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay, of both factors of every adapter."""
    lora_b_factor: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the B factors over that of the A factors (LoRA+)."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Clip the global norm of the gradient to this; null does not clip."""


@section
class TrainConfig:
    output: Path
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints/."""
    steps: Positive
    """Optimizer steps."""
    batch_size: Positive = 1
    """Clips a step, over all devices; a multiple of mesh.data x mesh.fsdp."""
    seed: Seed = 0
    """Decides initial adapters, order of clips, noise and noise levels."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Positive = 3
    """Newest checkpoints kept."""
    max_bad_steps: Positive = 3
    """A step whose numbers are not finite is skipped: the adapters stay as they were. The run stops after so many of
    them in a row, or if a shorter run has no others."""
    log_every: Positive = 1
    """Steps between lines on the console; metrics.jsonl has every step."""
    remat: Remat = "full"
    """What the backward pass finds saved of each block: full only its input, attention also what attention put out,
    attention_offload that in the memory of the host, none everything. What is not saved is computed again."""


@section
class MeshConfig:
    data: Annotated[int, Field(ge=-1)] = -1
    """Devices along which only the batch is split; -1 takes all that the other three leave."""
    fsdp: Positive = 1
    """Devices along which batch and weights are split."""
    sequence: Positive = 1
    """Devices along which the tokens of a clip are split, and the weights once more; must divide the tokens."""
    tensor: Positive = 1
    """Devices along which heads and feed-forward channels are split; must divide the heads."""

    def __post_init__(self) -> None:
        _require(self.data != 0, "data", self.data, "1 or more, or -1 for all that the other axes leave")


@section
class SamplingConfig:
    prompts: Path = Path("prompts.txt")
    """Text file, one prompt on each line."""
    output: Path
    """Folder of 000.mp4, 001.mp4, ... and contact_sheet.png; videos that it has already are not made again."""
    lora: Path | None = None
    """LoRA file (safetensors, any dialect); null samples the base model."""
    steps: Positive = 50
    """Euler steps."""
    shift: Annotated[float, Field(gt=0)] = 5.0
    """Shift of the noise levels towards pure noise."""
    guidance: Annotated[float, Field(ge=0, le=1000)] = 5.0
    """Scale of classifier-free guidance; 1 is none."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    seed: Seed = 0
    """Prompt number n starts from the noise of (seed, n)."""


@section
class Config:
    """All sections. A YAML file may have any of them."""

    model: ModelConfig
    clip: ClipConfig
    data: DataConfig
    train: TrainConfig
    sampling: SamplingConfig
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def _require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value}: expected {expected}")


# --- Reading ---------------------------------------------------------------------------------------------------------


def parse(kind: type[T], argv: Sequence[str], prog: str, about: str) -> T:
    """`kind` from `--config FILE` and `--section.field=value` arguments, which win over the file.

    Raises:
        InputError: unknown, missing, repeated or impossible values.
        SystemExit: `--help` was asked for and printed.
    """
    file, overrides = _split(argv)
    values = _read(file) if file else {}
    if "--help" in overrides:
        print(_help(kind, values, prog, about))
        raise SystemExit(0)
    if not file:
        raise InputError(f"{prog}: --config FILE is missing, such as --config configs/wan_tiny.yaml")
    _check_names(values, str(file))
    origin = {}
    for name, text in overrides.items():
        origin[name] = f"--{name}={_shown(text)}"
        _set(kind, values, name, text)
    wanted = {name: values[name] for name in _sections(kind) if name in values}
    _check_paths(kind, wanted, str(file), origin)
    return from_plain(kind, wanted, str(file), origin)


def from_plain(kind: type[T], values: dict[str, Any], file: str, origin: Mapping[str, str] | None = None) -> T:
    """`kind` from section -> field -> value; what is not given has its default.

    Args:
        file: where the values come from.
        origin: field -> the command-line argument that gave its value.

    Raises:
        InputError: missing, unknown or impossible values.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        raise InputError(_first_problem(error, file, origin or {})) from None


def plain(config: Any) -> dict[str, dict[str, Any]]:
    """Section -> field -> value, as JSON has it."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def dump(config: Any, path: Path) -> None:
    """Write a configuration as YAML that `parse` reads back."""
    text = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _split(argv: Sequence[str]) -> tuple[Path | None, dict[str, str]]:
    """`--config` and the other options; both `--name=value` and `--name value` are read."""
    options: dict[str, str] = {}
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            options["--help"] = ""
            continue
        if not token.startswith("--"):
            raise InputError(f"argument {token!r}: expected --section.field=value")
        name, equals, value = token[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"argument --{name}: expected a value, --{name}=...")
            value = rest.pop(0)
        if name in options:
            raise InputError(f"argument --{name} is given twice; expected it once")
        options[name] = value
    file = options.pop("config", None)
    return (Path(file) if file is not None else None), options


def _read(file: Path) -> dict[str, Any]:
    try:
        values = plain_yaml.read(file)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a configuration such as configs/wan_tiny.yaml") from None
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        raise InputError(f"{file}: expected sections ({', '.join(_sections(Config))}) with fields")
    return values


def _sections(kind: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if dataclasses.is_dataclass(hint)}


def _fields(kind: type) -> Iterator[str]:
    for name, part in _sections(kind).items():
        yield from (f"{name}.{field.name}" for field in dataclasses.fields(part))


def _check_names(values: dict[str, Any], file: str) -> None:
    sections = _sections(Config)
    for name, part in values.items():
        if name not in sections:
            close = difflib.get_close_matches(str(name), sections)
            raise InputError(f"{file}: unknown section {name}; {_choices(close, sections)}")
        for field, value in part.items():
            full = f"{name}.{field}"
            if full not in _fields(Config):
                raise InputError(f"{file}: unknown field {full}; {_nearest(full, Config)}")
            if isinstance(value, bool):
                raise InputError(f"{file}: {full}={str(value).lower()}: expected no truth value; put text into quotes")


def _check_paths(kind: type, values: dict[str, Any], file: str, origin: dict[str, str]) -> None:
    """Refuse empty paths: `Path("")` is the current folder."""
    for name, part in _sections(kind).items():
        for field, hint in get_type_hints(part).items():
            if values.get(name, {}).get(field) == "" and hint in (Path, Path | None):
                raise InputError(f"{origin.get(f'{name}.{field}') or f'{file}: {name}.{field}='}: expected a path")


NEAR = 0.72
"""How similar a name must be to be suggested: `lernin_rate` for learning_rate is, `tensorboard` for tensor is not."""


def _nearest(name: str, kind: type) -> str:
    """What may be meant by a field that does not exist: fields of nearly that name, those of its section first."""
    part, _, tail = name.rpartition(".")
    fields: dict[str, list[str]] = {}
    for full in sorted(_fields(kind), key=lambda full: not full.startswith(f"{part}.")):
        fields.setdefault(full.rpartition(".")[2], []).append(full)
    close = [full for match in difflib.get_close_matches(tail, fields, cutoff=NEAR) for full in fields[match]]
    names = [full for full in _fields(kind) if full.startswith(f"{part}.")] or [f"{n}.*" for n in _sections(kind)]
    return _choices(close[:3], names)


def _choices(close: Iterable[str], names: Iterable[str]) -> str:
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"


def _set(kind: type, values: dict[str, Any], name: str, text: str) -> None:
    if name not in _fields(kind):
        raise InputError(f"--{name}={_shown(text)}: unknown field {name}; {_nearest(name, kind)}")
    part, field = name.split(".")
    # Lists and null are read as YAML; anything else stays text, which the field's type turns into a value.
    try:
        literal = plain_yaml.parse(text, "") if text.startswith("[") or text == "null" else text
    except InputError:
        raise InputError(f"--{name}={_shown(text)}: not a list; expected one such as [a, b]") from None
    values.setdefault(part, {})[field] = literal


_EXPECTED = {
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected at least {ge:g}",
    "less_than": "expected less than {lt:g}",
    "less_than_equal": "expected at most {le:g}",
    "finite_number": "expected a finite number",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "string_type": "expected text",
    "path_type": "expected a path",
    "literal_error": "expected {expected}",
    "tuple_type": "expected a list, such as [a, b]",
    "too_short": "expected at least {min_length} of them",
    "unexpected_keyword_argument": "expected a field of this version of tfm_jax",
}
"""Type of a pydantic error -> what it says, in our words, filled in from the error's context."""


def _first_problem(error: pydantic.ValidationError, file: str, origin: Mapping[str, str]) -> str:
    """The first of the problems on one line: file or option, field, value, what was expected."""
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"][:2])
    context = problem.get("ctx", {})
    if problem["type"] == "missing":
        return f"{file}: {name} is missing; expected it in the file{f' or as --{name}=...' if '.' in name else ''}"
    if problem["type"] == "value_error":  # from __post_init__, which names the field of the section itself
        field, _, expected = str(context["error"]).partition(": ")
        name, given = f"{name}.{field.partition('=')[0]}", f"{name}.{field}"
    else:
        known = _EXPECTED.get(problem["type"])
        expected = known.format(**context) if known else problem["msg"]
        given = f"{name}={_shown(problem['input'])}"
    return f"{origin[name]}: {expected}" if name in origin else f"{file}: {given}: {expected}"


def _shown(value: Any) -> str:
    """A value as it is written in the file and on the command line, cut to the length of a line."""
    if value is None:
        return "null"
    text = f"[{', '.join(map(_shown, value))}]" if isinstance(value, list | tuple) else " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _help(kind: type, values: dict[str, Any], prog: str, about: str) -> str:
    lines = [f"usage: {prog} --config FILE [--section.field=value ...]", "", about, ""]
    for name, part in _sections(kind).items():
        lines.append(f"{name}:")
        for field, info in part.__pydantic_fields__.items():
            default = "required" if info.is_required() else info.get_default(call_default_factory=True)
            value = values.get(name, {}).get(field, default)
            lines += [f"  --{name}.{field}={_shown(value)}", f"        {info.description}"]
    return "\n".join(lines)
