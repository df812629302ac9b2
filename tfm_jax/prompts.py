"""Prompt files: text files with one prompt per line."""

from collections.abc import Sequence
from pathlib import Path

from tfm_jax.errors import InputError


def read_prompts(file: Path) -> list[str]:
    """Read the lines of a UTF-8 text file. Surrounding white space is stripped, and blank lines are skipped.

    Only LF or CR LF ends a line: a prompt may contain any other separator, such as U+2028.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or contains no prompt.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; expected a text file with one prompt per line") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: byte {error.start} is not UTF-8; expected UTF-8 text, one prompt per line") from None
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{file}: contains no prompt; expected a text file with one prompt per line")
    return prompts


def write_prompts(file: Path, prompts: Sequence[str]) -> None:
    """Write a text file that `read_prompts` reads."""
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
