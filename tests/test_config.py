"""Configurations: YAML and the command line, and the help."""

import re
from pathlib import Path

import pytest
import yaml
from helpers.configured import TEXT, configured, read, write_config
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
    assert re.search(r"--model.path PATH .{,400} \(default: weights\)", text)
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
