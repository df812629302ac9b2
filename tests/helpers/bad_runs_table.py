"""The table of bad input: outputs, runs to resume or export, and the options of the other programs."""

from helpers.bad_input_table import CONFIG, Row, exactly, malformed, options, row
from helpers.breaking import DEEP, Break, copied, cut, each, flip, folder, link, remove, rename, replace, write

OUTPUTS = [
    row(
        "train",
        "the output already contains a run",
        "--train.output=$world/run",
        words=("train.output=$world/run", "already contains a run", "--resume"),
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
    row(
        "convert_weights",
        "the output is full",
        "$world/model",
        "$world/clips",
        words=("target=$world/clips", "already exists"),
    ),
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
        "the output exists",
        "$world/run",
        "$tmp/file",
        words=("$tmp/file", "already exists"),
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
        words=("$tmp/done", "already complete"),
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
    malformed(exactly("plan", "no topology", CONFIG, words=("--topology", "v5e:4x4"))),
    row("plan", "a search of so many", "--search=many", words=("--search=many", "expected a whole number")),
    row("plan", "a search of a given mesh", "--search", "--mesh.fsdp=2", words=("--mesh.fsdp=2", "--search")),
    malformed(row("plan", "an unknown option", "--fast=1", words="--fast=1")),
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
            ("--arms=[tfm, magic]", "magic"),
            ("--arms=[tfm]", "expected fm among them"),
            ("--arms=", "expected"),
            ("--seeds=1", "expected at least 2"),
            ("--seeds=x", "x"),
            ("--clips=0", "expected at least"),
            ("--prompts=1", "expected at least 2"),
            ("--reference=3", "expected at least 4"),
            ("--rounds=0", "expected at least 1"),
            ("--laws=[magic]", "expected one of"),
            ("--lengths=[0, 2]", "expected growing numbers"),
            ("--train.output=x", "the study sets this field"),
            ("--train.seed=1", "the study sets this field"),
            ("--clip.frames=1", "expected"),
            ("--clip.fps=native", "expected a number, such as 16"),
        )
    ),
    malformed(row("study", "--train.seed", "--train.seed", words=("Missing value", "--train.seed"))),
    malformed(row("study", "--optimizer.lr=1", "--optimizer.lr=1", words=("Unrecognized", "--optimizer.lr=1"))),
    *(
        row("pretrain", option, option, words=(option.partition("=")[0], words))
        for option, words in (
            ("--share=0", "expected more than 0"),
            ("--share=1.5", "at most 1"),
            ("--share=nan", "expected a finite number"),
            ("--share=half", "half"),
            ("--seed=x", "x"),
            ("--seed=-1", "expected"),
        )
    ),
    malformed(row("pretrain", "--speed=2", "--speed=2", words=("Unrecognized", "--speed=2"))),
    *(
        row("evaluate", option, option, words=(option.partition("=")[0], words))
        for option, words in (
            ("--frames=4", "expected 5"),
            ("--frames=1000000000", "expected"),
            ("--height=8", "expected 16"),
            ("--height=1000000", "expected"),
            ("--width=x", "x"),
            ("--fps=0", "expected 1"),
            ("--fps=nan", "expected a finite number"),
            ("--fps=inf", "expected"),
        )
    ),
    malformed(row("evaluate", "--speed=2", "--speed=2", words=("Unrecognized", "--speed=2"))),
    malformed(exactly("evaluate", "no reference", "$world/clips", words=("tfm-evaluate", "--reference"))),
    malformed(row("convert_weights", "no layout", "$world/model", "$tmp/new", "--to", words=("Missing value", "--to"))),
    row("convert_weights", "an unknown layout", "--to=theirs", words=("--to=theirs", "tfm_jax")),
    row("convert_weights", "an unknown type", "--dtype=float16", words=("--dtype=float16", "bfloat16")),
    malformed(row("convert_weights", "no target", "$world/model", words=("tfm-convert", "TARGET"))),
    row("export_lora", "an unknown dialect", "--dialect=mine", words=("--dialect=mine", "kohya")),
    row("export_lora", "an unknown type", "--dtype=float16", words=("--dtype=float16", "bfloat16")),
    row("export_lora", "a step that is no number", "--step=last", words=("--step", "last")),
    row(
        "export_lora",
        "a step that was not saved",
        "--step=7",
        words=("$world/run", "no checkpoint of step 7", "1, 2, 3"),
    ),
    row("export_lora", "a negative step", "--step=-1", words=("$world/run", "-1")),
]

# --- Checkpoints -----------------------------------------------------------------------------------------------------

STEPS = "run/checkpoints/[123]"
SUMMARY = f"{STEPS}/_CHECKPOINT_METADATA"


def saved(wrong: str, broken: Break, *words: str) -> list[Row]:
    """Return rows with a run that cannot be resumed or exported, because all its checkpoints are damaged."""
    resume = ("--train.output=$tmp/run", "--train.steps=5", "--resume")
    words = ("$tmp/run", *words)
    return [
        row("train", f"resumed from {wrong}", *resume, words=words, broken=broken)._replace(set_aside=True),
        row("export_lora", wrong, "$tmp/run", "$tmp/new", words=words, broken=broken),
    ]


CHECKPOINTS = [
    row("export_lora", "no such run", "$tmp/none", "$tmp/new", words=("$tmp/none", "expected the train.output")),
    row(
        "export_lora",
        "clips for a run",
        "$world/clips",
        "$tmp/new",
        words=("$world/clips", "expected the train.output"),
    ),
    row("export_lora", "an empty text for a run", "", "$tmp/new", words="expected"),
    row("export_lora", "a file for a run", "$world/config.yaml", "$tmp/new", words=("config.yaml", "expected")),
    exactly("report", "no such run", "$tmp/none", words=("$tmp/none", "expected the folder of a training run")),
    exactly("report", "clips for a run", "$world/clips", words=("$world/clips: contains no config.yaml",)),
    exactly("report", "an empty text for a run", "", words="expected"),
    exactly("report", "a port that is none", "$world/run", "--serve=70000", words="--serve=70000"),
    row(
        "export_lora", "a run without checkpoints", "$tmp/run", "$tmp/new", words="$tmp/run", broken=each(STEPS, remove)
    ),
    *saved("checkpoints without metadata", each(SUMMARY, remove)),
    *saved("checkpoints with metadata cut off", each(SUMMARY, cut)),
    *saved("checkpoints with empty metadata", each(SUMMARY, lambda name: write(name, ""))),
    *saved(
        "checkpoints with another alpha", each(SUMMARY, lambda name: replace(name, 'alpha\\": 32.0', 'alpha\\": 6.0'))
    ),
    *saved("checkpoints with metadata nested", each(SUMMARY, lambda name: write(name, DEEP))),
    *saved("checkpoints without a manifest", each(f"{STEPS}/state/manifest.ocdbt", remove)),
    *saved("checkpoints with a manifest cut off", each(f"{STEPS}/state/manifest.ocdbt", cut)),
    *saved("checkpoints with a flipped bit", each(f"{STEPS}/state/d/*", flip)),
    *saved("checkpoints with arrays cut off", each(f"{STEPS}/state/ocdbt.process_0/d/*", cut)),
    *saved(
        "checkpoints with a flipped bit in the arrays",
        each(f"{STEPS}/state/ocdbt.process_0/d/*", lambda name: flip(name, 0.5)),
    ),
    *saved("checkpoints without arrays", each(f"{STEPS}/state", remove)),
    row(
        "export_lora",
        "a checkpoint under another number",
        "$tmp/run",
        "$tmp/new",
        "--step=41",
        words=("$tmp/run", "41"),
        broken=rename("run/checkpoints/3", "run/checkpoints/41"),
    ),
    row(
        "export_lora",
        "an empty folder for a checkpoint",
        "$tmp/run",
        "$tmp/new",
        "--step=41",
        words=("$tmp/run", "41"),
        broken=folder("run/checkpoints/41"),
    ),
]

RUNS = [*OUTPUTS, *RESUMED, *OTHERS, *CHECKPOINTS]
