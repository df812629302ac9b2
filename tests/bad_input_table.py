"""The table of bad input, first part: options, and the configuration file."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from breaking import Break, copied, folder, link, replace, write

CONFIG = "--config=$world/config.yaml"

USUAL: dict[str, tuple[str, ...]] = {
    "train": (CONFIG, "--train.output=$tmp/new"),
    "prepare_data": (CONFIG, "--data.path=$tmp/new"),
    "sample": (CONFIG, "--sampling.output=$tmp/new"),
    "export_lora": ("$world/run", "$tmp/new.safetensors"),
    "convert_weights": ("$world/model", "$tmp/new", "--to=tfm_jax"),
    "evaluate": ("$world/clips", "--reference=$world/clips", "--frames=5", "--height=32", "--width=48"),
    "plan": (CONFIG, "--topology=v5e:2x2"),
    "study": (CONFIG, "--output=$tmp/new", "--docs=$tmp/docs"),
    "pretrain": ("$tmp/new",),
}
"""The arguments with which a program works in a sound world."""


class Row(NamedTuple):
    """A mistake, and what the program must do. `$world` and `$tmp` stand for a sound world and the row's own folder."""

    program: str
    wrong: str
    """What is wrong; the name of the test."""
    arguments: Sequence[str]
    words: Sequence[str]
    """They are all in the one line that the program prints."""
    broken: Sequence[Break] = ()
    """Applied to the row's own folder first."""
    code: int = 2
    set_aside: bool = False
    """Whether the program may rename what is damaged."""
    environment: Mapping[str, str] = MappingProxyType({})


def row(program: str, wrong: str, *arguments: str, words: str | Sequence[str], broken: Break | Sequence[Break] = ()):
    """A row whose arguments are added to the usual ones.

    An option takes the place of the usual one of that name; positional arguments take the place of all usual ones.
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
    """A row with these arguments alone."""
    words = [words] if isinstance(words, str) else words
    return Row(program, wrong, arguments, words, [broken] if callable(broken) else broken)


def options(program: str, *table: tuple[str, str]) -> list[Row]:
    """A row for each (option, words), which names the field and its value."""
    return [row(program, option, option, words=(option[2:], words)) for option, words in table]


def config(wrong: str, content: str | bytes, *words: str) -> Row:
    """A row with another configuration file, which is named."""
    file = "--config=$tmp/config.yaml"
    return row(
        "train",
        f"a configuration with {wrong}",
        file,
        words=("config.yaml", *words),
        broken=write("config.yaml", content),
    )


def changed(wrong: str, old: str, new: str, *words: str) -> Row:
    """A row with the usual configuration file but for one piece of text."""
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
        ("--train.checkpoint_every=0", "expected at least 1"),
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
        ("--lora.rank=97", "width of self_attn.q, 96"),
        ("--lora.alpha=0", "expected more than 0"),
        ("--lora.targets=[]", "expected at least 1"),
        ("--lora.targets=q", "expected a list"),
        ("--lora.targets=[q", "expected one such as [a, b]"),
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
        ("--train.stepz=5", "did you mean train.steps"),
        ("--trian.steps=5", "did you mean train.steps"),
        ("--tensorboard=1", "unknown field tensorboard"),
        ("--resume=yes", "unknown field resume"),
    ),
    *options(
        "sample",
        ("--clip.frames=6", "expected 4 n + 1"),
        ("--clip.frames=0", "expected at least 1"),
        ("--clip.height=40", "expected a multiple of 16"),
        ("--clip.width=0", "expected at least 1"),
        ("--clip.fps=0", "expected more than 0"),
        ("--clip.fps=inf", "expected a finite number"),
        ("--sampling.steps=0", "expected at least 1"),
        ("--sampling.shift=nan", "expected a finite number"),
        ("--sampling.guidance=-1", "expected at least 0"),
        ("--sampling.guidance=inf", "expected a finite number"),
        ("--sampling.seed=-1", "expected at least 0"),
        ("--sampling.prompts=", "expected"),
        ("--sampling.lora=", "expected"),
        ("--sampling.output=", "expected a path"),
        ("--sampling.output=.", "expected the path of a folder"),
    ),
    *options(
        "prepare_data",
        ("--clip.frames=6", "expected 4 n + 1"),
        ("--clip.width=40", "expected a multiple of 16"),
        ("--data.source=", "expected"),
        ("--data.path=", "expected a path"),
        ("--data.path=.", "expected the path of a folder"),
        ("--data.path=/", "expected the path of a folder"),
    ),
]

COMMANDS = [
    *(
        exactly(program, "no arguments", words=(f"{program}.py", "--config FILE is missing"))
        for program in ("train", "prepare_data", "sample", "plan")
    ),
    *(exactly(program, "no arguments", words=f"{program}.py") for program in ("convert_weights", "export_lora")),
    *(exactly(program, "no arguments", words=f"{program}.py") for program in ("evaluate", "pretrain")),
    *(
        row(
            program,
            "no such configuration",
            "--config=$tmp/none.yaml",
            words=("$tmp/none.yaml", "expected a configuration"),
        )
        for program in ("train", "prepare_data", "sample", "plan", "study")
    ),
    row("train", "a word that is no option", "quickly", words=("'quickly'", "expected --section.field=value")),
    row("train", "an option without a value", "--train.steps", words=("--train.steps", "expected a value")),
    row("train", "an option for a value", "--train.steps", "--resume", words=("--train.steps", "expected a value")),
    row("train", "an option twice", "--train.seed=1", "--train.seed=1", words=("--train.seed", "given twice")),
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
    row(
        "prepare_data", "no source", "--data.source=null", words=("data.source", "expected the folder of metadata.csv")
    ),
    row("prepare_data", "a word that is no option", "now", words=("'now'", "expected --section.field=value")),
    row("sample", "an option without a value", "--sampling.lora", words=("--sampling.lora", "expected a value")),
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
    config("a field twice", "model: {dim: 1, dim: 1}\n", "config.yaml:1", "dim is given twice"),
    config("a section twice", "model: {dim: 1}\nmodel: {dim: 2}\n", "config.yaml:2", "model is given twice"),
    config("a list for a name", "? [a, b]\n: {dim: 1}\n", "config.yaml"),
    config("a mapping for a name", "? {a: b}\n: {dim: 1}\n", "config.yaml"),
    config("an unknown section", "optimiser: {}\n", "unknown section optimiser; did you mean optimizer?"),
    config("an unknown field", "lora: {ranck: 4}\n", "unknown field lora.ranck; did you mean lora.rank?"),
    config("a truth value", "train: {steps: yes}\n", "train.steps=true", "expected no truth value"),
    changed("text for a number", '"steps": 3', '"steps": soon', "train.steps=soon", "expected a whole number"),
    config("no section that is needed", "lora: {rank: 2}\n", "model is missing"),
    changed("a path with a zero byte", '/model"', '/mo\\0del"', "config.yaml"),
    changed("an infinite number", "0.001", ".inf", "config.yaml:1", ".inf: expected a decimal number"),
    config("a merge key of nothing", "model: {<<: 1}\n", "config.yaml"),
]

OUTPUTS = [
    row(
        "train",
        "the output has a run already",
        "--train.output=$world/run",
        words=("$world/run", "has a run already", "--resume"),
    ),
    row(
        "train",
        "the output is a file",
        "--train.output=$tmp/file",
        words=("$tmp/file", "expected a directory"),
        broken=write("file", ""),
    ),
    row(
        "train",
        "the output is below a file",
        "--train.output=$tmp/file/run",
        words="$tmp/file",
        broken=write("file", ""),
    ),
    row(
        "train",
        "the output links to itself",
        "--train.output=$tmp/loop",
        words="$tmp/loop",
        broken=link("loop", "loop"),
    ),
    row("prepare_data", "the output is full", "--data.path=$world/latents", words="$world/latents"),
    row(
        "prepare_data",
        "the output is below a file",
        "--data.path=$tmp/file/new",
        words="$tmp/file",
        broken=write("file", ""),
    ),
    row("prepare_data", "the output is a file", "--data.path=$tmp/file", words="$tmp/file", broken=write("file", "")),
    row(
        "sample",
        "the output is full",
        "--sampling.output=$world/clips",
        words=("sampling.output=$world/clips", "expected a new or empty directory"),
    ),
    row("sample", "the output is a file", "--sampling.output=$tmp/file", words="$tmp/file", broken=write("file", "")),
    row(
        "sample",
        "the output is below a file",
        "--sampling.output=$tmp/file/new",
        words="$tmp/file",
        broken=write("file", ""),
    ),
    row("convert_weights", "the output is full", "$world/model", "$world/clips", words=("$world/clips", "already")),
    row("convert_weights", "the output is the source", "$world/model", "$world/model", words="$world/model"),
    row("convert_weights", "the output is empty text", "$world/model", "", words="expected"),
    row("convert_weights", "the output is the current folder", "$world/model", ".", words="expected"),
    row(
        "convert_weights",
        "the output is below a file",
        "$world/model",
        "$tmp/file/new",
        words="$tmp/file",
        broken=write("file", ""),
    ),
    row(
        "export_lora",
        "the output is there",
        "$world/run",
        "$tmp/file",
        words=("$tmp/file", "already there"),
        broken=write("file", ""),
    ),
    row("export_lora", "the output is a folder", "$world/run", "$tmp/full", words="$tmp/full", broken=folder("full")),
    row("export_lora", "the output is empty text", "$world/run", "", words="expected"),
    row(
        "export_lora",
        "the output is below a file",
        "$world/run",
        "$tmp/file/new",
        words="$tmp/file",
        broken=write("file", ""),
    ),
    row("evaluate", "numbers to a folder", "--json=$tmp/full", words="$tmp/full", broken=folder("full")),
    row("evaluate", "numbers to empty text", "--json=", words="--json"),
    row("evaluate", "numbers below a file", "--json=$tmp/file/new.json", words="$tmp/file", broken=write("file", "")),
    row(
        "pretrain",
        "the output is complete",
        "$tmp/done",
        words=("$tmp/done", "complete already"),
        broken=folder("done/samples"),
    ),
    row("pretrain", "the output is a file", "$tmp/file", words="$tmp/file", broken=write("file", "")),
    row("pretrain", "the output is empty text", "", words="expected"),
    row("study", "the output is a file", "--output=$tmp/file", words="$tmp/file", broken=write("file", "")),
    row("study", "the output is empty text", "--output=", words="expected"),
]

RUN = ("--train.output=$tmp/run", "--train.steps=5", "--resume")
SAME = copied("run")

RESUMED = [
    row("train", "nothing to resume", "--resume", words=("$tmp/new", "no checkpoints to resume from")),
    row("train", "an empty text to resume", "--resume", "--train.output=", words="expected"),
    *(
        row("train", f"resumed with {option}", *RUN, option, words=(option[2:].partition("=")[0], before), broken=SAME)
        for option, before in (
            ("--lora.rank=4", "started with 2"),
            ("--lora.alpha=4", "started with 32"),
            ("--lora.targets=[q, k]", "ffn.0"),
            ("--train.seed=7", "started with 0"),
            ("--train.batch_size=1", "started with 2"),
            ("--objective.kind=fm", "started with tfm"),
            ("--objective.rho=2", "started with 4"),
            ("--optimizer.b1=0.5", "started with 0.9"),
        )
    ),
    row(
        "train",
        "resumed with fewer steps than it has",
        *RUN[::2],
        "--train.steps=2",
        words=("train.steps=2", "3"),
        broken=SAME,
    ),
]

OTHERS = [
    *options(
        "plan",
        ("--topology=v9:4", "expected one of"),
        ("--topology=v5e", "expected one of"),
        ("--topology=v5e:0x2", "expected"),
        ("--topology=v5p:8", "expected"),
        ("--topology=v5e:3x3x3x3", "expected"),
        ("--topology=v5e:100000x100000", "expected"),
        ("--topology=h100:0", "expected"),
        ("--topology=h100:1000000000", "expected"),
        ("--search=0", "expected"),
        ("--search=-1", "expected"),
    ),
    row("study", "no such model", "--model.path=$tmp/none", words=("$tmp/none", "expected")),
    row("plan", "an empty topology", "--topology=", words=("--topology", "v5e:4x4")),
    exactly("plan", "no topology", CONFIG, words=("--topology is missing", "v5e:4x4")),
    row("plan", "a search of so many", "--search=many", words=("plan.py", "many")),
    row("plan", "a search of a given mesh", "--search", "--mesh.fsdp=2", words=("--mesh.fsdp=2", "--search")),
    row("plan", "an unknown option", "--fast=1", words="--fast=1"),
    row("plan", "a mesh that does not divide the devices", "--mesh.fsdp=3", words=("mesh.fsdp=3", "4")),
    row(
        "plan",
        "a batch that the devices cannot share",
        "--train.batch_size=3",
        words=("train.batch_size=3", "mesh.data=4"),
    ),
    row("plan", "sampling with no steps", "--sampling", "--sampling.steps=0", words="--sampling.steps=0"),
    *(
        row("study", option, option, words=(option.strip("-").partition("=")[0], words))
        for option, words in (
            ("--arms=tfm,magic", "magic"),
            ("--arms=tfm", "expected fm among them"),
            ("--arms=", "expected"),
            ("--seeds=1", "expected at least 2"),
            ("--seeds=x", "x"),
            ("--clips=0", "expected at least 1"),
            ("--prompts=1", "expected at least 2"),
            ("--reference=3", "expected at least 4"),
            ("--rounds=0", "expected at least 1"),
            ("--laws=magic", "expected some of"),
            ("--steps=0", "expected at least 1"),
            ("--train.output=x", "the study sets it"),
            ("--train.seed", "the study sets it"),
            ("--optimizer.lr=1", "unknown field optimizer.lr"),
            ("--clip.frames=1", "expected"),
        )
    ),
    *(
        row("pretrain", option, option, words=(option.partition("=")[0], words))
        for option, words in (
            ("--share=0", "expected more than 0"),
            ("--share=1.5", "at most 1"),
            ("--share=nan", "expected more than 0"),
            ("--share=half", "half"),
            ("--seed=x", "x"),
            ("--seed=-1", "expected"),
            ("--speed=2", "--speed"),
        )
    ),
    *(
        row("evaluate", option, option, words=(option.partition("=")[0], words))
        for option, words in (
            ("--frames=4", "expected 5"),
            ("--frames=1000000000", "expected"),
            ("--height=8", "expected 16"),
            ("--height=1000000", "expected"),
            ("--width=x", "x"),
            ("--fps=0", "expected 1"),
            ("--fps=nan", "expected 1"),
            ("--fps=inf", "expected"),
            ("--speed=2", "--speed"),
        )
    ),
    exactly("evaluate", "no reference", "$world/clips", words=("evaluate.py", "--reference")),
    row("convert_weights", "no layout", "$world/model", "$tmp/new", "--to", words=("convert_weights.py", "--to")),
    row("convert_weights", "an unknown layout", "--to=theirs", words=("'theirs'", "tfm_jax")),
    row("convert_weights", "an unknown type", "--dtype=float16", words=("'float16'", "bfloat16")),
    row("convert_weights", "no target", "$world/model", words=("convert_weights.py", "target")),
    row("export_lora", "an unknown dialect", "--dialect=mine", words=("'mine'", "kohya")),
    row("export_lora", "an unknown type", "--dtype=float16", words=("'float16'", "bfloat16")),
    row("export_lora", "a step that is no number", "--step=last", words=("--step", "last")),
    row(
        "export_lora",
        "a step that was not saved",
        "--step=7",
        words=("$world/run", "no checkpoint of step 7", "1, 2, 3"),
    ),
    row("export_lora", "a negative step", "--step=-1", words=("$world/run", "-1")),
]

OPTIONS = [*VALUES, *COMMANDS, *CONFIGURATIONS, *OUTPUTS, *RESUMED, *OTHERS]
