"""The command line."""

import collections.abc
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import fastopt
from fastopt import cli
from fastopt.cli import main, progress
from fastopt.cli.progress import Progress
from fastopt.files import formats
from tests import dcp
from tests.oracle import adam, trained

ROOT = Path(__file__).parent.parent
FLOAT64 = numpy.dtypes.Float64DType
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def files(tmp_path):
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(trained(adam()).state_dict(), first)
    torch.save({"optimizer": trained(adam(), seed=1).state_dict(), "epoch": 1}, second)
    return str(first), str(second)


def strict(text):
    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def run(arguments, code="", **options):
    """The command line in a process of its own, after some code."""
    program = f"import sys; from fastopt.cli import main\n{code}\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )


def one_line(error):
    """The text of an error, which is one line."""
    assert error.startswith("fastopt: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    return error


def test_info(capsys):
    assert main(["info"]) == 0
    assert "backend" in capsys.readouterr().out


# ---- inspect and diff ----


def test_inspect(files, capsys):
    assert main(["inspect", files[0], "--values"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 parameters in 2 groups")
    assert "exp_avg_sq" in out
    assert "3x4, 5 and 1 more" in out
    assert main(["inspect", files[1], "--key", "optimizer", "--values", "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["keys"]["exp_avg"]["tensors"] == 3
    assert found["keys"]["exp_avg"]["range"]["nan"] == 0
    assert found["keys"]["exp_avg"]["shapes"] == [{"shape": shape, "tensors": 1} for shape in ([3, 4], [5], [])]


def test_json_is_strict(tmp_path, capsys):
    path = tmp_path / "a.pt"
    state = {0: {"m": torch.tensor([float("nan")])}}
    torch.save(
        {"state": state, "param_groups": [{"params": [0], "lr": torch.tensor(1.0), "limit": float("inf")}]}, path
    )
    assert main(["inspect", str(path), "--values", "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found["groups"][0]["hyperparameters"] == {"lr": "tensor(1.)", "limit": "inf"}
    assert found["keys"]["m"]["range"]["minimum"] == "inf"


def test_diff(files, tmp_path, capsys):
    assert main(["diff", files[0], files[0]]) == 0
    assert capsys.readouterr().out == "no difference, 9 tensors compared\n"
    other = tmp_path / "c.pt"
    torch.save(torch.load(files[1], weights_only=True)["optimizer"], other)
    assert main(["diff", files[0], str(other)]) == 1
    assert "exp_avg" in capsys.readouterr().out
    assert main(["diff", files[0], str(other), "--json"]) == 1
    assert strict(capsys.readouterr().out)["keys"]["step"]["different"] == 0
    assert main(["diff", str(other), files[1], "--key-b", "optimizer"]) == 0
    assert main(["diff", files[1], str(other), "--key", "optimizer", "--key-b", ""]) == 0
    assert main(["diff", files[1], files[1], "--key", "optimizer"]) == 0


# ---- convert ----


def saved_adam(path, **options):
    """A checkpoint with the state of an Adam in it, and that optimizer."""
    optimizer = trained(adam(dtype=F32, **options))
    torch.save({"model": {"w": torch.zeros(3)}, "train": {"optimizer": optimizer.state_dict()}}, path)
    return optimizer


@pytest.mark.parametrize("names", [("b.pt", "c.safetensors"), ("b.safetensors", "c.dcp"), ("b.dcp", "c.pt")])
def test_convert_to_every_format_and_on(tmp_path, names, capsys):
    optimizer = saved_adam(tmp_path / "a.pt")
    first, second = (tmp_path / name for name in names)
    assert main(["convert", str(tmp_path / "a.pt"), str(first), "--key", "train.optimizer"]) == 0
    assert capsys.readouterr().out.startswith("saved 9 tensors in ")
    assert main(["convert", str(first), str(second), "--json"]) == 0
    report = strict(capsys.readouterr().out)
    assert (report["path"], report["tensors"]) == (str(second), 9)
    assert report["bytes_written"] == formats.size_of(second)
    for path in (first, second):
        assert formats.format_of(path) == formats.format_for(path)
        loaded = adam()
        fastopt.load(loaded, path, verify=True)
        assert not fastopt.diff(loaded, optimizer)


@pytest.mark.parametrize("name", ["b.pt", "b.safetensors"])
def test_convert_casts_as_a_save_does(tmp_path, name, capsys):
    optimizer = saved_adam(tmp_path / "a.pt", amsgrad=True)
    source, target, expected = tmp_path / "a.pt", tmp_path / name, tmp_path / f"expected-{name}"
    casts = ["--dtype", "float16", "--dtype", "exp_avg=bfloat16", "--dtype", "max_*=keep", "--dtype", "nothing=float16"]
    assert main(["convert", str(source), str(target), "--key", "train.optimizer", *casts]) == 0
    dtypes = {"exp_avg": BF16, "max_*": "keep", "nothing": F16, "*": F16}
    fastopt.save(optimizer, expected, dtype=dtypes)
    assert not fastopt.diff(formats.read(target, verify=True), formats.read(expected))
    dtypes_by_key = {key: set(seen.dtypes) for key, seen in fastopt.summary(formats.read(target)).keys.items()}
    assert dtypes_by_key == {"step": {F32}, "exp_avg": {BF16}, "exp_avg_sq": {F16}, "max_exp_avg_sq": {F32}}
    out = capsys.readouterr().out
    assert "cast 3 from float32 to bfloat16" in out
    assert "cast 3 from float32 to float16" in out
    assert "no key of the state fits 'nothing'" in out


def test_convert_casts_step_only_if_it_is_named(tmp_path):
    saved_adam(tmp_path / "a.pt")
    arguments = ["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--key", "train.optimizer"]
    assert main([*arguments, "--dtype", "*=bfloat16", "--dtype", "step=float64"]) == 0
    found = fastopt.summary(formats.read(tmp_path / "b.pt"))
    assert set(found.keys["step"].dtypes) == {torch.float64}


def test_convert_casts_nested_state_and_leaves_other(tmp_path):
    state = {
        0: {
            "history": [torch.ones(3), (torch.ones(2), 1.5)],
            "deep": {"step": torch.ones(1)},
            "codes": torch.arange(3),
        },
        "shared": {"scale": torch.ones(1)},
        1: {},
    }
    content = {"state": state, "param_groups": [{"params": [0, 1], "lr": torch.tensor(0.1)}], "extra": torch.ones(2)}
    torch.save(content, tmp_path / "a.pt")
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), "--dtype", "bfloat16"]) == 0
    found = torch.load(tmp_path / "b.pt", weights_only=True)
    one, (two, number) = found["state"][0]["history"]
    assert (one.dtype, two.dtype, number) == (BF16, BF16, 1.5)
    assert found["state"][0]["deep"]["step"].dtype == F32
    assert found["state"][0]["codes"].dtype == torch.int64
    assert found["state"]["shared"]["scale"].dtype == BF16
    assert list(found["state"]) == [0, "shared", 1]
    assert found["param_groups"][0]["lr"].dtype == found["extra"].dtype == F32


def test_convert_replaces_nothing_unless_told_to(files, tmp_path, capsys):
    old = Path(files[1]).read_bytes()
    assert main(["convert", files[0], files[1]]) == 2
    assert "b.pt is there already; --force replaces it" in one_line(capsys.readouterr().err)
    assert Path(files[1]).read_bytes() == old
    assert main(["convert", files[0], files[1], "--force"]) == 0
    assert main(["diff", files[0], files[1]]) == 0
    assert main(["convert", files[0], files[0], "--force", "--dtype", "bfloat16"]) == 0  # over its own source
    assert main(["verify", files[0]]) == 0
    dangling = tmp_path / "link.pt"
    dangling.symlink_to("nowhere.pt")
    assert main(["convert", files[0], str(dangling)]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "int9"], "'int9' is no dtype of torch"),
        (["--dtype", "exp_avg=Tensor"], "'Tensor' is no dtype of torch"),
        (["--dtype", "exp_avg="], "'' is no dtype of torch"),
        (["--dtype", "int8"], "int8 is no floating dtype"),
        (["--dtype", "reference"], "'reference' is no dtype of torch"),
        (["--safe-global", "nowhere.Class"], "cannot import 'nowhere.Class': No module named 'nowhere'"),
        (["--safe-global", "math.pi"], "'math.pi' is no class or function"),
        (["--key", "model"], "has no state dict at 'model'"),
    ],
)
def test_convert_refuses(files, tmp_path, arguments, said, capsys):
    target = tmp_path / "c.pt"
    try:
        code = main(["convert", files[0], str(target), *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert said in one_line(capsys.readouterr().err)
    assert not target.exists()


def test_a_source_that_is_missing_is_told_first(files, tmp_path, capsys):
    assert main(["convert", str(tmp_path / "nowhere.pt"), files[0]]) == 2
    assert one_line(capsys.readouterr().err).endswith(f"No such file or directory: '{tmp_path / 'nowhere.pt'}'\n")


def flip_a_bit(path, value):
    """Of the data of a tensor, in a file or in one of a folder."""
    for file in [path] if path.is_file() else path.glob("*.distcp"):
        data = bytearray(file.read_bytes())
        data[data.index(value.numpy().tobytes())] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.dcp"])
@pytest.mark.parametrize("target", ["b.pt", "b.safetensors", "b.dcp"])
def test_damage_is_not_converted(tmp_path, name, target, capsys):
    """Into a file whose checksums would match."""
    optimizer = trained(adam())
    for path in (name, target):
        fastopt.save(optimizer, tmp_path / path)
    flip_a_bit(tmp_path / name, optimizer.state_dict()["state"][0]["exp_avg"])
    assert main(["convert", str(tmp_path / name), str(tmp_path / target), "--force"]) == 2
    error = one_line(capsys.readouterr().err)
    assert "state.0.exp_avg" in error
    assert "checksum" in error
    loaded = adam()
    fastopt.load(loaded, tmp_path / target, verify=True)
    assert not fastopt.diff(loaded, optimizer)
    assert main(["convert", str(tmp_path / name), str(tmp_path / f"new-{target}")]) == 2
    assert sorted(os.listdir(tmp_path)) == sorted([name, target])


def test_convert_says_of_missing_checksums_if_it_is_asked(tmp_path, capsys):
    optimizer = trained(adam())
    torch.save(optimizer.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert main(["convert", str(tmp_path / "old.pt"), str(tmp_path / "a.pt")]) == 0
    assert "checksum" not in capsys.readouterr().out
    for source, target, expected in (("old.pt", "b.pt", False), ("a.pt", "c.pt", True)):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), "--json"]) == 0
        assert strict(capsys.readouterr().out)["checksums"] is expected


def test_convert_leaves_nothing_behind_where_it_fails(tmp_path, capsys):
    path = tmp_path / "a.pt"
    torch.save({"state": {0: {"m": torch.ones(1).to_sparse()}}, "param_groups": [{"params": [0]}]}, path)
    assert main(["convert", str(path), str(tmp_path / "b.safetensors")]) == 2
    assert f"while converting {path}" in one_line(capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["a.pt"]


# ---- verify ----


@pytest.mark.parametrize("name", ["b.pt", "b.safetensors", "b.dcp"])
def test_verify_a_sound_file(tmp_path, name, capsys):
    fastopt.save(trained(adam()), tmp_path / name)
    assert main(["verify", str(tmp_path / name)]) == 0
    assert (
        capsys.readouterr().out == f"{tmp_path / name} is sound: 9 tensors, 156 B, all values finite, checksums match\n"
    )
    assert main(["verify", str(tmp_path / name), "--json"]) == 0
    assert strict(capsys.readouterr().out) == {
        "file": str(tmp_path / name),
        "sound": True,
        "tensors": 9,
        "bytes": 156,
        "checksums": True,
        "flaws": [],
    }


def test_verify_says_where_there_are_no_checksums(tmp_path, capsys):
    torch.save(trained(adam()).state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert main(["verify", str(tmp_path / "old.pt")]) == 0
    assert "all values finite, the file has no checksums" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "old.pt"), "--json"]) == 0
    assert strict(capsys.readouterr().out)["checksums"] is False


@pytest.mark.parametrize("name", ["b.pt", "b.safetensors"])
def test_verify_a_damaged_file(tmp_path, name, capsys):
    path = tmp_path / name
    fastopt.save(trained(adam((100, 100))), path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for damaged in (
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        whole[:middle],
        whole[: len(whole) - 1],
        b"",
        b"no checkpoint",
    ):
        path.write_bytes(damaged)
        assert main(["verify", str(path)]) == 1
        first, second = capsys.readouterr().out.splitlines()
        assert first == f"{path} has 1 flaw"
        assert second.startswith("  damage: ")
        assert str(path) in second
        assert main(["verify", str(path), "--json"]) == 1
        found = strict(capsys.readouterr().out)
        assert (found["sound"], found["flaws"][0]["kind"]) == (False, "damage")


def test_verify_lists_all_flaws(tmp_path, capsys):
    nan, inf = float("nan"), float("inf")
    state = {0: {"m": torch.tensor([nan, 1.0, inf])}, 1: {"m": torch.ones(3)}, 7: {"m": torch.tensor([nan])}}
    groups = [{"params": [0, 1, 1], "lr": nan}, {"lr": 1}]
    torch.save({"state": state, "param_groups": groups}, tmp_path / "a.pt")
    assert main(["verify", str(tmp_path / "a.pt")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'a.pt'} has 6 flaws",
        "  structure: param group 1 has no list 'params'",
        "  structure: saved id 1 stands twice in the groups",
        "  values: 'lr' of param group 0 is nan",
        "  structure: state under id 7, which stands in no group",
        "  values: id 0, m: float32 [3] on cpu holds 1 NaN and 1 inf",
        "  values: id 7, m: float32 [1] on cpu holds 1 NaN",
    ]


def test_verify_prints_some_of_very_many_flaws(tmp_path, capsys):
    state = {i: {"m": torch.tensor([float("nan")])} for i in range(50)}
    torch.save({"state": state, "param_groups": [{"params": list(range(50))}]}, tmp_path / "a.pt")
    assert main(["verify", str(tmp_path / "a.pt")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("has 50 flaws")
    assert lines[-1] == "  and 30 more"
    assert len(lines) == 22
    assert main(["verify", str(tmp_path / "a.pt"), "--json"]) == 1
    assert len(strict(capsys.readouterr().out)["flaws"]) == 50


@pytest.mark.parametrize("content", [{"state": [], "param_groups": []}, {"state": {}, "param_groups": 3}])
def test_verify_a_state_dict_that_is_none(tmp_path, content, capsys):
    torch.save(content, tmp_path / "a.pt")
    assert main(["verify", str(tmp_path / "a.pt")]) == 1
    assert "  structure: " in capsys.readouterr().out


class Evil:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


def test_verify_runs_no_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": {}, "param_groups": [], "evil": Evil()}, "a.pt")
    assert main(["verify", "a.pt"]) == 2
    assert "exec" in one_line(capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["a.pt"]


# ---- what a file names ----


def with_numbers_of_numpy(path, kind="zip"):
    content = trained(adam()).state_dict()
    content["param_groups"][0]["lr"] = numpy.float64(0.25)
    if kind == "dcp":
        dcp.torch_save(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", ["zip", "legacy", "dcp"])
@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "convert"])
def test_a_file_that_names_others_says_what_to_pass_and_that_works(tmp_path, command, kind, capsys):
    path = tmp_path / "a"
    with_numbers_of_numpy(path, kind)
    targets = {"diff": [str(path)], "convert": [str(tmp_path / "b.pt")]}
    arguments = [command, str(path), *targets.get(command, [])]
    assert main(arguments) == 2
    error = one_line(capsys.readouterr().err)
    assert "safe_globals" not in error
    assert "damaged" not in error
    advice = re.search(r"if you trust them, pass (--safe-global .*)\n", error)[1].split(" ")
    assert advice[1::2] == ["numpy._core.multiarray.scalar", "numpy.dtype", "numpy.dtypes.Float64DType"]
    assert main([*arguments, *advice]) == 0
    if command == "convert":
        loaded = adam()
        fastopt.load(loaded, tmp_path / "b.pt", safe_globals=[numpy._core.multiarray.scalar, numpy.dtype, FLOAT64])
        assert type(loaded.param_groups[0]["lr"]) is numpy.float64


def test_a_class_goes_by_the_name_that_is_in_the_file():
    """As one that has moved since is imported from where it was, and is at home elsewhere."""
    assert cli.sources.imported("os.path.join") == (os.path.join, "os.path.join")
    assert cli.sources.imported("collections.abc.Mapping") == (collections.abc.Mapping, "collections.abc.Mapping")


# ---- errors ----


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nowhere.pt"],
        ["diff", "nowhere.pt", "nowhere.pt"],
        ["verify", "nowhere.pt"],
        ["convert", "nowhere.pt", "b.pt"],
        ["bench", "--folder", "nowhere.pt"],
    ],
)
def test_an_error_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert "nowhere.pt" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["inspect"], ["diff", "a"], ["bench", "--rounds", "0"]])
def test_so_is_one_of_the_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "--help" in one_line(capsys.readouterr().err)


def test_a_checkpoint_without_a_key_says_where_the_state_is(files, capsys):
    for command in ("inspect", "verify"):
        assert main([command, files[1]]) == 2
        assert capsys.readouterr().err.endswith("is no state dict; pass --key optimizer\n")
    assert main(["diff", files[0], files[1]]) == 2
    assert capsys.readouterr().err.endswith("is no state dict; pass --key-b optimizer\n")
    assert main(["inspect", files[1], "--key", "nowhere"]) == 2
    assert capsys.readouterr().err.endswith("has no state dict at 'nowhere'; pass --key optimizer\n")


def test_notes_are_sentences_of_their_own():
    error = ValueError("one thing")
    error.add_note("another\nthing")
    error.add_note("and more")
    assert cli.in_a_line(error) == "one thing; another thing; and more"
    assert cli.in_a_line(KeyError("state")) == "state"
    assert cli.in_a_line(MemoryError()) == "MemoryError"


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fastopt {fastopt.__version__}\n"


def test_a_file_that_is_none_is_an_error_of_one_line(tmp_path, capsys):
    path = tmp_path / "text.pt"
    path.write_text("no checkpoint")
    assert main(["inspect", str(path)]) == 2
    assert "text.pt" in one_line(capsys.readouterr().err)


def test_an_interruption_is_said_and_has_the_shells_exit_code(files, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "read", interrupt)
    assert main(["inspect", files[0]]) == 130
    assert capsys.readouterr().err == "fastopt: interrupted\n"


SIGNAL_IN_IMPORT = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
SIGNAL_IN_RUN = """
import os, signal, sys, time
sys.path.remove(os.path.dirname(__file__))
del sys.modules["torch"]
import torch
sys.modules["torch"] = torch
torch.interrupted = lambda *_: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))
import fastopt.backends
fastopt.backends.BackendInfo.__str__ = torch.interrupted
"""
SCRIPT = "import sys; from fastopt.cli import command; sys.exit(command())"


@pytest.mark.parametrize("moment", [SIGNAL_IN_IMPORT, SIGNAL_IN_RUN], ids=["import", "run"])
@pytest.mark.parametrize("way", ["module", "script"])
def test_an_interruption_at_any_time_has_no_traceback(tmp_path, moment, way):
    """While torch is imported as well, which here is a torch that interrupts."""
    (tmp_path / "torch.py").write_text(moment)
    script = tmp_path / "bin" / "fastopt"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, *(["-m", "fastopt"] if way == "module" else [script]), "info"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fastopt: interrupted\n")


def test_importing_the_package_leaves_ctrl_c_alone(tmp_path):
    code = "import signal, fastopt; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n"


# ---- pipes and terminals ----


def test_a_reader_that_has_enough_is_no_error(files):
    process = run(["diff", files[0], files[1], "--key-b", "optimizer"], "sys.stdin.readline()", stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_results_that_cannot_be_written_are_an_error(files):
    with open("/dev/full", "w") as full, run(["inspect", files[0]], stdout=full) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "No space left" in one_line(error)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_what_is_done(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0)
    terminal = Terminal()
    with Progress(4_000_000, terminal) as bar:
        for _ in range(2):
            bar.advance(1_000_000)
    pictures = terminal.getvalue().split(progress.CLEAR)
    assert [re.sub(r", [^,]*/s, .* left$", "", picture) for picture in pictures] == [
        "",
        "[######                  ]  25%  1 MB of 4 MB",
        "[############            ]  50%  2 MB of 4 MB",
        "",
    ]
    assert bar.line(4.0) == "[############            ]  50%  2 MB of 4 MB, 500 kB/s, 4 s left"


def test_no_bar_for_what_is_quick_or_in_a_pipe(monkeypatch):
    terminal = Terminal()
    with Progress(10, terminal) as bar:
        bar.advance(5)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "SECONDS", 0)
    pipe = io.StringIO()
    with Progress(10, pipe) as bar:
        bar.advance(5)
    assert pipe.getvalue() == ""


COMMANDS = [["inspect", "--values"], ["verify"], ["diff"]]


def big_state(path):
    """A state that is looked at in several portions, and its bytes."""
    state = {i: {"m": torch.ones(1 << 21), "n": torch.ones(10)} for i in range(3)}
    torch.save({"state": state, "param_groups": [{"params": [0, 1, 2]}]}, path)
    return sum(tensor.nbytes for entry in state.values() for tensor in entry.values())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_all_bytes_are_told_once(tmp_path, command, monkeypatch):
    path, told = tmp_path / "a.pt", []
    size = big_state(path) * (2 if command == ["diff"] else 1)
    monkeypatch.setattr(Progress, "__exit__", lambda bar, *_: told.append((bar.total, bar.done)))
    assert main([*command, str(path), *([str(path)] if command == ["diff"] else [])]) == 0
    assert told == [(size, size)]


def test_a_bar_on_a_terminal_and_results_in_a_pipe(tmp_path):
    path = tmp_path / "a.pt"
    big_state(path)
    ours, theirs = pty.openpty()
    with run(["verify", path], "from fastopt.cli import progress; progress.SECONDS = 0", stderr=theirs) as process:
        out, _ = process.communicate(timeout=60)
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert process.returncode == 0
    assert out == f"{path} is sound: 6 tensors, 25.2 MB, all values finite, checksums match\n"
    assert "100%  25.2 MB of 25.2 MB" in seen
    assert seen.endswith(progress.CLEAR)


# ---- bench ----


def test_bench(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(cli.bench.WAYS, "torch.load(mmap=True), load_state_dict")  # each takes seconds to start
    assert main(["bench", "--megabytes", "1", "--rounds", "2", "--folder", str(tmp_path), "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert list(found["ways"]) == list(cli.bench.WAYS)
    for way in found["ways"].values():
        assert len(way["seconds"]) == 2
        assert all(0 < seconds < 60 for seconds in way["seconds"])
    assert 2 * 4 * found["parameters"] * found["elements"] == 10**6
    assert 10**6 < found["file_bytes"] < 1.01 * 10**6
    assert os.listdir(tmp_path) == []
    text = cli.bench.table((found["parameters"], found["elements"]), found["file_bytes"], found["ways"])
    assert [line.split("  ")[1] for line in text.splitlines()[2:4]] == list(cli.bench.WAYS)
    assert "times as fast as torch.load, load_state_dict" in text


def test_bench_notices_values_that_differ(monkeypatch, capsys):
    answers = iter([{}, *({"seconds": [1.0], "memory": None, "fingerprint": value} for value in (1, 1, 2))])
    monkeypatch.setattr(cli.bench, "in_a_process", lambda *_: next(answers))
    monkeypatch.setattr(cli.bench.os.path, "getsize", lambda _: 1)
    assert main(["bench"]) == 2
    assert "different values" in one_line(capsys.readouterr().err)


def test_a_way_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"fastopt\.load: .*nowhere\.pt"):
        cli.bench.in_a_process("fastopt.load", str(tmp_path / "nowhere.pt"), (1, 1), 1)


# ---- large files ----

MEMORY = """
import sys, threading
from fastopt.cli import bench, main
for arguments in (["inspect", "--values"], ["verify"], ["diff", sys.argv[1]],
                  ["convert", "--dtype", "bfloat16", "--force"], ["convert", "--force"]):
    targets = [sys.argv[2]] if arguments[0] == "convert" else []
    with bench.watched_memory() as seen:
        code = main([*arguments, sys.argv[1], *targets])
    assert code == 0, arguments
    print("most", arguments[0], max(seen))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to know the memory of a process")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_no_command_holds_a_file_in_memory(tmp_path, suffix, backend):
    path = tmp_path / f"a{suffix}"
    optimizer = torch.optim.SGD([torch.zeros(1 << 25) for _ in range(4)], lr=1, momentum=0.9)
    for param in optimizer.param_groups[0]["params"]:
        optimizer.state[param] = {"momentum_buffer": torch.ones(1 << 25)}
    fastopt.save(optimizer, path)
    assert path.stat().st_size > 500 << 20
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), str(tmp_path / f"b{suffix}")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "FASTOPT_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    most = {name: int(count) for name, count in re.findall(r"^most (\w+) (\d+)$", done.stdout, re.MULTILINE)}
    assert list(most) == ["inspect", "verify", "diff", "convert"]
    assert max(most.values()) < 200 << 20, most


def test_a_file_larger_than_memory_is_looked_at(tmp_path, capsys, backend):
    if backend == "python":
        pytest.skip("torch's own mapping of a file wants memory for all of it")
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this system maps no more than there is memory")
    count = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    hole = tmp_path / "hole"
    hole.touch()
    os.truncate(hole, count)
    tensor = torch.empty(0).set_(torch.UntypedStorage.from_file(str(hole), True, count))
    try:
        with torch.serialization.skip_data():
            torch.save({"state": {0: {"m": tensor}}, "param_groups": [{"params": [0]}]}, tmp_path / "a.pt")
    except OSError as error:
        pytest.skip(f"no file can be that long here: {error}")
    hole.unlink()
    assert main(["inspect", str(tmp_path / "a.pt"), "--json"]) == 0
    assert strict(capsys.readouterr().out)["bytes"] == count
