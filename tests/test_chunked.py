"""Tensors in chunks, at any byte; the same tensor in one piece is the oracle."""

import copy as copying
import io
import os

import pytest
import torch

import fastopt
from fastopt.backends import python
from fastopt.chunked import ChunkedTensor, is_dense
from fastopt.files.in_file import Elements, OpenFile
from tests.oracle import bits

BF16, F64 = torch.bfloat16, torch.float64

CUTS = {
    "rows": [((0, 0), (2, 6)), ((2, 0), (3, 6))],
    "columns": [((0, 0), (5, 1)), ((0, 1), (5, 5))],
    "both": [((0, 0), (3, 2)), ((0, 2), (3, 4)), ((3, 0), (2, 3)), ((3, 3), (2, 3))],
}


@pytest.fixture
def in_file(tmp_path):
    """The elements of a tensor in a file, at an odd byte."""

    def elements(tensor):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        flat = tensor.as_strided((tensor.numel(),), (1,))
        path.write_bytes(b"odd" + bits(flat).tobytes())
        return Elements(OpenFile(path), 3, tensor.dtype, tensor.shape, tensor.stride(), "it")

    return elements


@pytest.fixture(params=[16, 50, 2**21])
def piece(request, monkeypatch):
    monkeypatch.setattr(python, "PIECE", request.param)


@pytest.fixture(params=CUTS)
def cut(request):
    return CUTS[request.param]


@pytest.fixture(params=[False, True], ids=["in memory", "in a file"])
def pair(request, cut, piece, in_file, backend):
    """A tensor in chunks, and the same in one piece."""
    whole = torch.randn(5, 6)
    boxes = [(offsets, whole[offsets[0] :, offsets[1] :][: sizes[0], : sizes[1]].clone()) for offsets, sizes in cut]
    parts = [(offsets, in_file(box) if request.param else box) for offsets, box in boxes]
    return ChunkedTensor((5, 6), torch.float32, parts), whole


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64, torch.int64])
def test_casts(pair, dtype):
    tensor, whole = pair
    result = tensor.to(dtype)
    assert torch.equal(result, whole.to(dtype))
    assert result.stride() == whole.stride()
    assert (type(result) is torch.Tensor) == (dtype != torch.float32)
    assert torch.equal(tensor.to(dtype, copy=True), whole.to(dtype))
    assert type(tensor.to(dtype, copy=True)) is torch.Tensor


def test_other_operations(pair):
    tensor, whole = pair
    assert torch.equal(tensor + 1, whole + 1)
    assert torch.equal(torch.cat([tensor, tensor]), torch.cat([whole, whole]))
    assert torch.equal(tensor[1:, 2], whole[1:, 2])
    assert torch.equal(tensor.reshape(-1).isnan(), whole.reshape(-1).isnan())
    assert tensor.detach().numpy().tolist() == whole.tolist()
    assert repr(tensor.sum()) == repr(whole.sum())
    assert (tensor.shape, tensor.dtype, tensor.nbytes, tensor.stride()) == (whole.shape, whole.dtype, 120, (6, 1))


def test_copies(pair):
    tensor, whole = pair
    for target in (torch.zeros(5, 6, dtype=BF16), torch.zeros(6, 5).t(), torch.zeros(5, 12)[:, ::2]):
        assert target.copy_(tensor) is target
        assert torch.equal(target, whole.to(target.dtype))
    assert torch.equal(torch.zeros(2, 5, 6).copy_(tensor), whole.expand(2, 5, 6))
    target = torch.zeros(5, 6)
    fastopt.copy_([target], [tensor])
    assert torch.equal(target, whole)


def test_what_is_written_to_it_stays(pair):
    tensor, whole = pair
    assert tensor.mul_(2) is tensor
    tensor.add_(tensor).clamp_(max=3)
    expected = (whole * 2 + whole * 2).clamp(max=3)
    assert torch.equal(tensor.to(F64), expected.to(F64))
    target = torch.zeros(5, 6)
    torch.add(tensor, 1, out=target)
    assert torch.equal(target, expected + 1)
    tensor[1:] = 7
    assert torch.equal(tensor.to(F64)[1:], torch.full((4, 6), 7.0, dtype=F64))
    tensor.copy_(target)
    assert torch.equal(copying.deepcopy(tensor), target)


def test_deep_copies_and_pickles_are_plain(pair):
    tensor, whole = pair
    one, two = copying.deepcopy([tensor, tensor])
    assert one is two
    torch.save(tensor, stream := io.BytesIO())
    stream.seek(0)
    for plain in (one, torch.load(stream, weights_only=True)):
        assert type(plain) is torch.Tensor
        assert torch.equal(plain, whole)
        assert plain.untyped_storage().nbytes() == whole.nbytes


@pytest.mark.parametrize(
    "whole",
    [
        torch.randn(4, 6).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(1, 7, 1).transpose(0, 2),
        torch.tensor(1.5),
        torch.randn(1),
        torch.randn(3, dtype=torch.complex128),
        torch.randn(40) > 0,
    ],
    ids=["transposed", "channels last", "ones", "scalar", "one element", "complex", "bool"],
)
def test_strides(whole, piece, in_file, backend):
    tensor = ChunkedTensor(whole.shape, whole.dtype, [([0] * whole.dim(), in_file(whole))], whole.stride())
    for result in (copying.deepcopy(tensor), tensor.to(torch.complex64)):
        assert torch.equal(result, whole.to(result.dtype))
        assert result.stride() == whole.stride()


def test_a_file_that_has_ended(in_file, backend):
    elements = in_file(torch.randn(100, 100))
    os.truncate(elements.file.path, 20_000)
    tensor = ChunkedTensor((100, 100), torch.float32, [((0, 0), elements)])
    for target in (torch.zeros(100, 100), torch.zeros(100, 100, dtype=BF16), torch.zeros(200, 100)[::2]):
        with pytest.raises(OSError, match="the file has ended before") as caught:
            target.copy_(tensor)
        assert f"entry 'it' of {elements.file.path}" in caught.value.__notes__


def test_dense():
    assert is_dense((), ())
    assert is_dense((2, 3), (3, 1))
    assert is_dense((2, 3), (1, 2))
    assert is_dense((2, 1, 3), (1, 77, 2))
    assert not is_dense((2, 3), (4, 1))
    assert not is_dense((2, 3), (0, 1))
    assert not is_dense((2, 3), (2, 1))
