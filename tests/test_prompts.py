"""Prompt files: what separates lines, and what is refused."""

import pytest

from tfm_jax.errors import InputError
from tfm_jax.prompts import read_prompts


def test_prompts_are_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff  a red disc \r\n\r\n \t\n一只猫\n\nlast".encode())
    assert read_prompts(file) == ["a red disc", "一只猫", "last"]


@pytest.mark.parametrize("separator", ["\v", "\f", "\r", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_only_a_line_feed_ends_a_line(tmp_path, separator):
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"one{separator}prompt\ntwo\n".encode())
    assert read_prompts(file) == [f"one{separator}prompt", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompt"),
        (b"\xef\xbb\xbf\r\n \n", "no prompt"),
        (b"caf\xe9\n", "byte 3 is not UTF-8"),
        ("a disc".encode("utf-16"), "byte 0 is not UTF-8"),
    ],
)
def test_no_text(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_no_file(tmp_path):
    for path, message in ((tmp_path / "none.txt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=f"{message}.*expected a text file with one prompt per line"):
            read_prompts(path)
