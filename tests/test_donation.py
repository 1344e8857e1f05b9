"""`donate=True`: torch's load is the oracle of the values; what is left of the dict, and when, is asked here."""

import copy as copying
import sys
import weakref
from functools import partial
from types import MappingProxyType

import numpy
import pytest
import torch

import fastopt
from fastopt import donation
from tests.loads import saved, tensor, values
from tests.oracle import TORCH_STATE_DICT, Bare, adam, assert_same_load, fingerprint, parameter, torch_load, trained

pytestmark = pytest.mark.usefixtures("backend")

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(params=[donation.PORTION, 1], ids=["at once", "one by one"])
def portion(request, monkeypatch):
    monkeypatch.setattr(donation, "PORTION", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_optimizer_gets_what_torch_gives_it(dtype, portion):
    state_dict = TORCH_STATE_DICT(trained(adam()))
    state_dict["state"]["extra"] = {"a": torch.ones(3)}
    given, given_to_torch = copying.deepcopy(state_dict), copying.deepcopy(state_dict)
    actual, expected = adam(dtype=dtype), adam(dtype=dtype)
    report = fastopt.load_state_dict(actual, given, donate=True)
    torch_load(expected, given_to_torch, copy=False)
    assert_same_load(actual, expected, given=None, given_to_torch=None, copy=False)
    assert report.tensors == 9
    assert report.unexpected == ["extra"]
    assert report.missing == []


@pytest.mark.parametrize("name", values())
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_values_of_all_kinds_are_loaded_as_without(name, portion):
    param = parameter(3, 4)
    actual, expected = Bare([param]), Bare([param])
    fastopt.load_state_dict(actual, saved({0: values()[name]}), donate=True)
    fastopt.load_state_dict(expected, saved({0: values()[name]}), copy=False)
    assert_same_load(actual, expected, copy=False)


def test_the_dict_is_empty_and_cannot_be_loaded_again(portion):
    state_dict = copying.deepcopy(TORCH_STATE_DICT(trained(adam())))
    state = state_dict["state"]
    optimizer = adam()
    fastopt.load_state_dict(optimizer, state_dict, donate=True)
    assert state_dict == state == {}
    before = fingerprint(optimizer)
    with pytest.raises(KeyError, match="param_groups"):
        fastopt.load_state_dict(optimizer, state_dict)
    assert fingerprint(optimizer) == before


def test_each_source_is_released_before_the_next_is_cast(monkeypatch):
    monkeypatch.setattr(donation, "PORTION", 1)
    params = [parameter(50, 50, dtype=BF16) for _ in range(5)]
    state_dict = saved({i: {"m": tensor(50, 50, seed=i)} for i in range(5)}, params=range(5))
    sources = [weakref.ref(state["m"]) for state in state_dict["state"].values()]
    alive = []

    class Watched(donation.CastDonated):
        def count(self, *args):
            alive.append(sum(source() is not None for source in sources))
            super().count(*args)

    monkeypatch.setattr(sys.modules["fastopt.state_dict"], "CastDonated", Watched)
    fastopt.load_state_dict(Bare(params), state_dict, donate=True)
    assert alive == [5, 4, 3, 2, 1]
    assert not any(source() for source in sources)


def test_what_needs_no_cast_is_taken_over():
    state_dict = saved({0: {"m": tensor(3, 4)}})
    address = state_dict["state"][0]["m"].data_ptr()
    optimizer = Bare([parameter(3, 4)])
    report = fastopt.load_state_dict(optimizer, state_dict, donate=True)
    [state] = optimizer.state.values()
    assert state["m"].data_ptr() == address
    assert report.shared == 1
    assert str(report).splitlines()[1:] == ["  took over 1 as they were"]


def test_another_optimizers_live_state_stays_its_own():
    source, target = trained(adam()), adam(dtype=BF16)
    before = fingerprint(source)
    fastopt.load_state_dict(target, source.state_dict(), donate=True)
    assert fingerprint(source) == before


def test_so_is_one_that_a_hook_puts_in_its_place(portion):
    kept, optimizer = copying.deepcopy(TORCH_STATE_DICT(trained(adam()))), adam()
    handle = optimizer.register_load_state_dict_pre_hook(lambda optimizer, state_dict: kept)
    given = saved({})
    fastopt.load_state_dict(optimizer, given, donate=True)
    assert given == kept == {}
    handle.remove()
    before = fingerprint(optimizer)
    for empty in (given, kept):
        with pytest.raises(KeyError, match="param_groups"):
            fastopt.load_state_dict(optimizer, empty)
    assert fingerprint(optimizer) == before


def test_a_matched_dict_is_released_as_well(monkeypatch):
    monkeypatch.setattr(donation, "PORTION", 1)
    optimizer = torch.optim.SGD([("b", parameter(3, dtype=BF16)), ("a", parameter(4, dtype=BF16))])
    state_dict = saved({i: {"m": tensor(3 + i)} for i in range(2)}, params=range(2), param_names=["b", "a"], lr=1.0)
    sources = [weakref.ref(state["m"].untyped_storage()) for state in state_dict["state"].values()]
    optimizer.register_load_state_dict_pre_hook(partial(fastopt.match, strict=False))
    fastopt.load_state_dict(optimizer, state_dict, donate=True)
    assert state_dict == {}
    assert not any(source() for source in sources)


def test_what_fails_before_the_first_cast_leaves_the_dict_whole():
    optimizer = Bare([parameter(3), parameter(3)])
    state_dict = saved({0: {"m": tensor(3)}})
    before = fingerprint(state_dict)
    with pytest.raises(ValueError, match="doesn't match the size"):
        fastopt.load_state_dict(optimizer, state_dict, donate=True)
    frozen = {**saved({}, params=(0, 1)), "state": MappingProxyType({0: {}})}
    with pytest.raises(TypeError, match="donate: nothing can be taken out of the state, a mappingproxy"):
        fastopt.load_state_dict(optimizer, frozen, donate=True)
    with pytest.raises(TypeError, match="donate: nothing can be taken out of the dict, a mappingproxy"):
        fastopt.load_state_dict(
            optimizer, MappingProxyType(state_dict | {"param_groups": frozen["param_groups"]}), donate=True
        )
    assert fingerprint(state_dict) == before
    assert len(frozen) == 2


def test_what_fails_later_leaves_the_optimizer_and_an_empty_dict():
    optimizer = trained(adam())
    before = fingerprint(optimizer)
    state_dict = copying.deepcopy(TORCH_STATE_DICT(optimizer))
    state_dict["state"][1]["exp_avg"] = torch.ones(5, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        fastopt.load_state_dict(optimizer, state_dict, donate=True)
    assert fingerprint(optimizer) == before
    assert state_dict == {}


# ---- what somebody else can still read ----

LARGE = 16 * 2**20  # elements: large enough to be released in parts


def numpy_array():
    array = numpy.full(LARGE, 1.5, dtype=numpy.float32)
    return torch.from_numpy(array), lambda: array


def view_of_another():
    base = torch.full((2, LARGE), 1.5)
    return base[0], lambda: base


def same_storage():
    tensor = torch.full((LARGE,), 1.5)
    storage = tensor.untyped_storage()
    return tensor, lambda: torch.empty(0).set_(storage)


def detached_twin():
    tensor = torch.full((LARGE,), 1.5)
    return tensor.detach(), lambda: tensor


def array_of_it():
    tensor = torch.full((LARGE,), 1.5)
    array = tensor.numpy()
    return tensor, lambda: array


def exported():
    tensor = torch.full((LARGE,), 1.5)
    twin = torch.from_dlpack(tensor.__dlpack__())
    return tensor, lambda: twin


def held_elsewhere():
    tensor = torch.full((LARGE,), 1.5)
    return tensor, lambda: tensor


def shared_memory():
    tensor = torch.full((LARGE,), 1.5).share_memory_()
    return tensor, lambda: torch.full((1,), 1.5)


def saved_for_backward():
    factor = torch.full((LARGE,), 1.5)
    product = torch.ones(LARGE, requires_grad=True) * factor
    return factor, lambda: torch.autograd.grad(product.sum(), product.grad_fn.next_functions[0][0].variable)[0]


@pytest.mark.parametrize(
    "make",
    [
        numpy_array,
        view_of_another,
        same_storage,
        detached_twin,
        array_of_it,
        exported,
        held_elsewhere,
        shared_memory,
        saved_for_backward,
    ],
)
def test_what_somebody_else_can_read_is_not_lost(make):
    source, seen = make()
    state_dict = saved({0: {"m": source, "list": [source]}})
    del state_dict["state"][0]["list"], source
    optimizer = Bare([parameter(1, dtype=BF16)])
    fastopt.load_state_dict(optimizer, state_dict, donate=True)
    [state] = optimizer.state.values()
    assert state["m"].dtype is BF16
    assert bool((state["m"] == 1.5).all())
    assert bool((torch.as_tensor(seen()) == 1.5).all())


def test_one_tensor_in_two_places_is_cast_in_both():
    tensor = torch.full((LARGE,), 1.5)
    twin = torch.full((LARGE,), 2.5)
    state_dict = saved({0: {"a": tensor, "b": [tensor], "c": twin, "d": twin.view(2, -1)}})
    del tensor, twin
    optimizer = Bare([parameter(1, dtype=BF16)])
    fastopt.load_state_dict(optimizer, state_dict, donate=True)
    [state] = optimizer.state.values()
    for value, expected in ((state["a"], 1.5), (state["b"][0], 1.5), (state["c"], 2.5), (state["d"], 2.5)):
        assert bool((value == expected).all())


def test_an_entry_in_two_places_is_cast_in_both():
    entry = {"m": torch.full((LARGE,), 1.5)}
    state_dict = saved({0: entry, 1: entry}, params=(0, 1))
    del entry
    optimizer = Bare([parameter(1, dtype=BF16), parameter(1, dtype=BF16)])
    fastopt.load_state_dict(optimizer, state_dict, donate=True)
    assert all(bool((state["m"] == 1.5).all()) for state in optimizer.state.values())


def test_a_container_in_two_places_is_cast_in_both():
    inner = [torch.full((LARGE,), 1.5)]
    state_dict = saved({0: {"m": inner}, 1: {"m": inner, "n": {"deep": inner}}}, params=(0, 1))
    del inner
    optimizer = Bare([parameter(1, dtype=BF16), parameter(1, dtype=BF16)])
    fastopt.load_state_dict(optimizer, state_dict, donate=True)
    first, second = optimizer.state.values()
    for value in (first["m"][0], second["m"][0], second["n"]["deep"][0]):
        assert bool((value == 1.5).all())


def test_a_value_that_is_made_of_a_weak_reference_is_whole():
    class Remembering(list):
        def __iter__(self):
            return iter([self.reference().clone()])

    tensor = torch.full((LARGE,), 1.5)
    remembering = Remembering()
    remembering.reference = weakref.ref(tensor)
    state_dict = saved({0: {"m": tensor, "r": remembering}})
    del tensor
    optimizer = Bare([parameter(1, dtype=BF16)])
    fastopt.load_state_dict(optimizer, state_dict, donate=True)
    [state] = optimizer.state.values()
    assert all(bool((item == 1.5).all()) for item in list.__iter__(state["r"]))
    assert bool((state["m"] == 1.5).all())
