"""Ids in `load_state_dict()`: whose state is whose, in what order; torch's own method on a twin is the oracle."""

from collections import OrderedDict, UserDict, defaultdict

import pytest
import torch

from tests.loads import FLOATING, Point, load_both, saved, tensor
from tests.oracle import TORCH_STATE_DICT, Bare, adam, parameter, trained

pytestmark = pytest.mark.usefixtures("backend")


# 4. The id map.


@pytest.mark.parametrize("ids", [[0, 1, 0], [5, 3, 5], ["a", "b", "c"], [True, 2, 1], [(1, 2), None, 1.5], [1.0, 0, 2]])
def test_ids_of_any_hashable_type_and_the_last_of_equal_ones_wins(ids, copy):
    params = [parameter(2, dtype=dtype) for dtype in FLOATING[:3]]
    state = {identity: {"value": tensor(2, seed=index)} for index, identity in enumerate(ids)}
    load_both(lambda: Bare(params), saved(state, ids), copy)
    equal_keys = {int(k) if isinstance(k, float | bool) and k == int(k) else k: v for k, v in state.items()}
    load_both(lambda: Bare(params), saved(equal_keys, ids), copy)


@pytest.mark.parametrize("layout", [[[0, 0, 1]], [[0], [0, 1]], [[1, 0], [0]]])
def test_parameter_that_stands_twice(layout, copy):
    params = [parameter(2), parameter(3, dtype=torch.float64)]

    def make_optimizer():
        optimizer = Bare(params)
        optimizer.param_groups = [{"params": [params[i] for i in indices]} for indices in layout]
        for param in params:
            optimizer.state[param] = {"value": torch.ones_like(param).detach()}
        return optimizer

    _, report = load_both(make_optimizer, TORCH_STATE_DICT(make_optimizer()), copy)
    assert (report.missing, report.unexpected) == ([], [])


# 5. Order, unknown ids, dropped state.


@pytest.mark.parametrize("container", [dict, OrderedDict, lambda items: defaultdict(dict, items), UserDict])
def test_state_is_walked_in_the_saved_order_and_unknown_ids_are_kept(container, copy):
    params = [parameter(2), parameter(3), parameter(4)]
    state = {
        "unknown": {"tensor": tensor(2), "list": [tensor(2)], "name": "text"},
        2: {"value": tensor(4)},
        99: tensor(3),
        ("x", 1): Point(tensor(1), 2),
        0: {"value": tensor(2, dtype=torch.float64)},
        None: None,
    }
    optimizer, report = load_both(lambda: Bare(params), saved(container(state), (0, 1, 2)), copy)
    assert report.unexpected == ["unknown", 99, ("x", 1), None]
    assert report.missing == [1]
    assert optimizer.state[parameter(1)] == {}


def test_unknown_id_that_is_a_parameter_or_must_itself_be_copied(copy):
    params = [parameter(2), parameter(3)]
    free = tensor(5)
    state = {0: {"value": free}, parameter(7): {"again": free}, (free, 2): [free], frozenset({3}): "x"}
    load_both(lambda: Bare(params), saved(state, (0, 1)), copy)


def test_state_that_the_dict_does_not_name_is_dropped(copy):
    def make_optimizer():
        optimizer = trained(adam())
        optimizer.state["all"] = {"a": 1}
        return optimizer

    state_dict = TORCH_STATE_DICT(make_optimizer())
    del state_dict["state"]["all"], state_dict["state"][1]
    optimizer, report = load_both(make_optimizer, state_dict, copy)
    assert len(optimizer.state) == len(state_dict["state"])
    assert report.missing == [1]
