"""Folders replaced as a whole."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastopt.files import atomic_folder
from fastopt.files.atomic_folder import replacing_folder

ROOT = Path(__file__).parent.parent


def is_own(name):
    return name == "content"


def replace(path, content):
    with replacing_folder(path, is_own) as folder:
        (folder / "content").write_text(content)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=["exchange", "two steps"])
def way(request, monkeypatch):
    """With the system's exchange of two names, and without."""
    if request.param == "two steps":
        monkeypatch.setattr(atomic_folder, "exchanged", lambda one, other: False)
    return request.param


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


@pytest.mark.usefixtures("way")
def test_a_folder_is_made_and_replaced(target):
    for content in ("one", "two", "three"):
        replace(target, content)
        assert (target / "content").read_text() == content
        assert names(target.parent) == ["target"]


def test_an_empty_folder_and_a_name_with_a_slash(target):
    target.mkdir()
    replace(f"{target}/", "one")
    assert (target / "content").read_text() == "one"
    assert names(target.parent) == ["target"]


@pytest.mark.usefixtures("way")
def test_a_block_that_fails_leaves_what_was_there(target):
    replace(target, "one")
    with pytest.raises(KeyboardInterrupt), replacing_folder(target, is_own) as folder:
        interrupt((folder / "content").write_text("two"))
    assert (target / "content").read_text() == "one"
    assert names(target.parent) == ["target"]


def interrupt(_):
    raise KeyboardInterrupt


@pytest.mark.usefixtures("way")
def test_a_swap_that_fails_leaves_what_was_there(target, monkeypatch):
    replace(target, "one")
    rename = os.rename

    def failing(one, other):
        if Path(other) == target and not str(one).endswith(".old") and names(target.parent) != ["target"]:
            code = errno.ENOTEMPTY if target.exists() else errno.EIO
            raise OSError(code, os.strerror(code))
        rename(one, other)

    monkeypatch.setattr(os, "rename", failing)
    if atomic_folder.exchanged.__name__ == "exchanged":  # the one step
        monkeypatch.setattr(atomic_folder, "exchanged", failing_exchange)
    with pytest.raises(OSError, match="Input/output error") as caught:
        replace(target, "two")
    assert f"while writing {target}" in caught.value.__notes__
    assert (target / "content").read_text() == "one"
    assert names(target.parent) == ["target"]


def failing_exchange(one, other):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_other_files_are_not_deleted(target):
    replace(target, "one")
    (target / "diary").touch()
    with pytest.raises(FileExistsError, match="holds more than a checkpoint: diary") as caught:
        replace(target, "two")
    assert str(target) in str(caught.value)
    assert names(target) == ["content", "diary"]
    assert names(target.parent) == ["target"]


def test_other_files_that_come_meanwhile_are_not_deleted(target):
    replace(target, "one")
    with pytest.raises(FileExistsError, match="diary"), replacing_folder(target, is_own):
        (target / "diary").touch()
    assert names(target) == ["content", "diary"]
    assert names(target.parent) == ["target"]


def test_a_file_in_the_place_is_not_deleted(target):
    target.touch()
    with pytest.raises(NotADirectoryError):
        replace(target, "one")
    assert target.is_file()
    assert names(target.parent) == ["target"]


def test_a_parent_that_is_not_there(target):
    with pytest.raises(FileNotFoundError) as caught:
        replace(target / "deeper", "one")
    assert f"while writing {target / 'deeper'}" in caught.value.__notes__
    assert not target.exists()


def test_a_link_stays_and_permissions_are_handed_on(target):
    replace(target, "one")
    target.chmod(0o750)
    link = target.with_name("link")
    link.symlink_to("target")
    replace(link, "two")
    assert link.is_symlink()
    assert (target / "content").read_text() == "two"
    assert target.stat().st_mode & 0o777 == 0o750


def test_a_system_without_the_exchange(target, monkeypatch):
    replace(target, "one")
    monkeypatch.setattr(atomic_folder.ctypes, "CDLL", lambda *_, **__: object())
    replace(target, "two")
    assert (target / "content").read_text() == "two"
    assert names(target.parent) == ["target"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EIO])
def test_a_file_system_without_the_exchange(target, monkeypatch, code):
    class Library:
        @staticmethod
        def renameat2(*_):
            return -1

    replace(target, "one")
    monkeypatch.setattr(atomic_folder.ctypes, "CDLL", lambda *_, **__: Library)
    monkeypatch.setattr(atomic_folder.ctypes, "get_errno", lambda: code)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            replace(target, "two")
    else:
        replace(target, "two")
    assert (target / "content").read_text() == ("one" if code == errno.EIO else "two")
    assert names(target.parent) == ["target"]


KILLED = """
import itertools, os, signal, sys, time
import torch
from fastopt.files import dcp_folder, dcp_writer
target, kills = sys.argv[1], int(sys.argv[2])
for kill in range(kills):
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        for number in itertools.count():
            dcp_folder.write(target, {"a": torch.full((5000,), number), "b": number})
            os.write(begin, bytes([number % 256]))
    os.close(begin)
    while not os.read(end, 1):
        pass
    time.sleep(0.0007 * kill)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    last = os.read(end, 1000)[-1:]
    content = dcp_folder.read(target)
    assert (content["a"] == content["b"]).all()
    assert not last or content["b"] in (last[0], last[0] + 1), (content["b"], last)
print("whole")
"""


def test_a_kill_at_any_moment_leaves_a_whole_folder(target):
    """A process that saves over and over is killed; what stands there is whole, and the last or the one after it."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), "40"], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("whole\n", 0), done.stderr
