"""Builds with and without what an extension needs: loud where one was asked for, one clear warning where not."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "fastopt", "csrc")
# What setup.py decides, it decides before it looks at the command.
EVALUATE = [sys.executable, "setup.py", "--quiet", "--name"]
WITHOUT_CUDA = "import torch, runpy, sys; torch.version.cuda = None; sys.argv = ['setup.py', '--name']; "
LOAD = """
import torch, fastopt
print(fastopt.backend().name, "|", fastopt.backend().reason, "|", fastopt.__file__)
params = [torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]
optimizer = torch.optim.SGD(params, momentum=0.9)
saved = {"state": {0: {"momentum_buffer": torch.arange(3.0)}}, "param_groups": optimizer.state_dict()["param_groups"]}
fastopt.load_state_dict(optimizer, saved)
print(optimizer.state[params[0]]["momentum_buffer"])
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a build needs, nothing built in it."""
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", ".*")
    copy = tmp_path / "source"
    copy.mkdir()
    for part in (ROOT / name for name in PARTS):
        if part.is_dir():
            shutil.copytree(part, copy / part.name, ignore=ignore)
        elif part.exists():
            shutil.copy(part, copy)
    return copy


def run(command: list[str], where: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FASTOPT_") and key != "CXX"}
    return subprocess.run(command, cwd=where, env=kept | variables, capture_output=True, text=True)


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "variables", [{"CXX": "a-compiler-that-is-not-there"}, {"PATH": ""}], ids=["CXX that is not there", "empty PATH"]
)
def test_a_cpu_build_without_a_compiler_fails(source: Path, variables: dict[str, str]) -> None:
    done = run(EVALUATE, source, FASTOPT_BUILD="cpu", **variables)
    assert done.returncode != 0
    assert last_line(done.stderr).startswith("fastopt: FASTOPT_BUILD=cpu: no C++ compiler: ")
    assert variables.get("CXX", "c++") in last_line(done.stderr)


def test_a_cuda_build_without_a_cuda_torch_fails(source: Path) -> None:
    code = f"{WITHOUT_CUDA} runpy.run_path('setup.py')"
    done = run([sys.executable, "-c", code], source, FASTOPT_BUILD="cuda")
    assert done.returncode != 0
    assert last_line(done.stderr).startswith("fastopt: FASTOPT_BUILD=cuda: no CUDA build: torch.version.cuda is None")


def test_a_nonsensical_choice_fails(source: Path) -> None:
    done = run(EVALUATE, source, FASTOPT_BUILD="nonsense")
    assert done.returncode != 0
    assert last_line(done.stderr) == "fastopt: FASTOPT_BUILD='nonsense' is none of auto, cpu, cuda, none"


def test_an_empty_choice_is_none_at_all(source: Path) -> None:
    done = run(EVALUATE, source, FASTOPT_BUILD="", CXX="a-compiler-that-is-not-there")
    assert done.returncode == 0, done.stderr
    assert "building the pure-Python package" in done.stderr


def test_a_build_without_a_compiler_gives_the_package_in_pure_python(source: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    wheels, site, elsewhere = tmp_path / "wheels", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()

    build = [*pip, "wheel", "-v", "--no-build-isolation", *offline, "--wheel-dir", str(wheels), str(source)]
    built = run(build, elsewhere, CXX="a-compiler-that-is-not-there")
    assert built.returncode == 0, built.stdout + built.stderr
    warning = "UserWarning: fastopt: building the pure-Python package"
    warned = {line.partition(":")[2] for line in built.stderr.splitlines() if warning in line}
    assert len(warned) == 1, built.stderr
    assert all("a-compiler-that-is-not-there" in line for line in warned)
    [wheel] = wheels.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")

    installed = run([*pip, "install", *offline, "--target", str(site), str(wheel)], elsewhere)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert (site / "fastopt" / "py.typed").exists()

    # Without `site`, as the finder of an editable install would add its own extension to the package found here.
    paths = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    loaded = run([sys.executable, "-S", "-c", LOAD], elsewhere, PYTHONPATH=paths)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stderr.count("Warning: fastopt runs in pure Python") == 1
    choice, state = loaded.stdout.splitlines()
    assert choice.split(" | ")[:2] == ["python", "the extension was not built"]
    assert choice.endswith(str(site / "fastopt" / "__init__.py"))
    assert state == "tensor([0., 1., 2.], dtype=torch.bfloat16)"
