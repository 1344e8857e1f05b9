"""fastopt.copy_ and fastopt.to under modes, default devices and vmap, on both backends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from tests.batches import assert_to_as_torch, images, values


class Record(TorchDispatchMode):
    """Names of the operations that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations_of(call: Callable[[], Any]) -> list[str]:
    with Record() as record:
        call()
    return record.operations


def test_a_dispatch_mode_sees_what_torch_would_show_it(backend: str) -> None:
    sources, dsts = [images(), values((3,), torch.int64)], [images().double(), values((3,), torch.float32)]
    shown = operations_of(lambda: [source.to(torch.bfloat16) for source in sources])
    assert operations_of(lambda: fastopt.to(sources, dtype=torch.bfloat16)) == shown
    shown = operations_of(lambda: [dst.copy_(src) for dst, src in zip(dsts, sources, strict=True)])
    assert [op for op in operations_of(lambda: fastopt.copy_(dsts, sources)) if op == "copy_"] == shown


@pytest.mark.parametrize("default", ["meta", "cpu"])
def test_the_default_device_has_no_say(backend: str, default: str) -> None:
    source, dst = images(), torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)
    with torch.device(default):
        assert_to_as_torch([source], dtype=torch.bfloat16)
        fastopt.copy_([dst], [source])
    assert torch.equal(dst, source.to(torch.bfloat16))


def test_vmap_sees_its_own_tensors(backend: str) -> None:
    batch = values((4, 3), torch.float32)
    result = torch.vmap(lambda row: fastopt.to([row], dtype=torch.float64)[0] * 2)(batch)
    assert torch.equal(result, batch.double() * 2)
