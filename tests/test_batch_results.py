"""What fastopt.to returns: an ordinary tensor."""

import copy
import gc
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import fastopt
from tests.batches import values

LARGE = 3 << 20  # elements of a result that gets memory of its own


@pytest.fixture(params=[5, 1000, LARGE], ids=["tiny", "small", "large"])
def result(request: pytest.FixtureRequest, backend: str) -> torch.Tensor:
    [cast] = fastopt.to([values((request.param,), torch.bfloat16)], dtype=torch.float32)
    return cast


def test_result_has_a_storage_of_its_own_size(result: torch.Tensor) -> None:
    assert result.untyped_storage().nbytes() == result.nbytes
    assert result.data_ptr() == result.untyped_storage().data_ptr()
    assert result.data_ptr() % torch.empty(result.shape).element_size() == 0
    assert result.data_ptr() % 64 == 0
    assert result.untyped_storage().resizable()


def test_result_can_be_saved_and_loaded(result: torch.Tensor) -> None:
    file = io.BytesIO()
    torch.save({"a": result, "b": result[1:]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded["a"], result)
    assert loaded["b"].data_ptr() == loaded["a"].data_ptr() + result.element_size()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)), torch.clone])
def test_result_can_be_duplicated(result: torch.Tensor, duplicate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert torch.equal(duplicate(result), result)


def test_result_can_be_shared_between_processes(result: torch.Tensor) -> None:
    before = result.clone()
    assert not result.is_shared()
    result.share_memory_()
    assert result.is_shared()
    assert torch.equal(result, before)


def test_result_can_grow_and_shrink(result: torch.Tensor) -> None:
    before = result.clone()
    result.resize_(2 * LARGE)
    assert torch.equal(result[: before.numel()], before)
    result.fill_(1)
    result.resize_(3)
    result.untyped_storage().resize_(3 * result.element_size())
    assert result.tolist() == [1, 1, 1]
    result.untyped_storage().resize_(0)
    assert result.untyped_storage().nbytes() == 0


def test_result_and_its_numpy_array_are_one_memory(result: torch.Tensor) -> None:
    array = result.numpy()
    array[0] = 77
    assert result[0].item() == 77
    expected = result.clone()
    del result
    assert array.tobytes() == expected.numpy().tobytes()


def test_result_outlives_its_siblings(backend: str) -> None:
    sources = [values((n,), torch.float32, seed=n) for n in (10, 1000, LARGE, 3)]
    for survivor in range(len(sources)):
        kept = fastopt.to(sources, dtype=torch.float64)[survivor]
        fastopt.to(sources, dtype=torch.float16)
        assert torch.equal(kept, sources[survivor].to(torch.float64))


def test_result_can_be_trained(result: torch.Tensor) -> None:
    param = torch.nn.Parameter(result)
    param.square().sum().backward()
    assert torch.equal(param.grad, 2 * param.detach())
    result.add_(1)
    assert result._version == 1


def test_storage_outlives_its_tensor(backend: str) -> None:
    results = fastopt.to([values((size,), torch.bfloat16) for size in range(1, 200)], dtype=torch.float32)
    before = [result.clone() for result in results]
    storages = [result.untyped_storage() for result in results]
    views = [result[:1] for result in results]
    del results
    gc.collect()
    fastopt.to([values((size,), torch.bfloat16, seed=7) for size in range(1, 200)], dtype=torch.float32)
    for storage, view, kept in zip(storages, views, before, strict=True):
        assert view.data_ptr() == storage.data_ptr()
        assert torch.equal(torch.empty(0).set_(storage), kept)


def test_results_can_trade_places_with_other_tensors(result: torch.Tensor) -> None:
    other = torch.arange(3.0)
    before = result.clone()
    torch.utils.swap_tensors(result, other)
    assert torch.equal(other, before)
    assert result.tolist() == [0, 1, 2]
    result.data = other
    other.set_()
    assert torch.equal(result, before)


def test_weak_reference_to_a_storage_outlives_it(backend: str) -> None:
    results = fastopt.to([values((size,), torch.bfloat16) for size in range(1, 200)], dtype=torch.float32)
    references = [StorageWeakRef(result.untyped_storage()) for result in results]
    assert not any(reference.expired() for reference in references)
    del results
    assert all(reference.expired() for reference in references)
