"""Configurations: YAML and the command line, what --help tells, and what is said about mistakes."""

import os
import random
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT

from tfm_jax.config import Config, dump, parse, plain
from tfm_jax.data.prepare import PrepareRun
from tfm_jax.errors import InputError
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.train.loop import TrainRun

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RUNS = (TrainRun, PrepareRun, SampleRun)

TEXT = """\
model: {path: weights, dim: 96, ffn_dim: 256, heads: 4, layers: 4, dtype: float32}
clip: {frames: 17, height: 64, width: 48}
data: {source: clips, path: latents}
lora:
  rank: 8
  targets: [q, k]
optimizer: {learning_rate: 1e-3}
train: {output: run, steps: 200}
sampling: {output: samples}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(TEXT)
    return path


def read(file, *options, kind=Config):
    return parse(kind, ["--config", str(file), *options], "train.py", "About it.")


# --- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configurations_of_the_repository(config, kind):
    values = yaml.safe_load(config.read_text())
    run = plain(read(config, kind=kind))
    for name, part in run.items():
        for field, value in values.get(name, {}).items():
            assert part[field] == (float(value) if isinstance(part[field], float) else value)


def test_there_are_configurations():
    assert {path.stem for path in CONFIGS} >= {"wan_tiny", "wan2.1_t2v_1.3b", "wan2.1_t2v_14b"}


def test_file_and_defaults(file):
    config = read(file)
    assert config.model.path == Path("weights")
    assert config.lora.targets == ("q", "k")
    assert config.optimizer.learning_rate == 1e-3  # YAML itself takes 1e-3 for text
    assert config.optimizer.max_grad_norm is None
    assert config.sampling.guidance == 5.0
    assert config.mesh.fsdp == 1


def test_the_command_line_wins(file):
    options = ["--train.steps=3", "--lora.rank", "4", "--data.path=a b=c", "--optimizer.max_grad_norm", "1.5"]
    config = read(file, *options)
    assert (config.train.steps, config.lora.rank, config.optimizer.max_grad_norm) == (3, 4, 1.5)
    assert config.data.path == Path("a b=c")
    assert config.model == read(file).model


def test_lists_null_and_text_on_the_command_line(file):
    config = read(file, "--lora.targets=[v, ffn.0]", "--data.source=null", "--sampling.negative_prompt=no: 'rain', 5")
    assert config.lora.targets == ("v", "ffn.0")
    assert config.data.source is None
    assert config.sampling.negative_prompt == "no: 'rain', 5"


def test_a_value_may_start_with_a_dash(file):
    assert read(file, "--mesh.data", "-1").mesh.data == -1
    assert read(file, "--sampling.negative_prompt=--no").sampling.negative_prompt == "--no"


def test_a_program_ignores_the_sections_of_others(file):
    file.write_text(TEXT.replace("steps: 200", "steps: 0"))
    assert read(file, kind=SampleRun).clip.frames == 17
    with pytest.raises(InputError):
        read(file, kind=TrainRun)


def test_dumped_configurations_read_back(file, tmp_path):
    options = [
        "--sampling.negative_prompt=模糊: 'x' # é\n- yes",
        "--lora.targets=[o]",
        "--optimizer.learning_rate=3e-5",
    ]
    config = read(file, *options)
    dump(config, tmp_path / "again.yaml")
    assert read(tmp_path / "again.yaml") == config
    assert "模糊" in (tmp_path / "again.yaml").read_text(encoding="utf-8")


def test_values_cannot_be_changed(file):
    with pytest.raises(AttributeError):
        read(file).train.steps = 5


@pytest.mark.parametrize("kind", RUNS)
def test_help_lists_every_field_with_its_value(file, capsys, kind):
    with pytest.raises(SystemExit) as done:
        read(file, "--help", kind=kind)
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert "About it." in text
    for name, part in plain(read(file, kind=kind)).items():
        for field in part:
            line = next(line for line in text.splitlines() if line.startswith(f"  --{name}.{field}="))
            about = text.splitlines()[text.splitlines().index(line) + 1].strip()
            assert about
            assert about != "None"
    assert "--model.dim=96\n" in text
    assert "--model.path=weights\n" in text
    if kind is TrainRun:
        assert "--lora.targets=[q, k]\n" in text
        assert "--optimizer.learning_rate=1e-3\n" in text
        assert "--optimizer.max_grad_norm=null\n" in text
        assert "sampling" not in text


def test_help_without_a_file(capsys):
    with pytest.raises(SystemExit):
        parse(TrainRun, ["-h"], "train.py", "")
    assert "--train.steps=required\n" in capsys.readouterr().out


# --- Mistakes --------------------------------------------------------------------------------------------------------


def refusal(file, *options, kind=Config) -> str:
    with pytest.raises(InputError) as error:
        read(file, *options, kind=kind)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train.steps=0", "expected at least 1"),
        ("--train.steps=-1", "expected at least 1"),
        ("--train.steps=2.5", "expected a whole number"),
        ("--train.steps=ten", "expected a whole number"),
        ("--train.steps=", "expected a whole number"),
        ("--train.steps=null", "expected a whole number"),
        ("--train.steps=[1]", "expected a whole number"),
        ("--train.seed=-1", "expected at least 0"),
        ("--train.seed=9223372036854775808", "expected less than 4.29497e+09"),
        ("--optimizer.learning_rate=0", "expected more than 0"),
        ("--optimizer.learning_rate=nan", "expected a finite number"),
        ("--optimizer.learning_rate=inf", "expected a finite number"),
        ("--optimizer.learning_rate=fast", "expected a number"),
        ("--optimizer.b1=1", "expected less than 1"),
        ("--optimizer.max_grad_norm=0", "expected more than 0"),
        ("--lora.rank=0", "expected at least 1"),
        ("--lora.targets=[]", "expected at least 1 of them"),
        ("--lora.targets=q", "expected a list, such as [a, b]"),
        ("--lora.targets=[q", "not a list; expected one such as [a, b]"),
        ("--lora.targets=[1]", "expected text"),
        ("--clip.frames=16", "expected 4 n + 1, such as 81"),
        ("--clip.height=40", "expected a multiple of 16"),
        ("--clip.width=1", "expected a multiple of 16"),
        ("--clip.fps=0", "expected more than 0"),
        ("--objective.low=1", "expected less than high=1.0"),
        ("--objective.high=1.5", "expected at most 1"),
        ("--objective.kind=mse", "expected 'tfm', 'fm', 'fm_direction', 'tfm_mse' or 'fm_warp'"),
        ("--model.dtype=float16", "expected 'float32' or 'bfloat16'"),
        ("--mesh.data=-2", "expected at least -1"),
        ("--mesh.data=0", "expected 1 or more, or -1 for all that the other axes leave"),
        ("--mesh.tensor=0", "expected at least 1"),
        ("--train.output=", "expected a path"),
        ("--data.source=", "expected a path"),
        ("--lora.targets=[!!int x]", "not a list; expected one such as [a, b]"),
        ("--lora.targets=[2020-13-45]", "not a list; expected one such as [a, b]"),
        ("--lora.targets=[&a q, *a]", "not a list; expected one such as [a, b]"),
        ("--train.remat=some", "expected 'full', 'attention', 'attention_offload' or 'none'"),
    ],
)
def test_values_that_cannot_be(file, option, message):
    assert refusal(file, option) == f"{option}: {message}"


def test_the_same_mistakes_in_the_file(file):
    file.write_text(TEXT.replace("steps: 200", "steps: -5"))
    assert refusal(file) == f"{file}: train.steps=-5: expected at least 1"
    file.write_text(TEXT.replace("frames: 17", "frames: 16"))
    assert refusal(file) == f"{file}: clip.frames=16: expected 4 n + 1, such as 81"
    file.write_text(TEXT.replace("path: weights", "path: 5"))
    assert refusal(file) == f"{file}: model.path=5: expected a path"
    file.write_text(TEXT.replace("rank: 8", "rank: yes"))
    assert refusal(file) == f"{file}: lora.rank=true: expected no truth value; put text into quotes"
    file.write_text(TEXT.replace("path: latents", 'path: ""'))
    assert refusal(file) == f"{file}: data.path=: expected a path"
    file.write_text(TEXT.replace("rank: 8", f"rank: {'8' * 999}x"))
    assert len(refusal(file)) < len(str(file)) + 200


def test_missing(file):
    assert refusal(file.parent / "none.yaml").endswith(
        "none.yaml: No such file or directory; expected a configuration such as configs/wan_tiny.yaml"
    )
    file.write_text(TEXT.replace("steps: 200", ""))
    assert refusal(file) == f"{file}: train.steps is missing; expected it in the file or as --train.steps=..."
    file.write_text(TEXT.replace("sampling: {output: samples}", ""))
    assert refusal(file, kind=SampleRun) == f"{file}: sampling is missing; expected it in the file"
    with pytest.raises(InputError, match=r"^train\.py: --config FILE is missing, such as --config configs/wan_tiny"):
        parse(TrainRun, ["--train.steps=2"], "train.py", "")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train.stepz=1", "did you mean train.steps or sampling.steps?"),
        ("--trian.log_every=1", "did you mean train.log_every?"),
        ("--rank=1", "did you mean lora.rank?"),
        ("--train.learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("--mesh.pipeline=1", "expected one of mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor"),
        ("--xyz=1", "expected one of model.*, clip.*, data.*, train.*, sampling.*, lora.*, objective.*, "
                    "optimizer.*, mesh.*"),
    ],
)  # fmt: skip
def test_unknown_options(file, option, message):
    assert refusal(file, option) == f"{option}: unknown field {option[2:-2]}; {message}"


def test_an_option_of_another_program(file):
    message = "--train.steps=1: unknown field train.steps; did you mean sampling.steps?"
    assert refusal(file, "--train.steps=1", kind=SampleRun) == message


def test_unknown_names_in_the_file(file):
    file.write_text(TEXT.replace("rank:", "ranck:"))
    assert refusal(file) == f"{file}: unknown field lora.ranck; did you mean lora.rank?"
    file.write_text(TEXT + "optimiser: {eps: 1}\n")
    assert refusal(file) == f"{file}: unknown section optimiser; did you mean optimizer?"
    file.write_text(TEXT + "1: {eps: 1}\n")
    assert "unknown section 1; expected one of model, clip" in refusal(file)


def test_given_twice(file):
    assert refusal(file, "--lora.rank=1", "--lora.rank=2") == "argument --lora.rank is given twice; expected it once"
    file.write_text(TEXT + "train: {steps: 5}\n")
    assert refusal(file) == f"{file}:{TEXT.count(chr(10)) + 1}: train is given twice; expected it once"
    file.write_text(TEXT.replace("  rank: 8\n", "  rank: 8\n  rank: 9\n"))
    assert refusal(file) == f"{file}:6: rank is given twice; expected it once"


@pytest.mark.parametrize("option", ["train.steps=5", "-x", "--train.steps"])
def test_arguments_that_are_no_options(file, option):
    assert "expected" in refusal(file, option)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": expected sections (model, "),
        (b"# nothing\n", ": expected sections (model, "),
        (b"- a\n- b\n", ": expected sections (model, "),
        (b"train: 5\n", ": expected sections (model, "),
        (b"train:\n", ": expected sections (model, "),
        (b"lora: {}\ntrain: {steps: [}\n", ":2: not a YAML file: "),
        (b"lora: {}\n\xff\xfe\x00\x01", ":2: not a YAML file: byte 9 is not UTF-8"),
        (b"lora: {}\n\0", ": not a YAML file: "),
        (b"lora:\n\trank: 8\n", ":2: not a YAML file: "),
        (b"lora: {rank: 8}\n---\nlora: {rank: 9}\n", ":2: not a YAML file: "),
        (b"{[a]: {b: c}}\n", ":1: expected a name before the colon"),
        (b"? {a: b}\n: c\n", ":1: expected a name before the colon"),
        (b"? " + b"x" * 101 + b"\n: c\n", ":1: expected a name before the colon"),
        (b"a: &a {b: c}\nd: *a\n", ":1: anchor or alias a: write the value out"),
        (b"d: *a\n", ":1: anchor or alias a"),
        (b"[" * 3000, ": nested too deeply"),
        (b"a: {b: c}\n" * 30_000, ": longer than 256 KiB"),
    ],
)
def test_files_that_are_no_configurations(file, content, message):
    file.write_bytes(content)
    assert refusal(file).startswith(f"{file}{message}")


VALUES = {
    "2020-13-45": "YAML reads this as a timestamp; put text into quotes",
    "2020-01-01 10:00:00": "YAML reads this as a timestamp; put text into quotes",
    "!!int x": "tag !!int: expected a value without a tag",
    "!!float y": "tag !!float: expected a value without a tag",
    "!!bool x": "tag !!bool: expected a value without a tag",
    "!!timestamp x": "tag !!timestamp: expected a value without a tag",
    "!!binary x": "tag !!binary: expected a value without a tag",
    "!!set {a}": "tag !!set: expected a value without a tag",
    "!!python/object/apply:os.system [ls]": "tag !!python/object/apply:os.system: expected a value",
    "!mine x": "tag !mine: expected a value without a tag",
    "&a b": "anchor or alias a",
    "*a": "anchor or alias a",
    "=": "YAML reads this as a value",
    "<<": "YAML reads this as a merge",
    "1:30": "expected a decimal number",
    "0x1f": "expected a decimal number",
    ".nan": "expected a decimal number",
    "9" * 5000: "expected a decimal number",
    '"a\\0b"': "text with a NUL",
    '"\\ud800"': "half a surrogate pair",
}
"""As the value of a field in line 2 -> what is said about it, whatever the field is."""


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20])
def test_values_that_are_not_plain(file, value):
    for field in ("train: {\nsteps", "sampling: {\nnegative_prompt", "data: {\npath", "lora: {\ntargets"):
        for text in (value, f"[{value}]"):
            file.write_text(f"{field}: {text} }}\n")
            message = refusal(file)
            assert message.startswith(f"{file}:2: ")
            assert VALUES[value] in message
            assert len(message) < len(str(file)) + 250


def read_or_refuse(file) -> tuple[Config | None, str]:
    try:
        return read(file), ""
    except InputError as error:
        return None, str(error)


def fields() -> list[tuple[str, str]]:
    sections = plain(read(CONFIGS[0])).items()
    return [(name, field) for name, part in sections for field in part]


@pytest.mark.parametrize("value", ["{a: b}", "{}", "[[]]", "[1, [2]]", "[null]", "[yes]", "yes", "-1.5e400", "'{gt}'"])
def test_values_of_the_wrong_kind(file, value):
    """In every field: an InputError that names the field, or a value that is read back as it is written."""
    for name, field in fields():
        values = yaml.safe_load(TEXT)
        values.setdefault(name, {})[field] = "VALUE"
        file.write_text(yaml.safe_dump(values).replace("VALUE", value))
        config, message = read_or_refuse(file)
        if config:
            assert str(plain(config)[name][field]) == yaml.safe_load(value)
        else:
            assert message.startswith(f"{file}: {name}.{field}=")
            assert "expected" in message


def test_damaged_files(file):
    rng = random.Random(0)
    for _ in range(300):
        content = bytearray(TEXT.encode())
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            new = bytes(rng.choices(b"\0\t\n !&*[]{}:-#\"'<>%@`?|~,\xff\x80ab019.e", k=rng.randrange(4)))
            content[place : place + rng.randrange(4)] = new
        file.write_bytes(content)
        config, message = read_or_refuse(file)
        assert config or str(file) in message
        assert "\n" not in message


def test_a_decimal_number_means_the_same_in_the_file_and_on_the_command_line(file):
    for text in ("010", "1_0", "+10", "10"):
        file.write_text(TEXT.replace("rank: 8", f"rank: {text}"))
        assert read(file).lora.rank == read(file, f"--lora.rank={text}").lora.rank == 10


def test_things_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        assert refusal(path) == f"{path}: not a regular file; expected a YAML file"


def test_a_configuration_is_replaced_at_once(file, tmp_path, monkeypatch):
    """An error while one is written leaves the one before."""
    config = read(file)
    dump(config, tmp_path / "dumped.yaml")
    before = (tmp_path / "dumped.yaml").read_bytes()

    def full(path, *args, **kwargs):
        path.write_bytes(b"model:")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        dump(config, tmp_path / "dumped.yaml")
    assert (tmp_path / "dumped.yaml").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "dumped.yaml"]
