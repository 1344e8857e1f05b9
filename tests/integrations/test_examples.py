"""The examples that resume, as they stand, on each backend; and that they notice a resume that is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NEEDS = {
    "loop_resume.py": (),
    "lightning_resume.py": ("lightning",),
    "trainer_resume.py": ("transformers", "accelerate"),
}
FORGETS = """
import runpy, sys
import fastopt, torch
sys.path.insert(0, "examples")
fastopt.install = lambda **_: None
fastopt.load = lambda *_, **__: None
torch.optim.Optimizer.load_state_dict = lambda *_: None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def run(name: str, *command: str, backend: str = "native") -> subprocess.CompletedProcess[str]:
    for needed in NEEDS[name]:
        pytest.importorskip(needed)
    return subprocess.run(
        [sys.executable, *command, f"examples/{name}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FASTOPT_BACKEND": backend},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_resumes_to_the_bit(backend, name):
    done = run(name, backend=backend)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("never stopped")


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_notices_a_state_that_was_not_loaded(name):
    done = run(name, "-c", FORGETS)
    assert done.returncode == 1, done.stdout
    assert "should be" in done.stderr
