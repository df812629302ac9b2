"""The table of bad input: the definition of a row, and the rows about options and configuration files."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from helpers.breaking import Break, link, replace, write

CONFIG = "--config=$world/config.yaml"

USUAL: dict[str, tuple[str, ...]] = {
    "train": (CONFIG, "--train.output=$tmp/new"),
    "prepare_data": (CONFIG, "--data.path=$tmp/new"),
    "sample": (CONFIG, "--sampling.output=$tmp/new"),
    "export_lora": ("$world/run", "$tmp/new.safetensors"),
    "convert_weights": ("$world/model", "$tmp/new", "--to=tfm_jax"),
    "lora": ("merge", "$tmp/new", "--model=$world/model", "--lora=$tmp/lora"),
    "evaluate": ("$world/clips", "--reference=$world/clips", "--frames=5", "--height=32", "--width=48"),
    "plan": (CONFIG, "--topology=v5e:2x2"),
    "study": (CONFIG, "--output=$tmp/new", "--docs=$tmp/docs"),
    "pretrain": ("$tmp/new",),
}
"""Program -> arguments with which it succeeds in a valid world."""


class Row(NamedTuple):
    """A mistake and what the program must do. `$world` stands for a valid world, `$tmp` for a folder of this row."""

    program: str
    wrong: str
    """The mistake, which is also the name of the test."""
    arguments: Sequence[str]
    words: Sequence[str]
    """The line that the program prints contains all of these."""
    broken: Sequence[Break] = ()
    """These are applied to the folder of the row before the program starts."""
    code: int = 2
    set_aside: bool = False
    """Whether the program may rename damaged files."""
    environment: Mapping[str, str] = MappingProxyType({})
    malformed: bool = False
    """Whether tyro reports the mistake in the command line, on several lines."""


def row(program: str, wrong: str, *arguments: str, words: str | Sequence[str], broken: Break | Sequence[Break] = ()):
    """Return a row in which `arguments` are added to the usual ones.

    An option replaces the usual option of the same name; positional arguments replace all usual positional arguments.
    """
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    positional = any(not argument.startswith("--") for argument in arguments)
    kept = [
        usual
        for usual in USUAL[program]
        if (usual.partition("=")[0] not in given if usual.startswith("--") else not positional)
    ]
    return exactly(program, wrong, *kept, *arguments, words=words, broken=broken)


def exactly(
    program: str, wrong: str, *arguments: str, words: str | Sequence[str], broken: Break | Sequence[Break] = ()
):
    """Return a row with only these arguments."""
    words = [words] if isinstance(words, str) else words
    return Row(program, wrong, arguments, words, [broken] if callable(broken) else broken)


def malformed(row: Row) -> Row:
    """Return the same row, marked as a mistake that tyro reports."""
    return row._replace(malformed=True)


def options(program: str, *table: tuple[str, str]) -> list[Row]:
    """Return one row per (option, words); its message must also contain the field and its value."""
    return [row(program, option, option, words=(option[2:], words)) for option, words in table]


def config(wrong: str, content: str | bytes, *words: str) -> Row:
    """Return a row with another configuration file, which the message must name."""
    file = "--config=$tmp/config.yaml"
    return row(
        "train",
        f"a configuration with {wrong}",
        file,
        words=("config.yaml", *words),
        broken=write("config.yaml", content),
    )


def changed(wrong: str, old: str, new: str, *words: str) -> Row:
    """Return a row with the usual configuration file, in which `new` replaces `old`."""
    file = "--config=$tmp/config.yaml"
    broken = replace("config.yaml", old, new)
    return row("train", f"a configuration with {wrong}", file, words=("config.yaml", *words), broken=broken)


LONG = "a" * 5000

VALUES = [
    *options(
        "train",
        ("--train.steps=0", "expected at least 1"),
        ("--train.steps=-1", "expected at least 1"),
        ("--train.steps=many", "expected a whole number"),
        ("--train.steps=1.5", "expected a whole number"),
        ("--train.steps=", "expected a whole number"),
        ("--train.batch_size=0", "expected at least 1"),
        ("--train.seed=-1", "expected at least 0"),
        ("--train.seed=9223372036854775808", "expected less than 4.29497e+09"),
        ("--train.epochs=2", "for epochs, set train.steps to null"),
        ("--train.accumulate=0", "expected at least 1"),
        ("--train.checkpoint_every=0", "expected at least 1"),
        ("--train.keep_every=0", "expected at least 1"),
        ("--train.ema_decay=1", "expected less than 1"),
        ("--optimizer.schedule=step", "expected 'constant', 'cosine' or 'linear'"),
        ("--optimizer.final_factor=2", "expected at most 1"),
        ("--train.keep_checkpoints=0", "expected at least 1"),
        ("--train.log_every=0", "expected at least 1"),
        ("--train.remat=some", "attention_offload"),
        ("--optimizer.learning_rate=0", "expected more than 0"),
        ("--optimizer.learning_rate=nan", "expected a finite number"),
        ("--optimizer.learning_rate=inf", "expected a finite number"),
        ("--optimizer.learning_rate=fast", "expected a number"),
        ("--optimizer.warmup_steps=-1", "expected at least 0"),
        ("--optimizer.b1=1", "expected less than 1"),
        ("--optimizer.b2=-0.1", "expected at least 0"),
        ("--optimizer.eps=0", "expected more than 0"),
        ("--optimizer.weight_decay=-1", "expected at least 0"),
        ("--optimizer.lora_b_factor=0", "expected more than 0"),
        ("--optimizer.max_grad_norm=0", "expected more than 0"),
        ("--lora.rank=0", "expected at least 1"),
        ("--lora.rank=97", "at most 96, the width of self_attn.q"),
        ("--lora.ranks={q: 97}", "at most 96, the width of self_attn.q"),
        ("--lora.alpha=0", "expected more than 0"),
        ("--lora.targets=[]", "expected at least 1"),
        ("--lora.targets=q", "expected a list"),
        ("--lora.targets=[q", "expected one, such as [a, b]"),
        ("--lora.targets=[2020-13-45]", "expected"),
        ("--objective.kind=flow", "fm_direction"),
        ("--objective.rho=0", "expected more than 0"),
        ("--objective.beta=-1", "expected at least 0"),
        ("--objective.shift=0", "expected more than 0"),
        ("--objective.low=1", "expected"),
        ("--objective.high=1.5", "expected at most 1"),
        ("--model.dtype=float16", "bfloat16"),
        ("--model.heads=5", "expected a divisor of dim=96"),
        ("--model.dim=0", "expected at least 1"),
        ("--model.path=", "expected"),
        ("--mesh.data=0", "expected 1 or more, or -1"),
        ("--mesh.data=-2", "expected at least -1"),
        ("--mesh.fsdp=0", "expected at least 1"),
        ("--data.path=", "expected"),
        ("--train.output=", "expected a path"),
        ("--train.output=.", "expected the path of a folder"),
        ("--train.output=..", "expected the path of a folder"),
        ("--train.output=/", "expected the path of a folder"),
    ),
    *(
        malformed(row("train", option, option, words=("Unrecognized options", option, nearest)))
        for option, nearest in (
            ("--train.stepz=5", "--train.steps INT"),
            ("--trian.steps=5", "--train.steps INT"),
            ("--tensorboard=1", "--help"),
        )
    ),
    row("train", "a rank for an unknown layer", "--lora.ranks={x: 2}", words="lora.ranks: 'x' names no linear layer"),
    row("train", "no LoRA to start from", "--lora.init=$tmp/none", words=("none: no such file",)),
    malformed(row("train", "--resume=yes", "--resume=yes", words=("Unrecognized options", "yes"))),
    *options(
        "sample",
        ("--clip.frames=6", "expected 4 n + 1"),
        ("--clip.frames=0", "expected at least 1"),
        ("--clip.height=40", "expected a multiple of 16"),
        ("--clip.width=0", "expected at least 1"),
        ("--clip.fps=0", "expected more than 0"),
        ("--clip.fps=inf", "expected a finite number"),
        ("--clip.fps=native", "expected a number, such as 16"),
        ("--sampling.steps=0", "expected at least 1"),
        ("--sampling.shift=nan", "expected a finite number"),
        ("--sampling.guidance=-1", "expected at least 0"),
        ("--sampling.guidance=inf", "expected a finite number"),
        ("--sampling.seed=-1", "expected at least 0"),
        ("--sampling.prompts=", "expected"),
        ("--sampling.lora=", "expected"),
        ("--sampling.output=", "expected a path"),
        ("--sampling.output=.", "expected the path of a folder"),
        ("--sampling.solver=heun", "expected 'euler', 'unipc' or 'dpmpp_2m'"),
        ("--sampling.guidance_interval=[0.5]", "expected two rising fractions"),
        ("--sampling.guidance_interval=[0.5, 0.2]", "expected two rising fractions"),
        ("--sampling.tile=[30]", "expected a height and a width"),
        ("--sampling.prompt=", "expected text that is not empty"),
        ("--sampling.videos_per_prompt=0", "expected at least 1"),
    ),
    row(
        "sample", "no such noise", "--sampling.latents=$tmp/none", words=("sampling.latents=$tmp/none", "no such file")
    ),
    row("sample", "a comparison without a LoRA", "--compare", words=("sampling.lora=null", "needs a LoRA")),
    *options(
        "prepare_data",
        ("--clip.frames=6", "expected 4 n + 1"),
        ("--clip.width=40", "expected a multiple of 16"),
        ("--clip.fps=real", "expected a number or 'native'"),
        ("--clip.part=end", "expected 'start', 'centre', 'random' or 'windows'"),
        ("--clip.short=pad", "expected 'skip', 'cut' or 'refuse'"),
        ("--clip.resize=area", "expected 'bicubic' or 'bilinear'"),
        ("--clip.buckets=[5, 32, 48]", "expected a list of [frames, height, width]"),
        ("--clip.buckets=[[6, 32, 48]]", "expected [frames, height, width]: 4 n + 1 frames"),
        ("--clip.max_pixels=0", "expected at least 1024"),
        ("--data.seed=-1", "expected at least 0"),
        ("--data.source=", "expected"),
        ("--data.path=", "expected a path"),
        ("--data.path=.", "expected the path of a folder"),
        ("--data.path=/", "expected the path of a folder"),
    ),
]

COMMANDS = [
    *(
        malformed(exactly(program, "no arguments", words=(command, missing)))
        for program, command, missing in (
            ("train", "tfm-train", "--config"),
            ("prepare_data", "tfm-prepare", "--config"),
            ("sample", "tfm-sample", "--config"),
            ("plan", "tfm-plan", "--config"),
            ("convert_weights", "tfm-convert", "SOURCE"),
            ("export_lora", "tfm-export", "RUN_FOLDER"),
            ("evaluate", "tfm-evaluate", "--reference"),
            ("lora", "tfm-lora", "inspect"),
            ("pretrain", "python scripts/pretrain.py", "OUTPUT"),
        )
    ),
    *(
        row(
            program,
            "no such configuration",
            "--config=$tmp/none.yaml",
            words=("$tmp/none.yaml", "expected a configuration"),
        )
        for program in ("train", "prepare_data", "sample", "plan", "study")
    ),
    malformed(row("train", "a word that is no option", "quickly", words=("Unrecognized options", "quickly"))),
    malformed(row("train", "an option without a value", "--train.steps", words=("Missing value", "--train.steps"))),
    malformed(
        row("train", "an option for a value", "--train.steps", "--resume", words=("Missing value", "--train.steps"))
    ),
    row("train", "an option twice", "--train.seed=1", "--train.seed=1", words=("--train.seed", "given more than once")),
    row("train", "a folder for a configuration", "--config=$world", words=("$world", "expected a YAML file")),
    row(
        "train",
        "a configuration that links to itself",
        "--config=$tmp/loop.yaml",
        words=("loop.yaml", "expected a configuration"),
        broken=link("loop.yaml", "loop.yaml"),
    ),
    row("train", "an endless path", f"--train.output=$tmp/{LONG}", words="aaaaa"),
    row("train", "a number of 5000 digits", f"--train.steps={'9' * 5000}", words="--train.steps=999"),
    row("prepare_data", "no source", "--data.source=null", words=("data.source", "that contains metadata.csv")),
    malformed(row("prepare_data", "a word that is no option", "now", words=("Unrecognized options", "now"))),
    malformed(
        row("sample", "an option without a value", "--sampling.lora", words=("Missing value", "--sampling.lora"))
    ),
    Row("train", "64-bit numbers", USUAL["train"], ["JAX_ENABLE_X64=1"], environment={"JAX_ENABLE_X64": "1"}),
    Row(
        "export_lora", "64-bit numbers", USUAL["export_lora"], ["JAX_ENABLE_X64=1"], environment={"JAX_ENABLE_X64": "1"}
    ),
]

ALIASES = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)

CONFIGURATIONS = [
    config("nothing in it", "", "expected sections"),
    config("a list", "- model\n", "expected sections"),
    config("a section that is a list", "model: [1]\n", "expected"),
    config("a section that is nothing", "model:\n", "expected"),
    config("bytes that are no text", b"model: \xff\xfe\n", "not"),
    config("bytes of zero", bytes(64), "not a YAML file"),
    config("a bracket that stays open", "model: {dim: [1\n", "not a YAML file"),
    config("tabs", "model:\n\tdim: 1\n", "not a YAML file"),
    config(
        "a tag that runs code", 'model: !!python/object/apply:os.mkdir ["owned"]\n', "config.yaml:1", "tag !!python"
    ),
    config("a date that is none", "model: {dim: 2020-13-45}\n", "config.yaml:1", "2020-13-45"),
    config("a whole number that is none", "model: {dim: !!int x}\n", "config.yaml"),
    config("a number that is none", "model: {dim: !!float y}\n", "config.yaml"),
    config("a truth value that is none", "model: {dim: !!bool x}\n", "config.yaml"),
    config("a time that is none", "model: {dim: !!timestamp x}\n", "config.yaml"),
    changed("a date", '"dim": 96', '"dim": 2020-12-24', "config.yaml:1", "2020-12-24"),
    config("a number of 5000 digits", f"model: {{dim: {'9' * 5000}}}\n", "config.yaml"),
    config("lists 3000 deep", f"model: {{dim: {'[' * 3000}{']' * 3000}}}\n", "config.yaml"),
    config("lists that repeat each other", ALIASES + "model: {dim: *g}\n", "config.yaml"),
    config("a list that holds itself", "model: &a [*a]\n", "config.yaml"),
    config("a field twice", "model: {dim: 1, dim: 1}\n", "config.yaml:1", "dim is given more than once"),
    config("a section twice", "model: {dim: 1}\nmodel: {dim: 2}\n", "config.yaml:2", "model is given more than once"),
    config("a list for a name", "? [a, b]\n: {dim: 1}\n", "config.yaml"),
    config("a mapping for a name", "? {a: b}\n: {dim: 1}\n", "config.yaml"),
    config("an unknown section", "optimiser: {}\n", "unknown section optimiser; did you mean optimizer?"),
    config("an unknown field", "lora: {alhpa: 4}\n", "unknown field lora.alhpa; did you mean lora.alpha?"),
    config("a truth value", "train: {steps: yes}\n", "train.steps=true", "booleans are not accepted here"),
    changed("text for a number", '"steps": 3', '"steps": soon', "train.steps=soon", "expected a whole number"),
    config("no section that is needed", "lora: {rank: 2}\n", "model is missing"),
    changed("a path with a zero byte", '/model"', '/mo\\0del"', "config.yaml"),
    changed("an infinite number", "0.001", ".inf", "config.yaml:1", ".inf: expected a decimal number"),
    config("a merge key of nothing", "model: {<<: 1}\n", "config.yaml"),
]

OPTIONS = [*VALUES, *COMMANDS, *CONFIGURATIONS]
