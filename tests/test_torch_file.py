"""Reading what `torch.save` wrote; `torch.load(weights_only=True, mmap=True)` is the oracle."""

import collections
import copy as copying
import gc
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import fastopt
from fastopt import _C
from fastopt.casting import Cast
from fastopt.files import torch_file
from tests.oracle import TORCH_STATE_DICT, Comparison, about, adam, assert_same_load, torch_load, trained
from tests.test_optimizers import EVERY, saved
from tests.torch_files import by_torch, natively, rewrite, write_archive

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux to know what is mapped")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "optimizer.pt"


def assert_read_as_by_torch(path, *, plain):
    """The same by all ways there are, and without torch's unpickler if it is plain."""
    expected = by_torch(path)
    Comparison().same(torch_file.read(path), expected)
    fast = natively(path)
    assert (fast is not None) == plain
    if plain:
        Comparison().same(fast[0], expected)


# ---- the same as torch reads ----


@EVERY
def test_the_state_of_every_optimizer(backend, path, name, options, dtype):
    torch.save(saved(name, options, dtype), path)
    assert_read_as_by_torch(path, plain=True)


WITHOUT_MEMORY = re.compile(r"torch\.(u?int[1-7]|q.*|bits.*)")  # torch itself does not save these, or warns of them
LEFT_TO_TORCH = {torch.float4_e2m1fn_x2, torch.float8_e8m0fnu}
DTYPES = {
    str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype) and not WITHOUT_MEMORY.fullmatch(str(v))
}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(backend, path, dtype):
    whole = torch.arange(32, dtype=torch.uint8).view(dtype)
    torch.save([whole, whole[1:], torch.ones(1)], path)
    fast = natively(path)
    assert (fast is not None) == (dtype not in LEFT_TO_TORCH)
    for content in [torch_file.read(path), *(fast or ())]:
        for actual, expected in zip(content, by_torch(path), strict=True):
            assert about(actual) == about(expected)
            assert actual.untyped_storage().tolist() == expected.untyped_storage().tolist()
        assert content[0].untyped_storage()._cdata == content[1].untyped_storage()._cdata


def module_state():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return model.state_dict()


def shared():
    base = torch.arange(24.0)
    return [base, base[3:7], base.view(4, 6).t(), base[::2], base]


def twice():
    inner, tensor = {"a": [1, 2.5]}, torch.ones(2)
    ordered = collections.OrderedDict(one=1)
    empty = collections.OrderedDict()
    return [inner, inner, tensor, tensor, ordered, ordered, empty, empty, inner["a"]]


def endless():
    loop = [1]
    loop.append(loop)
    table = {"list": loop}
    table["self"] = table
    return table


def lightning():
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": module_state(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"Checkpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "best": "", "k": None}},
        "optimizer_states": [copying.deepcopy(TORCH_STATE_DICT(trained(adam())))],
        "lr_schedulers": [{"base_lrs": [0.1], "last_epoch": 3, "verbose": False}],
        "hparams": collections.OrderedDict([("lr", 1e-3), ("names", ("a", "b"))]),
    }


PLAIN = {
    "lightning": lightning,
    "module": module_state,
    "shared": shared,
    "twice": twice,
    "endless": endless,
    "numbers": lambda: [0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, -(2**63), 2**63 - 1, 0.1, -0.0, 1e-320],
    "not finite": lambda: [float("inf"), -float("inf"), float("nan")],
    "texts": lambda: ["", "a", "ä€😀", "\0", "\ud800", "x" * 70000],
    "atoms": lambda: [None, True, False, "None"],
    "keys": lambda: {"a": 1, 2: "b", 2.5: 0, None: None, True: 1, -7: []},
    "tuples": lambda: [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),)), (torch.ones(1), [1])],
    "ordered in tuples": lambda: (collections.OrderedDict(), (collections.OrderedDict(a=collections.OrderedDict()), 1)),
    "containers": lambda: [[], {}, [[]], [{}], collections.OrderedDict(), {"a": {}}],
    "many": lambda: {i: {"a": i, "b": [i] * 3, "c": torch.tensor(i)} for i in range(30000)},
    "strides": lambda: [torch.ones(3, 4).t(), torch.ones(4, 4)[1:3, 2:], torch.ones(1).expand(5, 3)],
    "channels last": lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "sizes": lambda: [torch.ones(()), torch.ones(1), torch.ones(2, 3, 4), torch.ones(2**18)],
    "no elements": lambda: [torch.ones(0), torch.ones(3, 0, 2), torch.ones(5)[5:], torch.ones(5)[2:2]],
    "a tensor alone": lambda: torch.ones(3),
    "nothing": lambda: None,
    "dtypes": lambda: {"dtype": torch.float32, "others": [torch.int8, torch.bfloat16]},
}  # fmt: skip


@pytest.mark.parametrize("content", PLAIN)
def test_plain_content(backend, path, content):
    torch.save(PLAIN[content](), path)
    if content == "endless":
        loop = torch_file.read(path)
        assert loop["self"] is loop
        assert loop["list"][1] is loop["list"]
        assert natively(path) is not None
        loop.clear()
    else:
        assert_read_as_by_torch(path, plain=True)


def with_attribute():
    tensor = torch.ones(3)
    tensor.label = "named"
    return tensor


OTHER = {
    "a parameter": lambda: {"weight": torch.nn.Parameter(torch.ones(2)), "tensor": torch.ones(1)},
    "requires grad": lambda: [torch.ones(2), torch.ones(3, requires_grad=True)],
    "a size": lambda: torch.ones(2, 3).shape,
    "a device": lambda: torch.device("cpu"),
    "bytes": lambda: b"\0\xff",
    "complex": lambda: 1 + 2j,
    "a set": lambda: {1, 2},
    "a counter": lambda: collections.Counter("abca"),
    "a large int": lambda: [2**63, -(2**70)],
    "sparse": lambda: torch.eye(3).to_sparse(),
    "conjugate": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "an attribute": with_attribute,
    "tuples as keys": lambda: {(1, 2): 3},
    "meta": lambda: torch.ones(3, device="meta"),
}


@pytest.mark.parametrize("content", OTHER)
def test_other_content_is_left_to_torch(backend, path, content):
    torch.save(OTHER[content](), path)
    assert_read_as_by_torch(path, plain=False)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_storage_by_itself_is_left_to_torch(backend, path):
    torch.save([torch.ones(3).untyped_storage()], path)
    assert torch_file.read(path)[0].tolist() == by_torch(path)[0].tolist()
    assert natively(path) is None


def test_a_tensor_hook_survives_as_by_torch(path):
    torch.save(torch.ones(2), path)
    content = torch_file.read(path)
    content.requires_grad_().register_hook(lambda grad: grad * 2)
    (content * 3).sum().backward()
    assert content.grad.tolist() == [6, 6]


def test_without_a_byte_order_it_is_left_to_torch(backend, path):
    torch.save([torch.arange(3.0)], path)
    rewrite(path, without="byteorder")
    assert_read_as_by_torch(path, plain=False)


def test_another_byte_order_is_left_to_torch(backend, path):
    torch.save([torch.arange(3.0)], path)
    reader = torch._C.PyTorchFileReader(str(path))
    records = {"data/0": reader.get_record("data/0"), "byteorder": b"big"}
    write_archive(path, reader.get_record("data.pkl"), records)
    assert_read_as_by_torch(path, plain=False)
    assert torch_file.read(path)[0].tolist() == torch.arange(3.0).numpy().byteswap().tolist()


def test_what_is_not_torchs_is_not_read_natively(path):
    for content in (None, b"", b"PK\3\4", b"text"):
        if content is not None:
            path.write_bytes(content)
        assert natively(path) is None
    assert natively(path.parent) is None
    torch.save([1], path)
    assert natively(path) == ([1],)
    assert _C.read_torch_file(os.fsencode(path) + b"\0.pt") is None


def test_a_mode_that_watches_sees_torchs_own_read(path):
    torch.save([torch.ones(3)], path)
    with torch._subclasses.FakeTensorMode():
        [tensor] = torch_file.read(path)
    assert isinstance(tensor, torch._subclasses.FakeTensor)


def test_in_inference_mode(backend, path):
    torch.save([torch.ones(3)], path)
    with torch.inference_mode():
        assert_read_as_by_torch(path, plain=True)


# ---- where the tensors lie ----


def mappings_of(path):
    return sum(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())


def descriptors_of(path):
    links = Path("/proc/self/fd").iterdir()
    return sum(link.is_symlink() and os.readlink(link) == str(path) for link in links)


@linux
def test_one_mapping_that_lives_as_long_as_a_tensor_in_it(path):
    torch.save({"a": [torch.ones(3), torch.ones(4), torch.zeros(0)], "b": torch.ones(5)}, path)
    [content] = natively(path)
    assert (mappings_of(path), descriptors_of(path)) == (1, 1)
    view = content["b"][2:]
    del content
    assert mappings_of(path) == 1
    assert view.tolist() == [1, 1, 1]
    del view
    assert (mappings_of(path), descriptors_of(path)) == (0, 0)


@linux
@pytest.mark.parametrize("content", OTHER)
def test_a_file_that_is_left_to_torch_is_closed(path, content):
    torch.save([torch.ones(3), OTHER[content]()], path)
    assert natively(path) is None
    assert (mappings_of(path), descriptors_of(path)) == (0, 0)


def test_writes_do_not_reach_the_file(backend, path):
    torch.save([torch.ones(3)], path)
    before = path.read_bytes()
    [tensor] = torch_file.read(path)
    tensor.fill_(7)
    assert path.read_bytes() == before
    assert torch_file.read(path)[0].tolist() == [1, 1, 1]


def test_where_a_tensor_lies(path):
    tensors = [torch.randn(5), torch.arange(7), torch.randn(0)]
    torch.save([*tensors, tensors[0][2:]], path)
    [content] = natively(path)
    for tensor in content:
        descriptor, offset, size, name = _C.file_range(tensor)
        assert name == os.fsencode(path)
        storage = tensor.untyped_storage()
        assert size == storage.nbytes()
        assert list(os.pread(descriptor, size, offset)) == storage.tolist()
    assert _C.file_range(torch.ones(3)) is None
    assert _C.file_range(by_torch(path)[0]) is None
    assert _C.file_range(content[0].clone()) is None
    with pytest.raises(TypeError):
        _C.file_range(3)


def test_what_was_read_behaves_as_any_other_tensor(tmp_path, path):
    torch.save([torch.arange(6.0), torch.ones(2, 2)], path)
    [[first, second]] = natively(path)
    assert copying.deepcopy(first).tolist() == first.tolist()
    again = tmp_path / "again.pt"
    torch.save([first, second.t()], again)
    Comparison().same(by_torch(again), [torch.arange(6.0), torch.ones(2, 2).t()])
    assert first.resize_(2).numpy().tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="not resizable"):
        first.resize_(100)
    assert second.share_memory_().tolist() == [[1, 1], [1, 1]]


def test_no_tensor_of_a_plain_file_goes_through_python(path, monkeypatch):
    torch.save(copying.deepcopy(TORCH_STATE_DICT(trained(adam()))), path)
    expected = adam()
    torch_load(expected, torch.load(path, weights_only=True), copy=True)

    def refuse(*arguments):
        raise AssertionError("one went through Python")

    monkeypatch.setattr(Cast, "entry", refuse)
    actual = adam()
    fastopt.load(actual, path)
    assert_same_load(actual, expected, copy=True)


# ---- nothing stays behind ----


def counts():
    gc.collect()
    shared_objects = (torch.float32, torch.int64, collections.OrderedDict, (), None, True, False, 1, "")
    return [sys.getrefcount(item) for item in shared_objects]


@pytest.mark.parametrize("content", [*PLAIN, *OTHER])
def test_reads_keep_no_reference(path, content):
    torch.save({**PLAIN, **OTHER}[content]() if content != "many" else [{"a": torch.ones(2)}] * 9, path)
    natively(path)
    before = counts()
    for _ in range(20):
        natively(path)
    drift = [after - earlier for after, earlier in zip(counts(), before, strict=True)]
    assert all(abs(change) < 10 for change in drift), drift


def test_objects_of_a_read_are_freed(path):
    torch.save(lightning(), path)
    natively(path)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(20):
        natively(path)
    gc.collect()
    assert len(gc.get_objects()) - before < 20
