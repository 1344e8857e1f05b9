"""csrc/cuda compiled by nvcc, where it is on the machine; no GPU is needed for that."""

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc_compiles_without_torch_and_warnings(source: Path, tmp_path: Path) -> None:
    devices = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90, 100)]
    command = [NVCC, *nvcc_flags(), *devices, "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def nvcc_flags() -> list[str]:
    """Those of setup.py, which would build if it were run."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "NVCC_FLAGS":
            return ast.literal_eval(statement.value)
    raise AssertionError("setup.py names no NVCC_FLAGS")


def test_there_is_something_to_compile() -> None:
    assert SOURCES
