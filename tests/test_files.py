"""Output folders, files that are written completely or not at all, and locks that end with their process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tfm_jax.errors import InputError
from tfm_jax.files import check_new_directory, check_output_directory, lock, replacing


@pytest.mark.parametrize("path", ["", ".", "/", "..", "./.", "/.."])
def test_the_current_folder_and_its_parents_are_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"train.output=.*expected the path of a folder"):
        check_output_directory("train.output", Path(path))


def test_a_folder_with_files_in_it_is_not_new(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    check_new_directory("target", tmp_path / "empty")
    check_new_directory("target", tmp_path / "deep" / "new")
    with pytest.raises(InputError, match="not empty"):
        check_new_directory("target", tmp_path)
    with pytest.raises(InputError, match="a file; expected a directory"):
        check_new_directory("target", tmp_path / "file")


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "file"
    with replacing(file) as scratch:
        scratch.write_text("old")
        assert not file.exists()
    with pytest.raises(ZeroDivisionError), replacing(file) as scratch:
        scratch.write_text("half") / 0
    assert file.read_text() == "old"
    assert [path.name for path in file.parent.iterdir()] == ["file"]


HOLDER = """
import sys, time
from pathlib import Path
from tfm_jax.files import lock
with lock(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path):
    file = tmp_path / "folder" / ".lock"
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    with lock(file) as mine:
        assert not mine
    other.kill()
    other.wait()
    with lock(file) as mine:
        assert mine
