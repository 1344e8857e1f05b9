"""torch's own methods as the oracle, and a comparison of two outcomes that overlooks nothing.

`copy=False` is held to `Optimizer.load_state_dict(optimizer, sd)`, `copy=True` to the same with `copy.deepcopy(sd)`.
"""

import copy as copying
import dataclasses
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch.optim import Optimizer

TORCH_STATE_DICT = Optimizer.state_dict
TORCH_LOAD_STATE_DICT = Optimizer.load_state_dict

ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type)


class Bare(Optimizer):
    """An optimizer with no rule of its own: what it holds after a load is what the load gave it."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)


def torch_load(optimizer: Optimizer, state_dict: Any, *, copy: bool) -> None:
    TORCH_LOAD_STATE_DICT(optimizer, copying.deepcopy(state_dict) if copy else state_dict)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A parameter; of a dtype without gradients, the closest that an optimizer takes."""
    values = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape).to(dtype)
    return torch.nn.Parameter(values) if dtype.is_floating_point or dtype.is_complex else values


def adam(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, **options: Any) -> torch.optim.Adam:
    """An Adam over parameters of these shapes, the last of which has a group of its own."""
    params = [parameter(*shape, dtype=dtype) for shape in shapes or ((3, 4), (5,), ())]
    return torch.optim.Adam([{"params": params[:-1]}, {"params": params[-1:], "lr": 0.5}], **options)


def train(
    optimizer: Optimizer,
    *,
    steps: int = 2,
    seed: int = 0,
    skip: tuple[int, ...] = (),
    grad: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> None:
    """Steps with gradients that depend on the seed and the parameters' own values; those in `skip` get none."""
    generator = torch.Generator().manual_seed(seed)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        noises = [torch.randn(p.shape, generator=generator, dtype=torch.complex128) for p in params]

        def closure(noises: list[torch.Tensor] = noises) -> torch.Tensor:
            for index, (param, noise) in enumerate(zip(params, noises, strict=True)):
                plain_noise = noise if param.is_complex() else noise.real
                if index not in skip:
                    param.grad = grad((param.detach() * 0.1 + plain_noise).to(param.dtype))
            return sum((p.detach().abs().double().sum() for p in params), start=torch.zeros((), dtype=torch.double))

        optimizer.step(closure)


def trained(optimizer: Optimizer, **options: Any) -> Optimizer:
    train(optimizer, **options)
    return optimizer


def outcome(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What a call returns, or what it raises; torch's own warnings about values are not the question here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(), None
        except Exception as error:
            return None, error


def assert_same_error(actual: Exception | None, expected: Exception | None, *, text: bool = True) -> None:
    assert type(actual) is type(expected), f"{actual!r}, and torch {expected!r}"
    if text:
        assert str(actual) == str(expected)


def assert_same_load(
    actual: Optimizer, expected: Optimizer, *, given: Any = None, given_to_torch: Any = None, copy: bool
) -> None:
    """Both optimizers hold the same; where nothing is copied, they share the same of what they were given."""
    comparison = Comparison()
    if copy:
        assert_nothing_shared(actual, given)
    else:
        comparison.same(given, given_to_torch, "given")
    comparison.optimizers(actual, expected)


def assert_nothing_shared(optimizer: Optimizer, given: Any) -> None:
    """No tensor, memory or array of the optimizer's is one of the given."""
    held = set(memories((optimizer.state, optimizer.param_groups)))
    assert held.isdisjoint(memories(given))


def memories(value: Any) -> Iterator[int]:
    """Identities of all memory below a value that somebody could write to."""
    for leaf in leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield id(leaf)
            if leaf.layout is torch.strided and not is_wrapper(leaf):
                yield leaf.untyped_storage()._cdata
        elif isinstance(leaf, numpy.ndarray):
            yield id(leaf)


def leaves(value: Any) -> Iterator[Any]:
    """Everything below a value that is no container."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(key)
            yield from leaves(item)
    elif isinstance(value, list | tuple | set | frozenset | deque) and not isinstance(value, torch.Size):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def is_wrapper(tensor: torch.Tensor) -> bool:
    return type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def fingerprint(value: Any, path: str = "") -> list[tuple[Any, ...]]:
    """Objects and bytes below a value; equal later on where nothing was replaced and nothing written."""
    if isinstance(value, Optimizer):
        return fingerprint(value.param_groups, "groups") + fingerprint(value.state, "state")
    here: list[tuple[Any, ...]] = [(path, type(value), None if isinstance(value, ATOMS) else id(value))]
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and not (value.is_meta or is_wrapper(value) or value.is_quantized):
            version = None if value.is_inference() else value._version
            here.append((path, value.untyped_storage()._cdata, version, bits(value).tobytes()))
    elif isinstance(value, Mapping):
        for position, (key, item) in enumerate(value.items()):
            here += fingerprint(key, f"{path}.key{position}") + fingerprint(item, f"{path}.{position}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            here += fingerprint(item, f"{path}.{position}")
    else:
        here.append((path, repr(value)))
    return here


def bits(tensor: torch.Tensor) -> numpy.ndarray:
    """The elements' bytes, in order; every NaN is the same."""
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu")
    plain.view(tensor.shape).copy_(tensor.detach())
    if plain.is_complex():
        plain = torch.view_as_real(plain).reshape(-1)
    raw = plain.view(torch.uint8).reshape(plain.numel(), plain.element_size()).numpy()
    if plain.is_floating_point():
        raw = raw.copy()
        raw[plain.double().isnan().numpy()] = 255
    return raw


class Comparison:
    """Compares structures pairwise: values, types and order, and which of their objects and storages are the same ones.

    All that is compared with one Comparison is one pair of object graphs: where `a` and `b` are one object on the one
    side, their partners are one object on the other.
    """

    def __init__(self) -> None:
        self.partners: dict[tuple[str, int], int] = {}
        self.alive: list[Any] = []

    def optimizers(self, actual: Optimizer, expected: Optimizer) -> None:
        assert type(actual) is type(expected)
        self.same(actual.param_groups, expected.param_groups, "param_groups")
        self.same(actual.state, expected.state, "state")

    def same(self, actual: Any, expected: Any, place: str = "value") -> None:
        if isinstance(expected, Disguise):
            self.undisguised(actual, expected, place)
            return
        disguise = DISGUISED_TYPES.get(type(expected))
        assert type(actual) is (disguise.original if disguise else type(expected)), place
        if isinstance(expected, ATOMS):
            assert repr(actual) == repr(expected), place
            return
        self.partner("object", id(actual), id(expected), place)
        self.alive += (actual, expected)
        if isinstance(expected, torch.Tensor):
            self.tensors(actual, expected, place)
        elif isinstance(expected, Mapping):
            self.mappings(actual, expected, place)
        elif isinstance(expected, set | frozenset):
            assert Counter(map(set_item, actual)) == Counter(map(set_item, expected)), place
        elif isinstance(expected, list | tuple | deque):
            assert getattr(actual, "maxlen", None) == (disguise or Original(None)).maxlen(expected), place
            self.sequences(actual, expected, place)
        elif isinstance(expected, numpy.ndarray | numpy.generic):
            assert (actual.dtype, actual.shape, actual.tobytes()) == (
                expected.dtype,
                expected.shape,
                expected.tobytes(),
            )
        else:
            self.same(vars(actual) if hasattr(actual, "__dict__") else repr(actual), vars_or_repr(expected), place)

    def undisguised(self, actual: Any, expected: "Disguise", place: str) -> None:
        assert type(actual) is type(expected.value), place
        if isinstance(actual, numpy.ndarray):
            self.partner("object", id(actual), id(expected), place)
            self.alive += (actual, expected)
            assert (actual.dtype, actual.shape) == (expected.value.dtype, expected.value.shape), place
            assert actual.tobytes() == expected.value.tobytes(), place
        else:
            assert actual == expected.value, place

    def mappings(self, actual: Any, expected: Any, place: str) -> None:
        if isinstance(expected, defaultdict):
            assert actual.default_factory is expected.default_factory, place
        assert len(actual) == len(expected), f"{place}: {list(actual)}, and torch {list(expected)}"
        for position, (one, other) in enumerate(zip(actual.items(), expected.items(), strict=True)):
            name = repr(one[0]) if isinstance(one[0], str | int) else position
            self.same(one[0], other[0], f"{place}, key {name}")
            self.same(one[1], other[1], f"{place}[{name}]")

    def sequences(self, actual: Any, expected: Any, place: str) -> None:
        assert len(actual) == len(expected), place
        for position, (one, other) in enumerate(zip(actual, expected, strict=True)):
            self.same(one, other, f"{place}[{position}]")

    def tensors(self, actual: torch.Tensor, expected: torch.Tensor, place: str) -> None:
        assert about(actual) == about(expected), place
        if isinstance(expected, torch._subclasses.FakeTensor):
            return
        self.same(vars(actual) | {}, vars(expected) | {}, f"{place}.__dict__")
        if expected.is_leaf:
            self.same(actual.grad, expected.grad, f"{place}.grad")
        if hasattr(expected, "__tensor_flatten__"):
            for name in expected.__tensor_flatten__()[0]:
                self.same(getattr(actual, name), getattr(expected, name), f"{place}.{name}")
            return
        if expected.layout is not torch.strided:
            for one, other in zip(sparse_parts(actual), sparse_parts(expected), strict=True):
                self.same(one, other, f"{place}, sparse part")
            return
        memory, expected_memory = actual.untyped_storage(), expected.untyped_storage()
        self.partner("storage", memory._cdata, expected_memory._cdata, place)
        assert memory.nbytes() == expected_memory.nbytes(), place
        if not expected.is_meta:
            one, other = (t.int_repr() if t.is_quantized else t for t in (actual, expected))
            assert bits(one).tobytes() == bits(other).tobytes(), f"{place}: {actual}, and torch {expected}"

    def partner(self, kind: str, actual: int, expected: int, place: str) -> None:
        assert self.partners.setdefault((f"actual {kind}", actual), expected) == expected, f"{place}: another {kind}"
        assert self.partners.setdefault((f"expected {kind}", expected), actual) == actual, f"{place}: another {kind}"


def about(tensor: torch.Tensor) -> dict[str, Any]:
    """What a tensor says of itself, values and memory aside."""
    strided = tensor.layout is torch.strided
    grad_fn = tensor.grad_fn
    return {
        "dtype": tensor.dtype,
        "device": tensor.device,
        "layout": tensor.layout,
        "shape": tensor.shape,
        "stride": tensor.stride() if strided else None,
        "offset": tensor.storage_offset() if strided else None,
        "requires_grad": tensor.requires_grad,
        "grad_fn": None if grad_fn is None else grad_fn.name(),
        "conj": tensor.is_conj(),
        "neg": tensor.is_neg(),
        "inference": tensor.is_inference(),
        "coalesced": tensor.is_coalesced() if tensor.layout is torch.sparse_coo else None,
    }


def sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    return tensor.crow_indices(), tensor.col_indices(), tensor.values()


def vars_or_repr(value: Any) -> Any:
    return vars(value) if hasattr(value, "__dict__") else repr(value)


def set_item(item: Any) -> tuple[type, str]:
    value = item.value if isinstance(item, Disguise) else item
    return type(value), repr(value)


@dataclasses.dataclass(frozen=True, repr=False)
class Disguise:
    """A value that torch would damage or refuse, as something that it lets pass: an object without items."""

    value: Any

    def __hash__(self) -> int:
        return hash(repr(self.value))

    def __repr__(self) -> str:
        return repr(self.value)


@dataclasses.dataclass(frozen=True)
class Original:
    """What a disguised container stands for."""

    original: type | None
    length: int | None = None

    def maxlen(self, container: Any) -> int | None:
        return self.length if self.original else getattr(container, "maxlen", None)


DISGUISED_TYPES: dict[type, Original] = {}


def disguise_type(disguise: type, original: type, maxlen: int | None = None) -> None:
    """Have comparisons take `disguise` on torch's side for `original` (a deque: of this maxlen) on fastopt's."""
    DISGUISED_TYPES[disguise] = Original(original, maxlen)
