"""Configurations: how mistakes are reported."""

import re

import pytest
from helpers.configured import TEXT, configured, read, write_config

from tfm_jax.config import Config, load
from tfm_jax.errors import InputError
from tfm_jax.sampling.pipeline import SampleRun
from tfm_jax.train.run import TrainRun


@pytest.fixture
def file(tmp_path):
    return write_config(tmp_path)


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
