"""Read plain YAML: only sections, lists, text, numbers, booleans and null.

Tags, anchors, aliases, dates and multiple documents are refused, so that files from untrusted sources are safe to read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tfm_jax.errors import InputError

MAX_BYTES = 2**18
MAX_NAME = 100
"""Maximum number of characters in the name of a section or field."""

_CORE = "tag:yaml.org,2002:"


def read(file: Path) -> Any:
    """Read a YAML file of at most 256 KiB.

    Raises:
        InputError: the file is not plain YAML; the message names the file and the line.
    """
    if file.exists() and not file.is_file():
        raise InputError(f"{file}: not a regular file; expected a YAML file")
    with open(file, "rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise InputError(f"{file}: longer than {MAX_BYTES // 1024} KiB; expected a YAML file")
    try:
        return parse(content.decode("utf-8-sig"), str(file))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}:{line}: not a YAML file: byte {error.start} is not UTF-8") from None


def parse(text: str, place: str) -> Any:
    """Parse a YAML text and return its value. The value of an empty text is None.

    Args:
        place: the source of the text, such as a file; error messages begin with it.

    Raises:
        InputError: the text is not plain YAML.
    """
    try:
        node = yaml.compose(text, _Loader)
        return None if node is None else _value(node)
    except _Refused as error:
        raise InputError(f"{place}:{error.line}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise InputError(f"{place}:{mark.line + 1 if mark else 1}: not a YAML file: {error.problem}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise InputError(f"{place}: not a YAML file: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{place}: nested too deeply; expected sections with fields") from None


class _Refused(Exception):
    """The text is YAML, but not plain YAML."""

    def __init__(self, mark: yaml.Mark, message: str):
        super().__init__(message)
        self.line = mark.line + 1


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()
        if event.anchor:  # true for aliases, too: they carry the name of their anchor
            raise _Refused(event.start_mark, f"anchor or alias {event.anchor[:MAX_NAME]}: write out the value")
        if event.tag:
            tag = event.tag.replace(_CORE, "!!")[:MAX_NAME]
            raise _Refused(event.start_mark, f"tag {tag}: expected a value without a tag; put text in quotes")
        return super().compose_node(parent, index)


def _value(node: Node) -> Any:
    if isinstance(node, MappingNode):
        return _mapping(node)
    if isinstance(node, SequenceNode):
        return [_value(item) for item in node.value]
    tag, text = node.tag.removeprefix(_CORE), node.value
    if tag not in _SCALARS:
        raise _Refused(node.start_mark, f"{text[:MAX_NAME]}: YAML reads this as a {tag}; put text in quotes")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise _Refused(node.start_mark, "text contains a NUL or half a surrogate pair; expected Unicode text")
    try:
        return _SCALARS[tag](text)
    except ValueError:  # YAML 1.1 reads 1:30 as 90 and 0x1f as 31
        raise _Refused(node.start_mark, f"{text[:MAX_NAME]}: expected a decimal number; put text in quotes") from None


def _mapping(node: MappingNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, ScalarNode) or len(key.value) > MAX_NAME:
            raise _Refused(key.start_mark, "expected a name before the colon")
        if key.value in values:
            raise _Refused(key.start_mark, f"{key.value} is given more than once")
        values[key.value] = _value(value)
    return values


_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: text.lower() in ("yes", "true", "on"),
    "null": lambda text: None,
}
