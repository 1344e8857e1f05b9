"""Memory that ends in the middle of a load, at many places: the optimizer is as it was, and the next load works."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
import copy as copying, gc, resource, sys
import torch, fastopt
from fastopt import backends
from tests.oracle import Bare, fingerprint

backends.use(sys.argv[1])
options = eval(sys.argv[2])
params = [torch.nn.Parameter(torch.zeros(1 << 18, dtype=torch.bfloat16)) for _ in range(48)]
optimizer = Bare(params, lr=1.0)

def saved():
    state = {i: {"m": torch.full((1 << 18,), 1.5), "v": torch.full((1 << 18,), 2.5)} for i in range(len(params))}
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}

def size():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def digest():
    groups = [[key, id(value)] for group in optimizer.param_groups for key, value in group.items()]
    held = [item for state in optimizer.state.values() for item in state.items()]
    tensors = [[key, id(t), t.data_ptr(), t.dtype, t.double().sum().item()] for key, t in held]
    return [id(optimizer.param_groups), groups, id(optimizer.state), tensors]

optimizer.state[params[0]] = {"m": torch.ones(1 << 18, dtype=torch.bfloat16)}
fastopt.load_state_dict(optimizer, saved())  # threads, libraries and slabs are there now
optimizer.state.clear()
optimizer.state[params[0]] = {"m": torch.ones(1 << 18, dtype=torch.bfloat16)}
gc.collect()
failed = 0
for margin in [0, 1, 2, 3, 5, 8, 13, 21, 34]:
    given, before = saved(), digest()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size() + (margin << 20), hard))
    try:
        fastopt.load_state_dict(optimizer, given, **options)
        loaded = True
    except (MemoryError, RuntimeError) as error:
        loaded = False
        text = str(error).lower()
        assert isinstance(error, MemoryError) or "memory" in text or "alloc" in text, error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if not loaded:
        failed += 1
        assert digest() == before, margin
    optimizer.state.clear()
    optimizer.state[params[0]] = {"m": torch.ones(1 << 18, dtype=torch.bfloat16)}
    del given
fastopt.load_state_dict(optimizer, saved(), **options)
assert all(s["v"].unique().item() == 2.5 for s in optimizer.state.values())
print(failed)
"""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"copy": False},
        {"policy": "keep"},
        {"policy": {"m": "keep", "v": "reference"}, "audit": True},
        {"inplace": "auto"},
        {"donate": True},
    ],
    ids=str,
)
def test_the_optimizer_is_as_it_was(backend: str, options: dict[str, object]) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux to know and to limit the address space")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, repr(options)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no load ran out of memory"
