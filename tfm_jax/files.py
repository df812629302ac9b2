"""Files and folders that a program writes: checked before any work, written whole or not at all, used by one run."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tfm_jax.errors import InputError


def check_output_directory(field: str, path: Path) -> None:
    """Check that `path` can be a folder of results; it may exist.

    Raises:
        InputError: `path` is empty, the current folder or one above it (the root is), or a file.
    """
    # Path("") is Path("."): both would put results among whatever is in the current folder.
    # realpath: before Python 3.13, resolve() raises RuntimeError on links that lead to themselves.
    if Path.cwd().resolve().is_relative_to(os.path.realpath(path)):
        raise InputError(f"{field}={path}: expected the path of a folder for the results, such as runs/name")
    if path.exists() and not path.is_dir():
        raise InputError(f"{field}={path}: a file; expected a directory")


def check_new_directory(field: str, path: Path) -> None:
    """Check that `path` can become a folder of results: it does not exist, or is an empty folder.

    Raises:
        InputError: it has something in it, or is no output folder as `check_output_directory` says.
    """
    check_output_directory(field, path)
    if path.exists() and any(path.iterdir()):
        raise InputError(f"{field}={path}: already exists and is not empty; expected a new or empty directory")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path beside `path` to write to. It takes the place of `path` at the end, and is removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield scratch
        scratch.replace(path)
    except OSError as error:  # one from a write, such as on a full disk, names no file
        error.filename = error.filename or str(path)
        raise
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process holds the lock `file` inside the block. The operating system frees it when a process ends.

    Args:
        file: made if it does not exist; it stays, and means nothing by itself.
        wait: for another process to free the lock.
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
            print(f"note: {file}: this filesystem has no locks; make sure that no other program writes here")
        yield True
