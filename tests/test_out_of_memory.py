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
act = eval("lambda given, path: " + sys.argv[2])
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

def begin():
    optimizer.state.clear()
    for param in params[:1] if "given" in sys.argv[2] or "path" in sys.argv[2] else params:
        optimizer.state[param] = {"m": torch.ones(1 << 18, dtype=torch.bfloat16)}

begin()
path = sys.argv[3] + "/state.pt"
torch.save(saved(), path)
act(saved(), path)  # threads, libraries and slabs are there now
begin()
gc.collect()
failed = 0
for margin in [0, 1, 2, 3, 5, 8, 13, 21, 34]:
    given, before = saved(), digest()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size() + (margin << 20), hard))
    try:
        act(given, path)
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
    begin()
    del given
act(saved(), path)
assert all(s.get("v", torch.full((1,), 2.5)).unique().item() == 2.5 for s in optimizer.state.values())
print(failed)
"""


@pytest.mark.parametrize(
    "action",
    [
        "fastopt.load_state_dict(optimizer, given)",
        "fastopt.load_state_dict(optimizer, given, copy=False)",
        "fastopt.load_state_dict(optimizer, given, policy='keep')",
        "fastopt.load_state_dict(optimizer, given, policy={'m': 'keep', 'v': 'reference'}, audit=True)",
        "fastopt.load_state_dict(optimizer, given, inplace='auto')",
        "fastopt.load_state_dict(optimizer, given, donate=True)",
        "fastopt.load(optimizer, path)",
        "fastopt.load(optimizer, path, inplace='auto')",
        "fastopt.cast_state(optimizer, torch.float64)",
        "fastopt.to_device(optimizer, 'cpu:0')",  # another device to torch, and so a copy
    ],
)
def test_the_optimizer_is_as_it_was(backend: str, action: str, tmp_path: Path) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux to know and to limit the address space")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, action, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no load ran out of memory"
