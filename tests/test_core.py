"""csrc/core, and what needs no CUDA of csrc/cuda, compiled and run without torch and Python, under sanitizers."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "csrc" / "core"
CUDA = ROOT / "csrc" / "cuda"
TESTS = (ROOT / "tests" / "core", ROOT / "tests" / "cuda")
FLAGS = (
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Wconversion",
    "-Werror",
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-pthread",
)


def run(command: list[str], **variables: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize(("sanitizers", "part"), [("address,undefined", ""), ("thread", "threads")])
def test_the_core_alone_under(sanitizers: str, part: str, tmp_path: Path) -> None:
    program = str(tmp_path / "core_test")
    compiler = os.environ.get("CXX", "g++").split()
    sources = [str(path) for folder in (CORE, CUDA, *TESTS) for path in sorted(folder.glob("*.cpp"))]
    checks = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    run([*compiler, *FLAGS, *checks, f"-I{CORE}", f"-I{CUDA}", f"-I{TESTS[0]}", *sources, "-o", program])
    output = run([program, part], UBSAN_OPTIONS="print_stacktrace=1", TSAN_OPTIONS="halt_on_error=1")
    passed = [line.split()[1] for line in output.splitlines() if line.startswith("ok ")]
    expected = [name for name in declared_tests() if part in name]
    assert expected
    assert passed == expected


def declared_tests() -> list[str]:
    code = "".join(
        path.read_text() for path in sorted((p for f in TESTS for p in f.glob("*.cpp")), key=lambda path: path.name)
    )
    return re.findall(r"^void (test_\w+)\(", code, flags=re.MULTILINE)
