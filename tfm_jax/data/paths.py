"""Paths of clips, as a list of clips names them: only files in the right place are accepted."""

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath


class BadRow(Exception):
    """A row of a list of clips cannot be used. The message says why, and what was expected."""


def locate(name: str, folder: Path, absolute_paths: bool = False) -> Path:
    """Return the path of a file that is named relative to `folder` and lies inside it, even after links are resolved.

    The file need not exist.

    Args:
        absolute_paths: also accept absolute names. These may point anywhere.

    Raises:
        BadRow: it is outside the folder, or the name is not a path.
    """
    relative = f"expected a path relative to {folder}"
    if not name.strip():
        raise BadRow(f"is empty; {relative}")
    if "\0" in name:
        raise BadRow(f"contains a NUL character; {relative}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
        raise BadRow(f"is a URL; expected a file in {folder}; download it first")
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    if absolute and not absolute_paths:
        raise BadRow(f"is an absolute path; {relative} (tfm-prepare accepts it with data.absolute_paths=true)")
    path = folder / name
    # Path.resolve raises RuntimeError on circular links; realpath does not.
    inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    if not absolute and (".." in PurePosixPath(name).parts or not inside):
        raise BadRow(f"is outside the folder; {relative}")
    return path
