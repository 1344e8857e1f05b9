"""Saves that are killed, or that fail: the old file or the new one is there, whole, and nothing beside it."""

import errno
import fcntl
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import fastopt
from fastopt.files import beside, formats
from tests.oracle import adam, trained

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("FASTOPT_KILLS", "200"))
"""Saves that are killed, over all ways to save."""
NAMES = ["optimizer.pt", "optimizer.safetensors"]
FOLDER = "optimizer.dcp"
NOBODY = 65534
AT_LAST = 60
"""Seconds after which something hangs."""


@pytest.fixture(params=[False, True], ids=["at once", "in the background"])
def save(request):
    """Saves, and raises the error of that."""
    if request.param:
        return lambda *arguments: fastopt.save(*arguments, background=True).result(AT_LAST)
    return fastopt.save


@pytest.fixture(params=NAMES)
def path(request, tmp_path):
    return tmp_path / request.param


@pytest.fixture(params=[*NAMES, FOLDER])
def place(request, tmp_path):
    """A file or a folder."""
    return tmp_path / request.param


def assert_holds(path, optimizer):
    assert not fastopt.diff(formats.read(path, verify=True), optimizer)


def names_in(folder):
    return sorted(entry.name for entry in folder.iterdir())


# ---- killed ----

KILLED = """
import os, random, signal, sys, time, torch, fastopt
from pathlib import Path
from fastopt.files import formats
path, kills, background = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
torch.set_num_threads(1)  # those of OpenMP do not survive a fork
params = [torch.nn.Parameter(torch.zeros(size)) for size in (10, 30_000, 50_000)]
optimizer = torch.optim.SGD(params, lr=1, momentum=0.9)

def save(value):
    for param in params:
        optimizer.state[param]["momentum_buffer"] = torch.full_like(param, value, requires_grad=False)
    return fastopt.save(optimizer, path, background=background)

def value_in_file():
    tensors = [entry["momentum_buffer"] for entry in formats.read(path, verify=True)["state"].values()]
    [value] = {value.item() for tensor in tensors for value in tensor.unique()}
    assert [tensor.numel() for tensor in tensors] == [10, 30_000, 50_000]
    return value

def save_for_ever(value, pipe):
    while True:
        value += 1
        os.write(pipe, b"b")
        saved = save(value)
        if background:
            saved.add_done_callback(lambda _: os.write(pipe, b"e"))
        else:
            os.write(pipe, b"e")

background, wanted = False, background
started = time.monotonic()
save(0)
longest = time.monotonic() - started  # until a kill; adapted, so that a file is replaced about every other time
background = wanted
value = in_flight = replaced = 0
for _ in range(kills):
    pipe, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(value, writer)
    os.close(writer)
    told = os.read(pipe, 1)
    time.sleep(random.random() * longest)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(pipe, 1 << 16):
        told += more
    os.close(pipe)
    begun, ended = told.count(b"b"), told.count(b"e")
    found = value_in_file()
    assert value + ended <= found <= value + begun, (value, begun, ended, found)
    assert len(os.listdir(path.parent)) <= 6, os.listdir(path.parent)  # two, but for moments before the clean-up
    in_flight += begun > ended
    replaced += found > value
    longest *= 0.8 if found > value else 1.25
    value = int(found)
background = False
save(value + 1)
assert os.listdir(path.parent) == [path.name]
assert value_in_file() == value + 1
print(in_flight, replaced)
"""


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
def test_a_save_that_is_killed_leaves_the_old_file_or_the_new_one(place, background):
    kills = KILLS // 6
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(place), str(kills), str(background)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    in_flight, replaced = map(int, done.stdout.split())
    assert in_flight > kills / 2  # the moments were those of saves
    assert replaced > kills / 10  # and not of their beginnings alone


# ---- no room ----


@pytest.fixture
def small_disk():
    """A file system of one megabyte; not in pytest's own folder: a killed process leaves it mounted."""
    folder = Path(tempfile.mkdtemp(prefix="fastopt-disk-"))
    try:
        mount = shutil.which("mount")
        made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False)
        if not made or made.returncode:
            pytest.skip("only root may mount a file system, and not everywhere")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
    finally:
        folder.rmdir()


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(small_disk, name, save, backend):
    path, optimizer, huge = small_disk / name, trained(adam()), trained(adam((1000, 1000)))
    save(optimizer, path)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save(huge, path)
    assert caught.value.errno == errno.ENOSPC
    assert f"while writing {path}" in caught.value.__notes__
    assert names_in(small_disk) == [name]
    assert_holds(path, optimizer)
    save(trained(adam(), seed=1), path)


@pytest.mark.parametrize("limit", [10, 1_000, 200_000, 5_000_000])
def test_a_file_that_may_not_grow(path, save, backend, limit):
    optimizer, huge = trained(adam()), trained(adam((1000, 1000)))
    save(optimizer, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save(huge, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"while writing {path}" in caught.value.__notes__
    assert names_in(path.parent) == [path.name]
    assert_holds(path, optimizer)


# ---- no place ----


@pytest.fixture
def closed_folder():
    """A folder with a file, where this process may not write."""
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to others altogether
    saved = trained(adam())
    for name in NAMES:
        fastopt.save(saved, folder / name)
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    yield folder
    if os.getuid() == 0:
        os.seteuid(0)
    folder.chmod(0o755)
    for name in NAMES:
        assert_holds(folder / name, saved)
    assert names_in(folder) == NAMES
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", NAMES)
def test_no_permission(closed_folder, name, save):
    with pytest.raises(PermissionError) as caught:
        save(trained(adam(), seed=1), closed_folder / name)
    assert f"while writing {closed_folder / name}" in caught.value.__notes__


def test_a_folder_in_the_way(tmp_path, save):
    path = tmp_path / "optimizer.pt"
    path.mkdir()
    (path / "mine").touch()
    with pytest.raises(FileExistsError, match="holds more than a checkpoint: mine") as caught:
        save(trained(adam()), path)
    assert f"while writing {path}" in caught.value.__notes__
    with pytest.raises(FileExistsError, match="holds more than a checkpoint: mine"):
        fastopt.snapshot(trained(adam())).save(path)
    assert names_in(tmp_path) == [path.name]
    assert names_in(path) == ["mine"]


def test_a_folder_that_is_not_there(path, save):
    missing = path.parent / "missing" / path.name
    with pytest.raises(FileNotFoundError, match="missing") as caught:
        save(trained(adam()), missing)
    assert f"while writing {missing}" in caught.value.__notes__
    assert names_in(path.parent) == []


def test_links_stay_and_what_they_lead_to_is_replaced(path, save):
    real = path.parent / "real"
    real.mkdir()
    path.symlink_to(Path("real") / path.name)
    for seed in range(2):  # at first it leads nowhere
        optimizer = trained(adam(), seed=seed)
        save(optimizer, path)
        assert path.is_symlink()
        assert_holds(real / path.name, optimizer)
    assert names_in(real) == [path.name]
    folder = path.parent / "folder"
    folder.symlink_to(real)
    save(optimizer, folder / path.name)
    assert folder.is_symlink()
    real.joinpath(path.name).unlink()
    real.rmdir()
    with pytest.raises(FileNotFoundError):
        save(optimizer, path)


def test_what_is_no_file_is_not_replaced(path, save):
    os.mkfifo(path)
    link = path.with_name(f"link-{path.name}")
    link.symlink_to(path)
    for place in (path, link):
        with pytest.raises(FileExistsError, match="neither a file nor a folder, and is not replaced") as caught:
            save(trained(adam()), place)
        assert f"while writing {place}" in caught.value.__notes__
    assert path.is_fifo()
    assert names_in(path.parent) == sorted([link.name, path.name])


def test_a_folder_that_cannot_be_synced_does_not_fail_a_save(path, save, monkeypatch):
    def fsync(descriptor, sync=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "as some file systems have it")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    optimizer = trained(adam())
    save(optimizer, path)
    assert_holds(path, optimizer)


def test_a_folder_that_fails_to_sync_fails_a_save(path, save, monkeypatch):
    def fsync(descriptor, sync=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "the disk is gone")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="the disk is gone"):
        save(trained(adam()), path)


# ---- permissions ----


def test_the_umask_is_left_alone(path, save, monkeypatch):
    """It is the whole process's: what other threads create meanwhile would get the permissions of a temporary file."""

    def refuse(_):
        raise AssertionError("the umask was changed")

    before = os.umask(0o027)
    with monkeypatch.context() as patch:
        patch.setattr(os, "umask", refuse)
        save(trained(adam()), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    for mode in (0o604, 0o444, 0o666):
        path.chmod(mode)
        save(trained(adam()), path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    os.umask(before)


# ---- what is left behind ----


def temporary(path, kernel=None, ending="abcd_123"):
    """What a save that was killed has left."""
    left = path.with_name(f".{path.name}.{kernel or beside._kernel()}{ending}")
    if path.name == FOLDER:
        left.mkdir()
        (left / "__0_0.distcp").write_bytes(b"part")
    else:
        left.write_bytes(b"part")
    return left


def test_what_a_killed_save_has_left_is_removed_by_the_next(place):
    for _ in range(2):  # at first there is nothing that is replaced
        left = temporary(place)
        fastopt.save(trained(adam()), place)
        assert names_in(place.parent) == [place.name]
        assert not left.exists()


@pytest.mark.parametrize(("age", "goes"), [(0, False), (23, False), (25, True)])
def test_what_another_kernel_has_left_is_removed_after_a_day(place, age, goes):
    left = temporary(place, "0" * 8)
    then = time.time() - 3600 * age
    for one in (left, *(left.iterdir() if left.is_dir() else ())):
        os.utime(one, (then, then))
    fastopt.save(trained(adam()), place)
    assert left.exists() != goes


def test_a_folder_in_which_another_kernel_still_writes_stays(tmp_path):
    place = tmp_path / FOLDER
    left = temporary(place, "0" * 8)
    os.utime(left, (time.time() - 3 * beside.DAY,) * 2)  # no file was made in it since
    fastopt.save(trained(adam()), place)
    assert left.exists()


def test_a_whole_folder_that_lost_its_name_stays_until_there_is_another(tmp_path):
    """As a kill between the two steps leaves it, where the system has not one for both."""
    place = tmp_path / FOLDER
    optimizer = trained(adam())
    fastopt.save(optimizer, place)
    lost, old = temporary(place, ending="lostlost"), temporary(place, ending="lostlost.old")
    shutil.rmtree(lost)
    place.rename(lost)
    optimizer.param_groups[0]["odd"] = lambda: None
    with pytest.raises(Exception, match=r"pickle|Can't get"):
        fastopt.save(optimizer, place)
    assert_holds(lost, trained(adam()))
    assert names_in(tmp_path) == sorted([lost.name, old.name])
    fastopt.save(trained(adam(), seed=1), place)
    assert names_in(tmp_path) == [place.name]


def test_what_is_not_a_save_to_this_path_stays(path):
    others = [
        temporary(path.with_name("other.pt")),
        temporary(path.with_name(f"{path.name}.x")),
        temporary(path, ending="abcd_1234"),
        temporary(path, ending="abcd.123"),
        path.with_name(f".{path.name}"),
        path.with_name(f".{path.name}.backup"),
    ]
    for other in others:
        other.write_bytes(b"mine")
    fastopt.save(trained(adam()), path)
    assert [other.read_bytes() for other in others] == [b"mine"] * len(others)


def test_what_cannot_be_locked_is_left_alone(place, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "no locks here")

    left = temporary(place)
    monkeypatch.setattr(fcntl, "flock", refuse)
    fastopt.save(trained(adam()), place)
    assert left.exists()
    assert place.exists()


def test_a_temporary_that_is_taken_for_abandoned_before_it_is_locked_is_made_anew(place, monkeypatch):
    taken = []

    def take(file, operation, lock=fcntl.flock):
        if not taken:
            [name] = names_in(place.parent)
            taken.append(name)
            beside.remove(place.parent / name)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", take)
    optimizer = trained(adam())
    fastopt.save(optimizer, place)
    assert taken
    assert_holds(place, optimizer)
    assert names_in(place.parent) == [place.name]


ANOTHER = """
import os, sys, torch, fastopt
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=7)
def fsync(fd, sync=os.fsync):
    os.fsync = sync
    print("writing", flush=True)
    sys.stdin.readline()
    sync(fd)
os.fsync = fsync
fastopt.save(optimizer, sys.argv[1])
"""


@pytest.mark.parametrize("ends", ["as it should", "killed"])
def test_two_processes_save_to_one_path(place, ends):
    other = subprocess.Popen(
        [sys.executable, "-c", ANOTHER, str(place)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout.readline() == "writing\n"
        optimizer = trained(adam())
        fastopt.save(optimizer, place)
        assert_holds(place, optimizer)
        assert len(names_in(place.parent)) == 2  # what the other one is writing
        if ends == "killed":
            other.kill()
            other.wait(AT_LAST)
            fastopt.save(optimizer, place)
            assert_holds(place, optimizer)
        else:
            other.communicate("go on\n", timeout=AT_LAST)
            assert other.returncode == 0
            assert formats.read(place)["param_groups"][0]["lr"] == 7
    assert names_in(place.parent) == [place.name]
