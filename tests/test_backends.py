"""The choice of backend and CPU target, and that it is never made in silence."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastopt
from fastopt import _C, backends

PACKAGE = Path(fastopt.__file__).parent
REPORT = "import fastopt; print(fastopt.__file__); print(fastopt.backend())"


def run(code: str, where: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own that finds fastopt in that folder, with these variables and no other of fastopt's."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FASTOPT_")}
    # Without `site`, as the finder of an editable install would add its own extension to the package found here.
    paths = {"PYTHONPATH": os.pathsep.join([str(where), sysconfig.get_path("purelib")])}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, cwd=where, env=inherited | paths | variables, capture_output=True, text=True)


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.fixture
def without_extension(tmp_path: Path) -> Path:
    shutil.copytree(PACKAGE, tmp_path / "fastopt", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return tmp_path


@pytest.fixture
def with_broken_extension(without_extension: Path) -> Path:
    name = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    (without_extension / "fastopt" / name).write_bytes(b"no shared object")
    return without_extension


# ---- FASTOPT_BACKEND ----


@pytest.mark.parametrize(
    ("choice", "name", "reason"),
    [
        ("auto", "native", "the extension is there"),
        ("", "native", "the extension is there"),
        ("native", "native", "FASTOPT_BACKEND=native"),
        ("python", "python", "FASTOPT_BACKEND=python"),
    ],
)
def test_choice_by_the_environment(choice: str, name: str, reason: str) -> None:
    done = run(REPORT, PACKAGE.parent, FASTOPT_BACKEND=choice)
    assert f"{name}: {reason}" in output_of(done)
    assert done.stderr == ""


def test_a_nonsensical_choice_is_refused() -> None:
    done = run(REPORT, PACKAGE.parent, FASTOPT_BACKEND="nonsense")
    assert done.returncode != 0
    assert last_line(done.stderr).startswith("ValueError: FASTOPT_BACKEND='nonsense'")
    assert all(choice in last_line(done.stderr) for choice in backends.CHOICES)


def test_use_refuses_nonsense_and_keeps_the_backend(backend: str) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        backends.use("nonsense")
    assert fastopt.backend().name == backend


# ---- FASTOPT_CPU_TARGET ----


@pytest.mark.parametrize("target", _C.cpu_targets())
def test_cpu_target_by_the_environment(target: str) -> None:
    done = run("import fastopt; print(fastopt.backend().cpu_target)", PACKAGE.parent, FASTOPT_CPU_TARGET=target)
    assert output_of(done).strip() == target


def test_without_the_variable_the_best_target_is_used() -> None:
    done = run("import fastopt; print(fastopt.backend().cpu_target)", PACKAGE.parent)
    assert output_of(done).strip() == _C.cpu_targets()[0]


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_a_nonsensical_cpu_target_is_refused(choice: str) -> None:
    done = run(REPORT, PACKAGE.parent, FASTOPT_BACKEND=choice, FASTOPT_CPU_TARGET="nonsense")
    assert done.returncode != 0
    assert last_line(done.stderr).startswith("ValueError")
    assert "'nonsense'" in last_line(done.stderr)
    assert all(target in last_line(done.stderr) for target in _C.cpu_targets())


# ---- an extension that is missing, broken, or another torch's ----


def test_a_missing_extension_is_done_without_but_not_silently(without_extension: Path) -> None:
    done = run(REPORT, without_extension)
    assert str(without_extension) in output_of(done)
    assert "python: the extension was not built" in done.stdout
    assert done.stderr.count("Warning: fastopt runs in pure Python") == 1
    assert backends.HOW_TO_BUILD in done.stderr


def test_a_missing_extension_that_nobody_wants_is_no_news(without_extension: Path) -> None:
    done = run(REPORT, without_extension, FASTOPT_BACKEND="python")
    assert "python: FASTOPT_BACKEND=python" in output_of(done)
    assert done.stderr == ""


def test_a_missing_extension_is_an_error_where_it_was_asked_for(without_extension: Path) -> None:
    done = run(REPORT, without_extension, FASTOPT_BACKEND="native")
    assert done.returncode != 0
    assert last_line(done.stderr).startswith("ImportError: FASTOPT_BACKEND=native, but the extension was not built; ")
    assert backends.HOW_TO_BUILD in last_line(done.stderr)


def test_a_broken_extension_warns(with_broken_extension: Path) -> None:
    done = run(REPORT, with_broken_extension)
    assert "python: the extension does not load: " in output_of(done)
    assert done.stderr.count("Warning: fastopt runs in pure Python") == 1


def test_a_broken_extension_is_an_error_where_it_was_asked_for(with_broken_extension: Path) -> None:
    done = run(REPORT, with_broken_extension, FASTOPT_BACKEND="native")
    assert done.returncode != 0
    assert last_line(done.stderr).startswith("ImportError")
    assert str(with_broken_extension / "fastopt" / "_C") in last_line(done.stderr), "the loader's own text"
    assert "not built" not in done.stderr


def test_a_broken_extension_is_not_touched_where_python_was_asked_for(with_broken_extension: Path) -> None:
    done = run(REPORT, with_broken_extension, FASTOPT_BACKEND="python")
    assert "python: FASTOPT_BACKEND=python" in output_of(done)
    assert done.stderr == ""


@pytest.fixture
def built_for(backend: str) -> Iterator[pytest.MonkeyPatch]:
    """The native backend about to be imported anew; `backend` puts back what was chosen, after this is undone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "fastopt.backends.native", raising=False)
        patch.delattr(backends, "native", raising=False)
        yield patch


@pytest.mark.parametrize("built", ["1.13.1", "2.130.0", "3." + torch.__version__.split(".", 1)[1]])
def test_an_extension_of_another_torch_is_not_used(built_for: pytest.MonkeyPatch, built: str) -> None:
    built_for.setattr(_C, "build_info", lambda: {"torch": built, "compiler": "", "cuda": None})
    with pytest.raises(ImportError, match=re.escape(f"built for torch {built}")) as caught:
        backends.use("native")
    assert torch.__version__ in str(caught.value)
    with pytest.warns(UserWarning, match=re.escape(f"built for torch {built}")):
        backends.use("auto")
    assert fastopt.backend().name == "python"
    assert built in fastopt.backend().reason


def test_an_extension_of_the_same_minor_version_is_used(built_for: pytest.MonkeyPatch) -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    built_for.setattr(_C, "build_info", lambda: {"torch": f"{minor}.99", "compiler": "", "cuda": None})
    backends.use("native")
    assert fastopt.backend().name == "native"


# ---- what is said about it ----


def test_info_says_what_is_in_use(backend: str) -> None:
    info = fastopt.backend()
    assert info.name == backend
    assert info.threads == torch.get_num_threads()
    assert (info.torch, info.torch_cuda) == (torch.__version__, torch.version.cuda)
    expected = (tuple(_C.cpu_targets()), _C.cpu_target()) if backend == "native" else ((), None)
    assert (info.cpu_targets, info.cpu_target) == expected


@pytest.mark.parametrize("choice", ["native", "python"])
def test_info_on_the_command_line(choice: str) -> None:
    command = [sys.executable, "-m", "fastopt", "info"]
    variables = {**os.environ, "FASTOPT_BACKEND": choice, "FASTOPT_CPU_TARGET": "portable", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PACKAGE.parent, env=variables, capture_output=True, text=True)
    lines = {line[:16].strip(): line[16:] for line in output_of(done).splitlines()}
    assert lines["backend"] == f"{choice}: FASTOPT_BACKEND={choice}"
    kernels = f"portable (of {', '.join(_C.cpu_targets())})" if choice == "native" else "torch's own"
    assert lines["CPU kernels"] == kernels
    assert lines["threads"] == "1"
    assert lines["torch"].startswith(torch.__version__)


def test_an_unknown_command_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastopt", "nonsense"], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_importing_and_installing_loads_nothing_heavy() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import fastopt
fastopt.install()
print(torch.cuda.is_initialized(), sorted(name for name in set(sys.modules) - before if not name.startswith("fastopt")))
"""
    initialized, modules = output_of(run(code, PACKAGE.parent)).strip().split(" ", 1)
    assert initialized == "False"
    assert [name for name in ast.literal_eval(modules) if name.startswith(("torch._dynamo", "torch._inductor"))] == []


# ---- the stub ----


def signature_of(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in function.args.args]


def signatures_in(source: str) -> dict[str, list[str]]:
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {function.name: signature_of(function) for function in functions}


def test_the_stub_lists_what_the_binary_has() -> None:
    documented = [value.__doc__ for value in vars(_C).values() if callable(value)]
    binary = signatures_in("\n".join(f"def {doc.splitlines()[0]}: ..." for doc in documented))
    assert signatures_in((PACKAGE / "_C.pyi").read_text()) == binary
    assert set(binary) == {name for name, value in vars(_C).items() if callable(value)}
