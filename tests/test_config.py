"""Configurations: YAML and the command line, the help, and the reports of mistakes."""

import re
from pathlib import Path

import pytest
import yaml
from helpers.configured import TEXT, configured, write_config
from helpers.paths import ROOT, WAN_TINY

from tfm_jax.config import Config, dump, load, plain
from tfm_jax.data.prepare import PrepareRun
from tfm_jax.errors import InputError
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.train.run import TrainRun

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RUNS = (TrainRun, PrepareRun, SampleRun)


@pytest.fixture
def file(tmp_path):
    return write_config(tmp_path)


def read(file, *options, kind=Config):
    return configured(kind, ["--config", str(file), *options])


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
    assert {path.stem for path in CONFIGS} >= {"wan_tiny", "wan2.1_t2v_1.3b", "wan2.1_t2v_14b", "tfm_paper_14b"}


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


def test_mappings_on_the_command_line(file, tmp_path, capsys):
    options = ["--lora.ranks={q: 4, ffn.0: 16}", "--lora.rslora=true"]
    config = read(file, *options)
    assert config.lora.ranks == {"q": 4, "ffn.0": 16}
    dump(config, tmp_path / "saved.yaml")
    assert read(tmp_path / "saved.yaml") == config
    text = help_of(capsys, "--config", str(tmp_path / "saved.yaml"), "--help")
    assert re.search(r"--lora.ranks {TEXT: INT, ...} [^(]* \(default: {q: 4, ffn.0: 16}\)", text)


def test_one_lora_or_several(file, tmp_path):
    """Read from the command line, written to a file and read again."""
    for option, expected in {
        "null": (),
        "a.safetensors": ("a.safetensors",),
        "a.safetensors:0.7": ("a.safetensors:0.7",),
        "[a.safetensors:0.7, b.safetensors]": ("a.safetensors:0.7", "b.safetensors"),
    }.items():
        config = configured(SampleRun, ["--config", str(file), f"--sampling.lora={option}"])
        dump(config, tmp_path / "again.yaml")
        for read_config in (config, load(SampleRun, tmp_path / "again.yaml")):
            assert tuple(map(str, read_config.sampling.loras)) == expected


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


def help_of(capsys, *options, kind=TrainRun) -> str:
    """The help, without its boxes and line breaks."""
    with pytest.raises(SystemExit) as done:
        configured(kind, options)
    assert done.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize("kind", RUNS)
def test_help_lists_every_field_with_its_value(file, capsys, kind):
    text = help_of(capsys, "--config", str(file), "--help", kind=kind)
    assert "About it." in text
    for name, part in plain(read(file, kind=kind)).items():
        for field in part:
            assert re.search(rf"--{name}\.{field} \S+( \S+\])? [^-]\S* .*?\((default: |required)", text), field
    assert re.search(r"--model.dim INT [^(]* \(default: 96\)", text)
    assert re.search(r"--model.path PATH .{,200} \(default: weights\)", text)
    if kind is TrainRun:
        assert re.search(r"--lora.targets \[TEXT, ...\] [^-]* \(default: \[q, k\]\)", text)
        assert re.search(r"--optimizer.learning_rate FLOAT [^(]* \(default: 1e-3\)", text)
        assert re.search(r"--optimizer.max_grad_norm FLOAT\|null [^-]* \(default: null\)", text)
    else:
        assert "--train" not in text


def test_help_without_a_file(capsys):
    text = help_of(capsys, "-h")
    assert re.search(r"--train.output PATH [^-]* \(required\)", text)
    assert re.search(r"--train.seed INT [^-]* \(default: 0\)", text)


# --- Configurations and the model of the package ---------------------------------------------------------------------


def test_a_shipped_configuration_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config in CONFIGS:
        assert load(Config, config.stem) == load(Config, config)


def test_a_file_wins_over_a_shipped_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan_tiny").write_text(TEXT)
    assert load(Config, "wan_tiny").model.dim == 96


def test_an_unknown_name_is_refused_with_the_shipped_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "tfm_paper_14b, wan2.1_t2v_1.3b, wan2.1_t2v_14b, wan_tiny"
    expected = f"tiny: no such file; expected a configuration file or one of {names}"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        load(Config, "tiny")


def test_the_embedded_model_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load(Config, "wan_tiny")
    assert config.model.path == WAN_TINY
    assert plain(config)["model"]["path"] == "wan_tiny"  # valid on any machine
    dump(config, tmp_path / "again.yaml")
    assert load(Config, "again.yaml") == config


def test_a_directory_wins_over_the_embedded_model(tmp_path, monkeypatch):
    embedded = load(Config, "wan_tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wan_tiny").mkdir()
    assert load(Config, CONFIGS[-1]).model.path == Path("wan_tiny")
    dump(embedded, tmp_path / "embedded.yaml")
    assert load(Config, "embedded.yaml").model.path == WAN_TINY


def test_overrides_without_a_command_line(file):
    overrides = {"train.steps": 3, "train.output": Path("x"), "lora.targets": ("v",), "optimizer.max_grad_norm": "null"}
    config = load(Config, file, overrides)
    assert (config.train.steps, config.train.output, config.lora.targets) == (3, Path("x"), ("v",))
    assert config.optimizer.max_grad_norm is None
    with pytest.raises(InputError, match=r"^--train.steps=0: expected at least 1$"):
        load(Config, file, {"train.steps": 0})


# --- Mistakes --------------------------------------------------------------------------------------------------------


def refusal(file, *options, kind=Config) -> str:
    with pytest.raises(InputError) as error:
        read(file, *options, kind=kind)
    message = str(error.value)
    assert "\n" not in message
    return message


BUCKETS = "a list of [frames, height, width], such as [[81, 480, 832], [81, 832, 480]]"
BUCKET = "[frames, height, width]: 4 n + 1 frames, and multiples of 16, such as [81, 480, 832]"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--train.steps=0", "expected at least 1"),
        ("--train.steps=-1", "expected at least 1"),
        ("--train.steps=2.5", "expected a whole number"),
        ("--train.steps=ten", "expected a whole number"),
        ("--train.steps=", "expected a whole number"),
        ("--train.steps=null", "expected a number of steps, or a number of epochs in train.epochs"),
        ("--train.epochs=2", "expected null, because train.steps=200; for epochs, set train.steps to null"),
        ("--train.keep_every=7", "expected a multiple of checkpoint_every=500"),
        ("--train.ema_decay=1", "expected less than 1"),
        ("--train.accumulate=0", "expected at least 1"),
        ("--optimizer.final_factor=2", "expected at most 1"),
        ("--optimizer.schedule=step", "expected 'constant', 'cosine' or 'linear'"),
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
        ("--objective.logit_std=0", "expected more than 0"),
        ("--objective.law=paper", "expected 'uniform' or 'logit_normal'"),
        ("--objective.weight=min_snr", "expected bell or none, because kind=tfm is not fm"),
        ("--lora.ranks={q: 0}", "expected a rank for each target, such as {q: 16, ffn.0: 64}"),
        ("--lora.ranks={q: high, k: low}", "expected a rank for each target, such as {q: 16, ffn.0: 64}"),
        ("--lora.ranks=[q]", "expected a rank for each target, such as {q: 16, ffn.0: 64}"),
        ("--lora.ranks={q", "not a mapping; expected one, such as {a: 1, b: 2}"),
        ("--lora.targets=[]", "expected at least 1 of them"),
        ("--lora.targets=q", "expected a list, such as [a, b]"),
        ("--lora.targets=[q", "not a list; expected one, such as [a, b]"),
        ("--lora.targets=[1]", "expected text"),
        ("--clip.frames=16", "expected 4 n + 1, such as 81"),
        ("--clip.height=40", "expected a multiple of 16"),
        ("--clip.width=1", "expected a multiple of 16"),
        ("--clip.fps=0", "expected more than 0 or 'native'"),
        ("--clip.fps=fast", "expected a number or 'native'"),
        ("--clip.part=end", "expected 'start', 'centre', 'random' or 'windows'"),
        ("--clip.short=pad", "expected 'skip', 'cut' or 'refuse'"),
        ("--clip.resize=nearest", "expected 'bicubic' or 'bilinear'"),
        ("--clip.max_pixels=100", "expected at least 1024"),
        ("--clip.buckets=81", f"expected {BUCKETS}"),
        ("--clip.buckets=[81, 480, 832]", f"expected {BUCKETS}"),
        ("--clip.buckets=[[81, 480, wide]]", f"expected {BUCKETS}"),
        ("--clip.buckets=[[81, 480, 832], [81, 480]]", f"expected {BUCKET}"),
        ("--clip.buckets=[[80, 480, 832]]", f"expected {BUCKET}"),
        ("--clip.buckets=[[81, 480, 840]]", f"expected {BUCKET}"),
        ("--clip.buckets=[[81, 0, 832]]", f"expected {BUCKET}"),
        ("--objective.low=1", "expected less than high=1.0"),
        ("--data.held_out=1", "expected less than 1"),
        ("--data.caption_dropout=1.5", "expected at most 1"),
        ("--objective.high=1.5", "expected at most 1"),
        ("--objective.kind=mse", "expected 'tfm', 'fm', 'fm_direction', 'tfm_mse' or 'fm_warp'"),
        ("--model.dtype=float16", "expected 'float32' or 'bfloat16'"),
        ("--mesh.data=-2", "expected at least -1"),
        ("--mesh.data=0", "expected 1 or more, or -1 for all remaining devices"),
        ("--mesh.tensor=0", "expected at least 1"),
        ("--train.output=", "expected a path"),
        ("--data.source=", "expected a path"),
        ("--lora.targets=[!!int x]", "not a list; expected one, such as [a, b]"),
        ("--lora.targets=[2020-13-45]", "not a list; expected one, such as [a, b]"),
        ("--lora.targets=[&a q, *a]", "not a list; expected one, such as [a, b]"),
        ("--train.remat=some", "expected 'full', 'attention', 'attention_offload' or 'none'"),
    ],
)
def test_values_that_cannot_be(file, option, message):
    assert refusal(file, option) == f"{option}: {message}"


def test_truth_values(file):
    """In a file and on the command line; elsewhere a field that is true is a mistake."""
    assert not read(file).data.absolute_paths
    for text in ("true", "false"):
        assert read(file, f"--data.absolute_paths={text}").data.absolute_paths is (text == "true")
        file.write_text(TEXT.replace("path: latents", f"path: latents, absolute_paths: {text}"))
        assert read(file).data.absolute_paths is (text == "true")
    file.write_text(TEXT)
    expected = "--data.absolute_paths=maybe: expected true or false"
    assert refusal(file, "--data.absolute_paths=maybe") == expected


def test_sizes_of_clips(file):
    assert read(file).clip.buckets == ()
    assert read(file, "--clip.buckets=[[81, 480, 832], [17, 64, 48]]").clip.buckets == ((81, 480, 832), (17, 64, 48))
    file.write_text(TEXT.replace("width: 48", "width: 48, buckets: [[81, 480, 832], [80, 64, 48]]"))
    assert refusal(file) == f"{file}: clip.buckets=[80, 64, 48]: expected {BUCKET}"
    file.write_text(TEXT.replace("width: 48", "width: 48, buckets: [[81, 480, 832]], max_pixels: 9999"))
    assert refusal(file) == f"{file}: clip.max_pixels=9999: expected null, because clip.buckets are given"


def test_the_rate_of_samples(file):
    assert read(file, "--clip.fps=24").clip.rate == 24
    clip = read(file, "--clip.fps=native").clip
    with pytest.raises(InputError, match=r"clip.fps=native: .*expected a number, such as 16"):
        _ = clip.rate


def test_the_same_mistakes_in_the_file(file):
    file.write_text(TEXT.replace("steps: 200", "steps: -5"))
    assert refusal(file) == f"{file}: train.steps=-5: expected at least 1"
    file.write_text(TEXT.replace("frames: 17", "frames: 16"))
    assert refusal(file) == f"{file}: clip.frames=16: expected 4 n + 1, such as 81"
    file.write_text(TEXT.replace("path: weights", "path: 5"))
    assert refusal(file) == f"{file}: model.path=5: expected a path"
    file.write_text(TEXT.replace("rank: 8", "rank: yes"))
    assert refusal(file) == f"{file}: lora.rank=true: booleans are not accepted here; put text in quotes"
    file.write_text(TEXT.replace("path: latents", 'path: ""'))
    assert refusal(file) == f"{file}: data.path=: expected a path"
    file.write_text(TEXT.replace("rank: 8", f"rank: {'8' * 999}x"))
    assert len(refusal(file)) < len(str(file)) + 200


def test_missing(file, capsys):
    assert refusal(file.parent / "none.yaml").startswith(
        f"{file.parent}/none.yaml: no such file; expected a configuration file or one of tfm_paper_14b, "
    )
    file.write_text(TEXT.replace("output: run, ", ""))
    assert refusal(file) == f"{file}: train.output is missing; expected it in the file or as --train.output=..."
    file.write_text(TEXT.replace("steps: 200", ""))
    expected = "expected a number of steps, or a number of epochs in train.epochs"
    assert refusal(file) == f"{file}: train.steps=null: {expected}"
    file.write_text(TEXT.replace("sampling: {output: samples}", ""))
    assert refusal(file, kind=SampleRun) == f"{file}: sampling is missing; expected it in the file"
    with pytest.raises(SystemExit, match="2"):
        configured(TrainRun, ["--train.steps=2"])
    assert "--config PATH" in capsys.readouterr().err


def malformed(capsys, file, *options, kind=Config) -> str:
    """What tyro reports of a command line."""
    with pytest.raises(SystemExit, match="2"):
        read(file, *options, kind=kind)
    out, err = capsys.readouterr()
    assert not out
    return err


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--train.stepz=1", "--train.steps INT"),
        ("--trian.log_every=1", "--train.log_every INT"),
        ("--rank=1", ""),
        ("--train.learning_rate=1", ""),
        ("--mesh.pipeline=1", ""),
        ("--xyz=1", ""),
    ],
)
def test_unknown_options(file, option, nearest, capsys):
    text = malformed(capsys, file, option)
    assert f"Unrecognized options: {option}" in text
    assert nearest in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.stepz", "did you mean train.steps or sampling.steps?"),
        ("trian.remat", "did you mean train.remat?"),
        ("alpha", "did you mean lora.alpha?"),
        ("train.learning_rate", "did you mean optimizer.learning_rate?"),
        ("mesh.pipeline", "expected one of mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor"),
        (
            "xyz",
            "expected one of model.*, clip.*, train.*, lora.*, objective.*, optimizer.*, data.*, sampling.*, mesh.*",
        ),
    ],
)  # fmt: skip
def test_unknown_overrides(file, name, message):
    with pytest.raises(InputError) as error:
        load(Config, file, {name: 1})
    assert str(error.value) == f"--{name}=1: unknown field {name}; {message}"


def test_an_option_of_another_program(file, capsys):
    assert "Unrecognized options: --train.steps=1" in malformed(capsys, file, "--train.steps=1", kind=SampleRun)
    message = "--train.steps=1: unknown field train.steps; did you mean sampling.steps?"
    with pytest.raises(InputError, match=re.escape(message)):
        load(SampleRun, file, {"train.steps": 1})


def test_unknown_names_in_the_file(file):
    file.write_text(TEXT.replace("rank:", "ranck:"))
    assert refusal(file) == f"{file}: unknown field lora.ranck; did you mean lora.rank or lora.ranks?"
    file.write_text(TEXT + "optimiser: {eps: 1}\n")
    assert refusal(file) == f"{file}: unknown section optimiser; did you mean optimizer?"
    file.write_text(TEXT + "1: {eps: 1}\n")
    assert "unknown section 1; expected one of model, clip" in refusal(file)


def test_given_twice(file):
    assert refusal(file, "--lora.rank=1", "--lora.rank=2") == "--lora.rank is given more than once"
    file.write_text(TEXT + "train: {steps: 5}\n")
    assert refusal(file) == f"{file}:{TEXT.count(chr(10)) + 1}: train is given more than once"
    file.write_text(TEXT.replace("  rank: 8\n", "  rank: 8\n  rank: 9\n"))
    assert refusal(file) == f"{file}:6: rank is given more than once"


@pytest.mark.parametrize("option", ["train.steps=5", "-x", "--train.steps"])
def test_malformed_arguments(file, option, capsys):
    assert option in malformed(capsys, file, option)


def test_a_decimal_number_means_the_same_in_the_file_and_on_the_command_line(file):
    for text in ("010", "1_0", "+10", "10"):
        file.write_text(TEXT.replace("rank: 8", f"rank: {text}"))
        assert read(file).lora.rank == read(file, f"--lora.rank={text}").lora.rank == 10


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
