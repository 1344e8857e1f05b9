"""The sdist and the wheels, built and installed as users do, each into an environment of its own (`make packages`).

Environments get torch first and pinned, as `FASTOPT_TORCH` says or as it is here: what pip would fetch for an open
range is several GB. Set `FASTOPT_TORCH_INDEX` for another index to take it from.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TORCH = os.environ.get("FASTOPT_TORCH") or torch.__version__.split("+")[0]
INDEX = os.environ.get("FASTOPT_TORCH_INDEX")
PINNED = ("setuptools>=77", "ninja", "wheel")

SMOKE = """
import sys, tempfile, torch, fastopt
from pathlib import Path
assert fastopt.backend().name == sys.argv[1], fastopt.backend()
assert Path(fastopt.__file__).is_relative_to(sys.prefix), fastopt.__file__
def trained(dtype):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(5, 7, dtype=dtype)) for _ in range(3)])
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer
saved, ours, theirs = trained(torch.float32), trained(torch.bfloat16), trained(torch.bfloat16)
theirs.load_state_dict(saved.state_dict())
with tempfile.TemporaryDirectory() as folder:
    for name in ("a.pt", "a.safetensors", "a.dcp"):
        fastopt.save(saved, Path(folder) / name)
        fastopt.load(ours, Path(folder) / name, verify=name != "a.dcp")
        for one, other in zip(ours.state.values(), theirs.state.values(), strict=True):
            for key in other:
                assert one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]), (name, key)
with fastopt.installed():
    ours.load_state_dict(saved.state_dict())
print("smoke test passed")
"""


def run(*command: object, where: Path, **variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTOPT_") and name != "CXX"}
    kept |= {"MAX_JOBS": os.environ.get("MAX_JOBS", "2"), **variables}
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        kept.pop(name, None)
    done = subprocess.run([str(part) for part in command], cwd=where, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Environment:
    """A new one, with torch and nothing of ours."""

    def __init__(self, folder: Path, *packages: str) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        run(sys.executable, "-m", "venv", folder, where=folder.parent)
        self.pip(f"torch=={TORCH}", *(["--index-url", INDEX] if INDEX else []))
        self.pip("safetensors>=0.8", "numpy", *packages)

    def pip(self, *arguments: object, **variables: str) -> None:
        run(self.python, "-m", "pip", "install", "--quiet", *arguments, where=self.folder, **variables)

    def smoke(self, backend: str) -> None:
        out = run(self.python, "-W", "ignore", "-c", SMOKE, backend, where=self.folder)
        assert out.splitlines()[-1] == "smoke test passed"
        listed = run(self.folder / "bin" / "fastopt", "--version", where=self.folder)
        assert listed.strip()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git knows, so that nothing that lies about comes along."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    source.mkdir()
    names = run("git", "ls-files", "-z", where=ROOT).split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    builder = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    out = run(sys.executable, "-W", "ignore", "-c", builder, folder, where=source, FASTOPT_BUILD="none")
    return folder / out.splitlines()[-1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """One for all wheels, each of which replaces the one before."""
    return Environment(tmp_path_factory.mktemp("environment") / "venv", *PINNED)


def wheel_of(environment: Environment, sdist: Path, folder: Path, *options: str, **variables: str) -> Path:
    build = [environment.python, "-m", "pip", "wheel", "--quiet", "--no-deps", *options, "--wheel-dir", folder, sdist]
    run(*build, where=folder, **variables)
    [wheel] = folder.glob("fastopt-*.whl")
    return wheel


def test_the_sdist_has_what_a_build_needs_and_nothing_else(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    known = {name for name in run("git", "ls-files", where=ROOT).splitlines() if name.startswith(("fastopt/", "csrc/"))}
    assert known <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc")) or name.startswith(("build/", "tests/core"))]


@pytest.mark.parametrize("isolated", [False, True], ids=["beside", "isolated"])
@pytest.mark.parametrize("compiler", [True, False], ids=["compiled", "pure"])
def test_a_wheel_installs_and_works(
    sdist: Path, environment: Environment, tmp_path: Path, isolated: bool, compiler: bool
) -> None:
    options = [] if isolated else ["--no-build-isolation"]
    variables = {} if compiler else {"CXX": "a-compiler-that-is-not-there"}
    wheel = wheel_of(environment, sdist, tmp_path, *options, **variables)
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fastopt/py.typed", "fastopt/_C.pyi"} <= set(names)
    assert [name for name in names if name.endswith(".so")] != [] if compiler else "py3-none-any" in wheel.name
    packages = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "fastopt").rglob("__init__.py")}
    assert {f"{package}/__init__.py" for package in packages} <= set(names)
    assert {name.partition("/")[0] for name in names} == {"fastopt", f"fastopt-{wheel.name.split('-')[1]}.dist-info"}
    environment.pip("--no-deps", "--force-reinstall", wheel)
    environment.smoke("native" if compiler else "python")


def test_types_are_found(sdist: Path, environment: Environment, tmp_path: Path) -> None:
    """A type checker of the user's sees the package's own types."""
    environment.pip("--no-deps", "--force-reinstall", wheel_of(environment, sdist, tmp_path, CXX="none"))
    environment.pip("mypy")
    (tmp_path / "user.py").write_text("import fastopt\nreveal_type(fastopt.load_state_dict)\n")
    out = run(environment.python, "-m", "mypy", "--follow-imports=silent", "user.py", where=tmp_path)
    assert "LoadReport" in out
    assert "Any]" not in out.partition("->")[2]
