"""Configuration files that are not plain YAML, not sections with fields, or damaged: one line for each."""

import os
import random
from pathlib import Path

import pytest
import yaml
from helpers.configured import TEXT, write_config

from tfm_jax.config import Config, load, plain
from tfm_jax.errors import InputError


@pytest.fixture
def file(tmp_path):
    return write_config(tmp_path)


def refusal(file) -> str:
    with pytest.raises(InputError) as error:
        load(Config, file)
    message = str(error.value)
    assert "\n" not in message
    return message


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
        (b"a: &a {b: c}\nd: *a\n", ":1: anchor or alias a: write out the value"),
        (b"d: *a\n", ":1: anchor or alias a"),
        (b"[" * 3000, ": nested too deeply"),
        (b"a: {b: c}\n" * 30_000, ": longer than 256 KiB"),
    ],
)
def test_files_that_are_no_configurations(file, content, message):
    file.write_bytes(content)
    assert refusal(file).startswith(f"{file}{message}")


VALUES = {
    "2020-13-45": "YAML reads this as a timestamp; put text in quotes",
    "2020-01-01 10:00:00": "YAML reads this as a timestamp; put text in quotes",
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
    '"a\\0b"': "text contains a NUL",
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
        return load(Config, file), ""
    except InputError as error:
        return None, str(error)


def fields() -> list[tuple[str, str]]:
    sections = plain(load(Config, "wan_tiny")).items()
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
            found = plain(config)[name][field]
            assert str(found) == str(yaml.safe_load(value))
        else:
            assert message.startswith(f"{file}: {name}.{field}=")
            assert "expected" in message or "booleans are not accepted here" in message


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


def test_things_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        assert refusal(path) == f"{path}: not a regular file; expected a YAML file"
