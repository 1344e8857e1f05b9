"""Pickles that torch.save would never write: nothing of theirs runs, and what comes of them is what comes of torch."""

import builtins
import codecs
import collections
import copyreg
import gc
import os
import pickle
import re
import struct
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastopt.errors import CheckpointError
from fastopt.files import torch_file
from tests.oracle import Comparison, outcome
from tests.torch_files import by_torch, natively, write_archive

PROTO = b"\x80\x02"
RECORDS = {"data/0": struct.pack("<4f", 1, 2, 3, 4), "data/1": bytes(64)}


def text(value):
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def shape(*numbers):
    return b"(" + b"".join(numbers) + b"t"


FLOAT, UNTYPED = name("torch", "FloatStorage"), name("torch.storage", "UntypedStorage")
V2, V3 = name("torch._utils", "_rebuild_tensor_v2"), name("torch._utils", "_rebuild_tensor_v3")
ORDERED = name("collections", "OrderedDict")
HOOKS = ORDERED + b")R"
ZERO, ONE, FOUR = number(0), number(1), number(4)
KEY, CPU, WORD = text("0"), text("cpu"), text("storage")
SIZES, STRIDES = shape(FOUR), shape(ONE)
EXECUTED = "import pathlib; pathlib.Path('executed').touch()"
LARGEST = b"\x8a\x08" + b"\xff" * 7 + b"\x7f"  # 2**63 - 1


def storage(kind=FLOAT, key=KEY, location=CPU, size=FOUR, word=WORD):
    return b"(" + word + kind + key + location + size + b"tQ"


def tensor(memory=None, offset=ZERO, sizes=SIZES, strides=STRIDES, grad=b"\x89", hooks=HOOKS, more=b"", function=V2):
    return function + b"(" + (memory or storage()) + offset + sizes + strides + grad + hooks + more + b"tR"


def v3(dtype, **options):
    memory = storage(kind=UNTYPED, size=number(16))
    return tensor(function=V3, more=dtype, **{"memory": memory, **options})


class Calls:
    """Pickled, it is a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


BUILT_ON = text("a") + text("b")
PICKLES = {
    # Calls, in all the ways that pickles have.
    **{f"exec, protocol {n}": pickle.dumps({"x": Calls(exec, EXECUTED)}, n) for n in range(6)},
    "system": pickle.dumps(Calls(os.system, "touch executed"), 2),
    "inst": PROTO + b"(" + text(EXECUTED) + b"ibuiltins\nexec\n.",
    "obj": PROTO + b"(" + name("builtins", "exec") + text(EXECUTED) + b"o.",
    "newobj": PROTO + name("collections", "Counter") + b")\x81.",
    "newobj of ours": PROTO + ORDERED + b")\x81.",
    "newobj_ex": b"\x80\x04" + ORDERED + b")}\x92.",
    "extension": PROTO + b"\x82\x70)R.",
    "extension by 4": PROTO + b"\x84\x70\0\0\0)R.",
    "by dots": PROTO + name("collections", "OrderedDict.fromkeys") + b"]\x85R.",
    "by a module of ours": PROTO + name("torch._utils", "os.system") + text("touch executed") + b"\x85R.",
    "a call of text": PROTO + text("a") + b")R.",
    "a call of a number": PROTO + number(3) + b")R.",
    "a call of a tensor": PROTO + tensor() + b")R.",
    "a call of a storage": PROTO + storage() + b")R.",
    "a call of a storage's type": PROTO + FLOAT + b")R.",
    "a call of a dtype": PROTO + name("torch", "float32") + b")R.",
    "a call of a call": PROTO + HOOKS + b")R.",
    "arguments that are no tuple": PROTO + ORDERED + b"]R.",
    "arguments that are a dict": PROTO + V2 + b"}R.",
    "an OrderedDict of pairs": PROTO + ORDERED + b"](]" + text("a") + number(1) + b"ea\x85R.",
    "an OrderedDict of itself": PROTO + HOOKS + b"q\0h\0\x85R.",
    # What is handed out for a name, kept and changed.
    "a function in a list": PROTO + b"]" + V2 + b"a.",
    "a class in a dict": PROTO + b"}" + text("a") + ORDERED + b"s.",
    "a class as a key": PROTO + b"}" + ORDERED + text("a") + b"s.",
    "a storage's type alone": PROTO + FLOAT + b".",
    "a function alone": PROTO + V2 + b".",
    "a storage in a list": PROTO + b"]" + storage() + b"a.",
    "a function in a tuple": PROTO + V2 + b"\x85.",
    "a function in a tuple, kept": PROTO + V2 + b"\x85q\0h\0\x86.",
    "arguments kept": PROTO + V2 + tensor()[len(V2) : -1] + b"q\0Rh\0\x86.",
    "built on a function": PROTO + V2 + b"}" + BUILT_ON + b"sb.",
    "built on a function, by slots": PROTO + V2 + b"N}" + text("__doc__") + text("b") + b"s\x86b.",
    "built on a class": PROTO + ORDERED + b"}" + BUILT_ON + b"sb.",
    "built on a class, by slots": PROTO + ORDERED + b"N}" + text("__doc__") + text("b") + b"s\x86b.",
    "built on a storage's type": PROTO + FLOAT + b"}" + text("_dtype") + text("b") + b"sb.",
    "built on a dtype": PROTO + name("torch", "float32") + b"}" + BUILT_ON + b"sb.",
    "built on a list": PROTO + b"]}" + BUILT_ON + b"sb.",
    "built on a dict": PROTO + b"}}" + BUILT_ON + b"sb.",
    "built on a tensor": PROTO + tensor() + b"}" + BUILT_ON + b"sb.",
    "built on a storage": PROTO + storage() + b"}" + BUILT_ON + b"sb.",
    "built of a list": PROTO + HOOKS + b"]b.",
    "built of pairs": PROTO + HOOKS + b"](]" + text("a") + number(1) + b"eab.",
    "built of none": PROTO + HOOKS + b"Nb.",
    "built with a number as a name": PROTO + HOOKS + b"}" + number(1) + text("b") + b"sb.",
    "built on nothing": PROTO + b"}b.",
    "set in a tensor": PROTO + tensor() + number(0) + number(7) + b"s.",
    "set in a list": PROTO + b"]" + number(1) + b"a" + number(0) + number(7) + b"s.",
    "set in a tuple": PROTO + b")" + number(0) + number(7) + b"s.",
    "set in text": PROTO + text("a") + number(0) + number(7) + b"s.",
    "set without a value": PROTO + b"}(" + text("a") + b"u.",
    "appended to a dict": PROTO + b"}" + number(1) + b"a.",
    "appended to an OrderedDict": PROTO + HOOKS + b"(" + number(1) + b"e.",
    "appended to a tuple": PROTO + b")" + number(1) + b"a.",
    "appended to a tensor": PROTO + tensor() + number(1) + b"a.",
    "added to a set": b"\x80\x04\x8f(" + number(1) + b"\x90.",
    "a list as a key": PROTO + b"}]" + number(1) + b"s.",
    "a dict as a key": PROTO + b"}}" + number(1) + b"s.",
    "a tensor as a key": PROTO + b"}" + tensor() + number(1) + b"s.",
    "a tuple as a key": PROTO + b"}" + number(1) + b"\x85" + number(1) + b"s.",
    # Storages.
    "an id in text": b"P0\n.",
    "an id that is a number": PROTO + number(3) + b"Q.",
    "an id that is text": PROTO + text("storage") + b"Q.",
    "an id that is empty": PROTO + b")Q.",
    "an id without a size": PROTO + b"(" + text("storage") + FLOAT + text("0") + text("cpu") + b"tQ.",
    "an id of something else": PROTO + tensor(storage(word=text("module"))) + b".",
    "an id of a type that is none": PROTO + tensor(storage(kind=V2)) + b".",
    "an id of a dtype": PROTO + tensor(storage(kind=name("torch", "float32"))) + b".",
    "an id of text": PROTO + tensor(storage(kind=text("FloatStorage"))) + b".",
    "a key that is a number": PROTO + tensor(storage(key=number(0))) + b".",
    "a key that is nowhere": PROTO + tensor(storage(key=text("7"))) + b".",
    "a key that leads away": PROTO + tensor(storage(key=text("../byteorder"), size=number(1))) + b".",
    "a key with a null": PROTO + tensor(storage(key=text("0\0"))) + b".",
    "a key of lone surrogates": PROTO + tensor(storage(key=text("\ud800"))) + b".",
    "a location that is a number": PROTO + tensor(storage(location=number(0))) + b".",
    "a size that is negative": PROTO + tensor(storage(size=number(-1))) + b".",
    "a size that is a float": PROTO + tensor(storage(size=b"G" + struct.pack(">d", 4))) + b".",
    "a size that is true": PROTO + tensor(storage(size=b"\x88"), sizes=shape(), strides=shape()) + b".",
    "a size without end": PROTO + tensor(storage(size=LARGEST)) + b".",
    "a size beyond 64 bits": PROTO + tensor(storage(size=b"\x8a\x09" + b"\xff" * 8 + b"\x7f")) + b".",
    "one storage in two sizes": PROTO + b"](" + tensor() + tensor(storage(size=number(2))) + b"e.",
    "one storage of two types": PROTO + b"](" + tensor() + tensor(storage(kind=name("torch", "IntStorage"))) + b"e.",
    "a quantized storage": PROTO + tensor(storage(kind=name("torch", "QUInt8Storage"))) + b".",
    # Tensors.
    "sizes beyond the storage": PROTO + tensor(sizes=shape(number(5))) + b".",
    "an offset beyond the storage": PROTO + tensor(offset=number(1)) + b".",
    "strides beyond the storage": PROTO + tensor(strides=shape(number(2))) + b".",
    "an offset of a tensor without elements": PROTO + tensor(offset=number(9), sizes=shape(number(0))) + b".",
    "a negative size": PROTO + tensor(sizes=shape(number(-4))) + b".",
    "a negative stride": PROTO + tensor(strides=shape(number(-1))) + b".",
    "a negative offset": PROTO + tensor(offset=number(-1)) + b".",
    "two negative sizes": PROTO + tensor(sizes=shape(number(-2), number(-2)), strides=shape(*[number(1)] * 2)) + b".",
    "sizes that overflow": PROTO
    + tensor(sizes=shape(*[number(2**31 - 1)] * 3), strides=shape(*[number(0)] * 3))
    + b".",
    "strides that overflow": PROTO + tensor(sizes=shape(*[LARGEST] * 2), strides=shape(*[LARGEST] * 2)) + b".",
    "fewer strides than sizes": PROTO + tensor(sizes=shape(number(2), number(2))) + b".",
    "sizes that are floats": PROTO + tensor(sizes=shape(b"G" + struct.pack(">d", 4))) + b".",
    "sizes that are true": PROTO + tensor(sizes=shape(b"\x88")) + b".",
    "sizes in a list": PROTO + tensor(sizes=b"]" + number(4) + b"a") + b".",
    "a gradient": PROTO + tensor(grad=b"\x88") + b".",
    "a gradient that is a number": PROTO + tensor(grad=number(1)) + b".",
    "hooks": PROTO + tensor(hooks=HOOKS + number(0) + text("hook") + b"s") + b".",
    "no hooks": PROTO + tensor(hooks=b"N") + b".",
    "hooks that are a dict": PROTO + tensor(hooks=b"}") + b".",
    "metadata": PROTO + tensor(more=b"}") + b".",
    "too few arguments": PROTO + V2 + b"(" + storage() + number(0) + b"tR.",
    "too many arguments": PROTO + tensor(more=b"NNN") + b".",
    "no storage": PROTO + tensor(memory=number(0)) + b".",
    "a tensor as a storage": PROTO + tensor(memory=tensor()) + b".",
    "a storage's type as a storage": PROTO + tensor(memory=FLOAT) + b".",
    "another function": PROTO + tensor(function=name("torch._utils", "_rebuild_sparse_tensor")) + b".",
    "an untyped storage by the first way": PROTO + tensor(storage(kind=UNTYPED, size=number(16))) + b".",
    "a typed storage by the second way": PROTO + v3(name("torch", "int32"), memory=storage()) + b".",
    "a dtype that is text": PROTO + v3(text("int32")) + b".",
    "a dtype that is a storage's type": PROTO + v3(FLOAT) + b".",
    "a dtype that torch has not": PROTO + v3(name("torch", "float31")) + b".",
    "a dtype of another module": PROTO + v3(name("numpy", "int32")) + b".",
    "a dtype that is larger": PROTO + v3(name("torch", "float64")) + b".",
    # The machine.
    "empty": b"",
    "no stop": PROTO + number(1),
    "no protocol": number(1) + b".",
    "another protocol": b"\x80\x03" + number(1) + b".",
    "a protocol that is not": b"\x80\xff" + number(1) + b".",
    "a stop without a value": PROTO + b".",
    "two values": PROTO + number(1) + number(2) + b".",
    "a mark that stays": PROTO + number(1) + b"(" + number(2) + b".",
    "a mark alone": PROTO + b"(.",
    "a tuple without a mark": PROTO + number(1) + b"t.",
    "a pair of one": PROTO + number(1) + b"\x86.",
    "beneath a mark": PROTO + number(1) + b"(" + number(2) + b"\x86.",
    "set beneath a mark": PROTO + b"}(" + text("a") + b"(" + text("b") + b"sut.",
    "no such operation": PROTO + b"\xff.",
    "popped": PROTO + number(1) + number(2) + b"0.",
    "doubled": PROTO + number(1) + b"2.",
    "fetched, not stored": PROTO + b"h\x07.",
    "fetched by 4, not stored": PROTO + b"j\xff\xff\xff\xff.",
    "stored, nothing there": PROTO + b"q\0.",
    "stored beneath a mark": PROTO + number(1) + b"(q\0h\0.",
    "a memo without end": PROTO + number(1) + b"r\xff\xff\xff\xff.",
    "a memo without end, used": PROTO + number(1) + b"r\xff\xff\xff\xff0j\xff\xff\xff\xff.",
    "text beyond the end": PROTO + b"X\xff\xff\xff\xffab.",
    "text that is cut": PROTO + b"X\x05\0\0\0ab.",
    "text that is none": PROTO + b"X\x02\0\0\0\xff\xfe.",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"ab.",
    "bytes without end": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"ab.",
    "a bytearray without end": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"ab.",
    "a frame without end": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + number(1) + b".",
    "a number without end": PROTO + b"\x8b\xff\xff\xff\x7f1.",
    "a number beyond the end": PROTO + b"\x8a\xff12.",
    "old text": PROTO + b"U\x02ab.",
    "numbers in text": b"I1\n.",
    "a name without an end": PROTO + b"ctorch\nfloat32",
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "optimizer.pt"


@pytest.fixture
def extension():
    """A code by which pickles call a function, already used once in this process, so that no `find_class` sees it."""
    copyreg.add_extension("os", "getcwd", 0x70)
    pickle.loads(b"\x80\x02\x82\x70)R.")
    yield
    copyreg.remove_extension("os", "getcwd", 0x70)
    copyreg.clear_extension_cache()


def world():
    """What a pickle might change."""
    rebuild = torch._utils._rebuild_tensor_v2
    things = (rebuild, collections.OrderedDict, torch.float32, torch.FloatStorage, torch.serialization.StorageType)
    return [
        [(thing.__doc__, thing.__module__ if hasattr(thing, "__module__") else None) for thing in things],
        rebuild.__dict__.copy(),
        rebuild.__code__,
        rebuild.__defaults__,
        {key: id(value) for key, value in vars(torch.serialization.StorageType).items()},
        {key: id(value) for key, value in vars(builtins).items() if key != "_"},
        set(sys.modules),
    ]


def depth_of(value):
    depth = 0
    while value:
        depth, value = depth + 1, value[0]
    return depth


def assert_as_torch(path, value, error):
    """The outcome is torch's: the same value, or an error of its type; one of text that is none says so by our own."""
    expected, torchs = outcome(lambda: by_torch(path))
    expected_type = CheckpointError if isinstance(torchs, UnicodeDecodeError) else type(torchs)
    assert isinstance(error, expected_type), f"{value!r}, {error!r}, and torch {expected!r}, {torchs!r}"
    if torchs is None:
        Comparison().same(without_storages(value), without_storages(expected))


def without_storages(value):
    """The same, with the values of storages in place of them."""
    if isinstance(value, torch.storage.TypedStorage):
        return [value.dtype, value.tolist()]
    return [without_storages(item) for item in value] if type(value) is list else value


codecs.lookup("raw_unicode_escape")  # imports a module, by which pickles of protocol 0 are read


@pytest.mark.parametrize("which", PICKLES)
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_odd_pickles(backend, path, which, extension, monkeypatch):
    write_archive(path, PICKLES[which], RECORDS)
    before = path.read_bytes()
    outcome(lambda: by_torch(path))  # what torch imports by itself
    known = world()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = natively(path)
        result = outcome(lambda: torch_file.read(path))
    assert not Path("executed").exists()
    assert world() == known
    assert path.read_bytes() == before
    assert fast is None
    value, error = result
    if error is not None:
        assert str(path) in "".join([str(error), *getattr(error, "__notes__", [])])
    assert_as_torch(path, value, error)


@pytest.mark.parametrize(("opening", "closing"), [(b"]", b"a"), (b")", b"\x85")], ids=["lists", "tuples"])
def test_nested_deep(path, opening, closing):
    levels = 100_000
    pickled = b")" + closing * levels if opening == b")" else opening * (levels + 1) + closing * levels
    write_archive(path, PROTO + pickled + b".")
    assert depth_of(natively(path)[0]) == depth_of(by_torch(path)) == levels


def test_what_the_pickles_above_are_made_of_is_plain(path):
    contents = {
        "tensor": tensor(),
        "v3": v3(name("torch", "int32")),
        "other": tensor(storage(key=text("1"), size=number(16)), sizes=shape(number(16))),
        "hooks": HOOKS,
        "built": HOOKS + b"}" + BUILT_ON + b"sb",
        "filled": HOOKS + BUILT_ON + b"s",
        "list": b"](" + number(1) + text("a") + b"e",
    }
    for content in contents.values():
        write_archive(path, PROTO + content + b".", RECORDS)
        fast = natively(path)
        assert fast is not None
        Comparison().same(fast[0], by_torch(path))


@pytest.mark.parametrize("size", [5, 9, 2**20, 2**31 - 1])
def test_a_tensor_that_is_larger_than_its_record(path, size):
    """Torch would go on into the next record."""
    write_archive(path, PROTO + tensor(storage(size=number(size)), sizes=shape(number(size))) + b".", RECORDS)
    with pytest.raises(ValueError, match=rf"record data/0 has 16 bytes, and {4 * size} are asked of it") as caught:
        torch_file.read(path)
    assert str(path) in "".join(caught.value.__notes__)


def large_pickle():
    many = b"".join(number(i) + tensor(storage(key=text(str(i % 2)))) for i in range(20))
    return PROTO + b"}(" + text("state") + b"}(" + many + b"u" + text("rest") + HOOKS + b"q\0}" + BUILT_ON + b"sbu."


def test_a_pickle_that_is_cut_anywhere(path):
    whole = large_pickle()
    write_archive(path, whole, RECORDS)
    assert natively(path) is not None
    for length in range(len(whole)):
        write_archive(path, whole[:length], RECORDS)
        assert natively(path) is None


def test_a_pickle_with_any_byte_changed(path):
    """What comes of it is nothing, or what comes of torch; never more."""
    base = PROTO + b"}(" + text("a") + tensor() + text("b") + v3(name("torch", "int32"), memory=storage(
        kind=UNTYPED, key=text("1"), size=number(16)
    )) + text("c") + HOOKS + b"q\0}" + BUILT_ON + b"sb" + text("d") + b"h\0\x85" + number(7) + b"Nu."  # fmt: skip
    read = 0
    for place in range(len(base)):
        for change in (1, 4, 0x20, 0x80, 0xFF):
            changed = bytearray(base)
            changed[place] ^= change
            write_archive(path, bytes(changed), RECORDS)
            fast, error = outcome(lambda: natively(path))
            assert error is None or re.match(r"record data/\d has \d+ bytes, and \d+ are asked of it", str(error))
            if fast is not None:
                read += 1
                assert_as_torch(path, fast[0], None)
    assert read > 50


def test_odd_pickles_keep_no_reference(path):
    whole = large_pickle()

    def read_all():
        for length in range(0, len(whole), 7):
            write_archive(path, whole[:length], RECORDS)
            natively(path)
        for content in PICKLES.values():
            write_archive(path, content, RECORDS)
            natively(path)

    def held():
        gc.collect()
        singles = [sys.getrefcount(thing) for thing in (torch.float32, torch.int32, (), None, True, False, 4)]
        return [len(gc.get_objects()), *singles]

    read_all()
    before = held()
    for _ in range(3):
        read_all()
    assert all(abs(after - earlier) < 20 for after, earlier in zip(held(), before, strict=True))
