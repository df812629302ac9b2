"""Output files and folders: checked before any work, written completely or not at all, locked by one run."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tfm_jax.errors import InputError


def check_output_directory(field: str, path: Path) -> None:
    """Check that `path` can be an output folder; it may exist.

    Raises:
        InputError: `path` is empty, a file, the current folder or one of its parents (such as the root).
    """
    # Path("") is Path("."): both would mix the results with the files of the current folder.
    # realpath: before Python 3.13, resolve() raises RuntimeError on circular links.
    if Path.cwd().resolve().is_relative_to(os.path.realpath(path)):
        raise InputError(f"{field}={path}: expected the path of a folder for the results, such as runs/name")
    if path.exists() and not path.is_dir():
        raise InputError(f"{field}={path}: a file; expected a directory")


def check_new_directory(field: str, path: Path) -> None:
    """Check that `path` can be an output folder, and that it does not exist or is empty.

    Raises:
        InputError: it is not empty, or `check_output_directory` refuses it.
    """
    check_output_directory(field, path)
    if path.exists() and any(path.iterdir()):
        raise InputError(f"{field}={path}: already exists and is not empty; expected a new or empty directory")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` at the end and is removed after an error."""
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
    """Try to lock `file` for the block, and yield whether it succeeded. The lock also ends when the process does.

    Args:
        file: created if it does not exist. It remains afterwards; its existence does not mean that it is locked.
        wait: wait until no other process holds the lock.
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
