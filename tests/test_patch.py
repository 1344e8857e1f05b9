"""install, uninstall, installed: fastopt in the place of torch's own methods."""

import contextlib
import copy as copying
import io
import pickle

import pytest
import torch
from torch.distributed.checkpoint import state_dict as distributed
from torch.optim import Optimizer

import fastopt
from tests.oracle import (
    TORCH_LOAD_STATE_DICT,
    TORCH_STATE_DICT,
    Comparison,
    adam,
    assert_nothing_shared,
    assert_same_load,
    parameter,
    torch_load,
    train,
    trained,
)

pytestmark = pytest.mark.usefixtures("backend", "restored")


@pytest.fixture
def restored():
    yield
    fastopt.uninstall()
    Optimizer.state_dict, Optimizer.load_state_dict = TORCH_STATE_DICT, TORCH_LOAD_STATE_DICT


def is_torchs():
    return Optimizer.state_dict is TORCH_STATE_DICT and Optimizer.load_state_dict is TORCH_LOAD_STATE_DICT


def is_fastopts():
    """Whether a load goes through fastopt, told by what torch does to a str."""
    optimizer = torch.optim.SGD([parameter(1)])
    optimizer.load_state_dict(
        {"state": {0: {"name": "kept"}}, "param_groups": TORCH_STATE_DICT(optimizer)["param_groups"]}
    )
    return next(iter(optimizer.state.values()))["name"] == "kept"


def shares_with_the_dict():
    state_dict = TORCH_STATE_DICT(trained(adam()))
    optimizer = adam()
    optimizer.load_state_dict(state_dict)
    param = optimizer.param_groups[0]["params"][0]
    return optimizer.state[param]["exp_avg"] is state_dict["state"][0]["exp_avg"]


def test_install_and_uninstall_restore_torchs_own_methods():
    assert is_torchs()
    assert not is_fastopts()
    fastopt.install()
    assert Optimizer.state_dict is not TORCH_STATE_DICT
    assert Optimizer.load_state_dict is not TORCH_LOAD_STATE_DICT
    assert is_fastopts()
    fastopt.uninstall()
    assert is_torchs()
    assert not is_fastopts()


def test_install_twice_and_uninstall_twice():
    fastopt.install()
    first = Optimizer.load_state_dict
    fastopt.install()
    assert Optimizer.load_state_dict is first
    fastopt.uninstall()
    assert is_torchs()
    fastopt.uninstall()
    assert is_torchs()


def test_uninstall_without_install():
    fastopt.uninstall()
    assert is_torchs()


def test_copy_of_install():
    fastopt.install()
    assert shares_with_the_dict()
    fastopt.install(copy=True)
    assert not shares_with_the_dict()
    fastopt.install(copy=False)
    assert shares_with_the_dict()


def test_installed_restores_what_was_before_and_nests():
    with fastopt.installed(copy=True):
        assert is_fastopts()
        assert not shares_with_the_dict()
        with fastopt.installed():
            assert is_fastopts()
            assert shares_with_the_dict()
        assert is_fastopts()
        assert not shares_with_the_dict()
    assert is_torchs()


def test_installed_inside_install_leaves_it_in_place():
    fastopt.install(copy=True)
    with fastopt.installed(copy=False):
        assert shares_with_the_dict()
    assert is_fastopts()
    assert not shares_with_the_dict()


def test_installed_restores_after_an_error():
    with pytest.raises(LookupError), fastopt.installed():
        raise LookupError
    assert is_torchs()


@pytest.mark.parametrize("copy", [True, False])
def test_patched_methods_do_what_torchs_do(copy):
    given, given_to_torch = (TORCH_STATE_DICT(trained(adam())) for _ in range(2))
    actual, expected = adam(dtype=torch.bfloat16), adam(dtype=torch.bfloat16)
    with fastopt.installed(copy=copy):
        assert actual.load_state_dict(given) is None
        saved = actual.state_dict()
    torch_load(expected, given_to_torch, copy=copy)
    assert_same_load(actual, expected, given=given, given_to_torch=given_to_torch, copy=copy)
    Comparison().same(saved, TORCH_STATE_DICT(expected))


def test_patched_methods_bind_torchs_parameter_names():
    optimizer, state_dict = adam(), TORCH_STATE_DICT(trained(adam()))
    with fastopt.installed():
        assert optimizer.load_state_dict(state_dict=state_dict) is None
        assert Optimizer.load_state_dict(self=optimizer, state_dict=state_dict) is None
        Comparison().same(Optimizer.state_dict(self=optimizer), TORCH_STATE_DICT(optimizer))


def test_patched_methods_look_like_torchs():
    with fastopt.installed():
        for ours, torchs in (
            (Optimizer.state_dict, TORCH_STATE_DICT),
            (Optimizer.load_state_dict, TORCH_LOAD_STATE_DICT),
        ):
            assert ours.__name__ == torchs.__name__
            assert ours.__qualname__ == torchs.__qualname__
            assert ours.__doc__ == torchs.__doc__


def wrap(calls):
    """Wraps the method in place, as another library would."""
    inner = Optimizer.load_state_dict

    def wrapper(self, state_dict):
        calls.append(type(self))
        return inner(self, state_dict)

    Optimizer.load_state_dict = wrapper
    return inner, wrapper


def test_another_library_wrapped_ours_before_uninstall():
    calls = []
    fastopt.install()
    inner, wrapper = wrap(calls)
    assert is_fastopts()
    fastopt.uninstall()
    assert Optimizer.load_state_dict is wrapper
    assert Optimizer.state_dict is TORCH_STATE_DICT
    assert not is_fastopts()
    assert len(calls) == 2
    Optimizer.load_state_dict = inner
    assert not is_fastopts()
    fastopt.install()
    assert is_fastopts()
    fastopt.uninstall()
    assert is_torchs()


def test_another_library_wrapped_torchs_before_install():
    calls = []
    _, wrapper = wrap(calls)
    fastopt.install()
    assert is_fastopts()
    assert calls == []
    fastopt.uninstall()
    assert Optimizer.load_state_dict is wrapper


def test_install_again_on_top_of_a_wrapper():
    calls = []
    fastopt.install()
    wrap(calls)
    fastopt.uninstall()
    fastopt.install()
    assert is_fastopts()
    fastopt.uninstall()
    assert not is_fastopts()


def test_method_that_was_kept_follows_install_and_uninstall():
    optimizer, state_dict = adam(), TORCH_STATE_DICT(trained(adam()))
    with fastopt.installed(copy=True):
        kept = optimizer.load_state_dict
        kept(state_dict)
        assert_nothing_shared(optimizer, state_dict)
    kept(state_dict)
    assert next(iter(optimizer.state.values()))["exp_avg"] is state_dict["state"][0]["exp_avg"]


class Own(torch.optim.Adam):
    def state_dict(self):
        return super().state_dict() | {"own": True}

    def load_state_dict(self, state_dict):
        self.seen = list(state_dict)
        return super().load_state_dict(state_dict)


def test_subclass_that_calls_super():
    def make_optimizer():
        return Own([parameter(3, 4), parameter(5)])

    runs = []
    for context in (fastopt.installed(copy=True), fastopt.installed(copy=False)):
        optimizer = make_optimizer()
        with context:
            state_dict = trained(make_optimizer()).state_dict()
            optimizer.load_state_dict(state_dict)
            assert is_fastopts()
        runs.append(optimizer)
    expected = make_optimizer()
    expected.load_state_dict(trained(make_optimizer()).state_dict())
    for optimizer in runs:
        assert optimizer.seen == expected.seen == ["state", "param_groups", "own"]
        Comparison().optimizers(optimizer, expected)


def test_schedulers_and_their_optimizers():
    runs = []
    for context in (fastopt.installed(), contextlib.nullcontext()):
        optimizer, other = trained(adam()), adam()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        other_scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
        train(optimizer)
        scheduler.step()
        with context:
            other.load_state_dict(optimizer.state_dict())
            other_scheduler.load_state_dict(scheduler.state_dict())
        train(other)
        other_scheduler.step()
        runs.append(other)
    Comparison().optimizers(*runs)


def clone_by_pickle(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def clone_by_torch_save(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [clone_by_pickle, clone_by_torch_save, copying.deepcopy])
def test_optimizers_are_pickled_and_copied_as_ever(clone):
    optimizer = trained(adam())
    expected = clone(optimizer)
    with fastopt.installed():
        actual = clone(optimizer)
        assert b"fastopt" not in pickle.dumps(optimizer)
    Comparison().optimizers(actual, expected)
    with fastopt.installed():
        actual.load_state_dict(actual.state_dict())
    expected.load_state_dict(expected.state_dict())
    train(actual)
    train(expected)
    Comparison().optimizers(actual, expected)


def test_distributed_checkpoint_gets_and_sets():
    def run():
        torch.manual_seed(0)
        model, other = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)) for _ in range(2))
        optimizer, loaded = torch.optim.Adam(model.parameters()), torch.optim.Adam(other.parameters())
        train(optimizer)
        saved = distributed.get_optimizer_state_dict(model, optimizer)
        distributed.set_optimizer_state_dict(other, loaded, saved)
        return saved, loaded

    with fastopt.installed():
        saved, loaded = run()
    saved_by_torch, loaded_by_torch = run()
    Comparison().same(saved, saved_by_torch)
    Comparison().optimizers(loaded, loaded_by_torch)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")
def test_compiled_training_step_with_a_load_in_between(compiler):
    def run():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), foreach=False)
        data = torch.randn(5, 4)

        @torch.compile(backend=compiler)
        def step():
            optimizer.zero_grad()
            loss = model(data).square().sum()
            loss.backward()
            optimizer.step()
            return loss.detach()

        losses = [step(), step()]
        state_dict = copying.deepcopy(optimizer.state_dict())
        losses.append(step())
        optimizer.load_state_dict(state_dict)
        return [*losses, step(), step()], optimizer

    with fastopt.installed():
        losses, optimizer = run()
    expected_losses, expected = run()
    Comparison().same(losses, expected_losses)
    Comparison().optimizers(optimizer, expected)


@pytest.mark.filterwarnings("ignore")
def test_load_inside_a_compiled_function():
    state_dict = TORCH_STATE_DICT(trained(adam()))
    actual, expected = adam(), adam()

    @torch.compile(backend="eager")
    def load(optimizer, x):
        x = x + 1
        optimizer.load_state_dict(state_dict)
        return x * 2

    with fastopt.installed():
        result = load(actual, torch.ones(2))
    TORCH_LOAD_STATE_DICT(expected, state_dict)
    assert torch.equal(result, torch.full((2,), 4.0))
    Comparison().optimizers(actual, expected)
