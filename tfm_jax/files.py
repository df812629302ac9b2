"""Output files and folders: check their paths before any work, write files completely or not at all, and lock them."""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tfm_jax.errors import InputError


def check_output_directory(field: str, path: Path) -> None:
    """Check that `path` can be an output folder; it may exist.

    Raises:
        InputError: `path` is empty, a file, the current folder, or a parent of the current folder (such as `/`).
    """
    # Refuse the current folder, which is also Path(""), because the results would be mixed with other files.
    # os.path.realpath is used because resolve() raises RuntimeError on circular links before Python 3.13.
    if Path.cwd().resolve().is_relative_to(os.path.realpath(path)):
        raise InputError(f"{field}={path}: expected the path of a folder for the results, such as runs/name")
    if path.exists() and not path.is_dir():
        raise InputError(f"{field}={path}: is a file; expected a directory")


def check_new_directory(field: str, path: Path) -> None:
    """Check that `path` can be an output folder, and that it does not exist or is empty.

    Raises:
        InputError: `path` is not empty, or `check_output_directory` refuses it.
    """
    check_output_directory(field, path)
    if path.exists() and any(path.iterdir()):
        raise InputError(f"{field}={path}: already exists and is not empty; expected a new or empty directory")


def check_new_file(file: Path) -> None:
    """Check that `file` can be written and does not exist.

    Raises:
        InputError: `file` exists, or one of its parents is not a directory.
    """
    if file.is_dir():
        raise InputError(f"{file}: is a directory; expected the name of a new file")
    if file.exists():
        raise InputError(f"{file}: already exists; expected a new file")
    parent = next(folder for folder in file.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise InputError(f"{file}: {parent} is a file; expected a directory")


def check_parent(field: str, file: Path) -> None:
    """Check that `file` is not a folder and is in a folder that exists; it may exist itself.

    Raises:
        InputError: it cannot be written.
    """
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(f"{field}={file}: cannot be written; expected a file in an existing folder")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`.

    At the end of the block, the file there replaces `path`; after an error, it is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield scratch
        scratch.replace(path)
    except OSError as error:  # a failed write, such as on a full disk, does not name the file
        error.filename = error.filename or str(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Try to lock `file` for the duration of the block, and yield whether this succeeded.

    The lock also ends when the process does. On a filesystem without locks, print a note and yield True.

    Args:
        file: created if it does not exist, and never removed. That the file exists does not mean that it is locked.
        wait: wait until no other process holds the lock, instead of yielding False.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            print(f"note: {file}: this filesystem does not support locks; make sure that no other program writes here")
        yield True


def fingerprint(path: Path) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
