"""Imports and includes run one way: from the top of these tables to the bottom."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each module may import from the lines below its own, and from no other.
PYTHON_LAYERS = (
    ("fastopt.__main__",),
    ("fastopt.cli",),
    ("fastopt.cli.bench", "fastopt.cli.convert", "fastopt.cli.look"),
    ("fastopt.cli.outcome", "fastopt.cli.progress", "fastopt.cli.sources"),
    ("fastopt",),
    ("fastopt.distributed",),
    ("fastopt.distributed.loading", "fastopt.distributed.reader", "fastopt.distributed.saving"),
    (
        "fastopt.distributed.contents",
        "fastopt.distributed.sharing",
        "fastopt.distributed.staging",
        "fastopt.distributed.writer",
    ),
    (
        "fastopt.distributed.names",
        "fastopt.distributed.planner",
        "fastopt.distributed.ranks",
        "fastopt.distributed.targets",
    ),
    ("fastopt.distributed.boxes",),
    ("fastopt.patch",),
    ("fastopt.checkpoint",),
    ("fastopt.matching",),
    ("fastopt.inspection", "fastopt.recast", "fastopt.snapshot"),
    ("fastopt.writing",),
    ("fastopt.inspection.flaws",),
    ("fastopt.inspection.check", "fastopt.inspection.diff", "fastopt.inspection.summary"),
    ("fastopt.inspection.siblings",),
    ("fastopt.inspection.hyperparameters", "fastopt.inspection.shapes"),
    ("fastopt.inspection.problems",),
    ("fastopt.inspection.places", "fastopt.inspection.values"),
    ("fastopt.background", "fastopt.saving"),
    ("fastopt.batch", "fastopt.state_dict"),
    ("fastopt.donation", "fastopt.inplace"),
    ("fastopt.casting",),
    ("fastopt.flattened", "fastopt.policy", "fastopt.report"),
    ("fastopt.files.formats",),
    ("fastopt.files.dcp_folder",),
    ("fastopt.files.dcp_shards", "fastopt.files.dcp_writer"),
    ("fastopt.files.dcp_tree",),
    ("fastopt.files.dcp_metadata",),
    ("fastopt.files.safetensors_file", "fastopt.files.torch_file"),
    ("fastopt.files.in_file",),
    ("fastopt.backends",),
    ("fastopt.backends.native",),
    ("fastopt.backends.python",),
    ("fastopt.backends.interface",),
    ("fastopt.files.torch_zip",),
    ("fastopt.files.torch_readable",),
    (
        "fastopt.files.atomic",
        "fastopt.files.atomic_folder",
        "fastopt.files.metadata",
        "fastopt.files.reading",
        "fastopt.files.torch_globals",
        "fastopt.files.staging",
        "fastopt.files.torch_checks",
        "fastopt.files.torch_pickle",
    ),
    ("fastopt.audit",),
    ("fastopt.dtensors",),
    (
        "fastopt.errors",
        "fastopt.chunked",
        "fastopt.collector",
        "fastopt.containers",
        "fastopt.files",
        "fastopt.files.archive",
        "fastopt.files.beside",
        "fastopt.files.checksums",
        "fastopt.files.writeback",
        "fastopt.startup",
        "fastopt.text",
    ),
    ("fastopt._C",),
)
CPP_LAYERS = (("csrc/bindings",), ("csrc/cuda",), ("csrc/core",))

# What a folder may include in angle brackets, and nothing else; where there is no entry, anything.
STANDARD = r"[a-z_0-9]+|sys/mman\.h|fcntl\.h|unistd\.h|immintrin\.h|arm_neon\.h"
ANGLED = {"csrc/core": STANDARD, "csrc/cuda": rf"{STANDARD}|cuda[a-z_0-9]*\.h|cub/.*|cooperative_groups\.h"}

Arrow = tuple[str, str]


def rank(layers: tuple[tuple[str, ...], ...], name: str) -> int:
    for index, layer in enumerate(layers):
        if name in layer:
            return index
    raise AssertionError(f"{name} has no place in the order: give it one in {Path(__file__).name}")


def upward(layers: tuple[tuple[str, ...], ...], arrows: list[Arrow]) -> list[str]:
    return [f"{above} -> {below}" for above, below in arrows if rank(layers, above) >= rank(layers, below)]


# ---- Python ----


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python_arrows(root: Path) -> list[Arrow]:
    paths = {module_name(path, root): path for path in sorted((root / "fastopt").rglob("*.py"))}
    modules = {*paths, "fastopt._C"}
    arrows = []
    for module, path in paths.items():
        for name in imported_names(ast.parse(path.read_text())):
            # `from a.b import c` names a module or something in one.
            target = name if name in modules else name.rpartition(".")[0]
            if target.split(".")[0] == "fastopt":
                assert target in modules, f"{module} imports {name}, which is no module of fastopt"
                arrows.append((module, target))
    return arrows


def test_python_imports_run_one_way() -> None:
    arrows = python_arrows(ROOT)
    assert arrows
    assert upward(PYTHON_LAYERS, arrows) == []


def test_the_order_of_python_names_no_module_that_is_gone() -> None:
    existing = {module_name(path, ROOT) for path in (ROOT / "fastopt").rglob("*.py*") if path.suffix in (".py", ".pyi")}
    assert {name for layer in PYTHON_LAYERS for name in layer} == existing


@pytest.mark.parametrize(
    "line",
    [
        "import fastopt.state_dict",
        "from fastopt import state_dict",
        "from fastopt.state_dict import load",
        "def later():\n    from fastopt.cli import main",
        "import typing\nif typing.TYPE_CHECKING:\n    from fastopt.batch import to",
        "from fastopt.backends import native",
    ],
)
def test_an_import_against_the_order_is_found(tmp_path: Path, line: str) -> None:
    for module in ("cli", "batch", "state_dict", "backends/__init__", "backends/native", "__init__"):
        path = tmp_path / "fastopt" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "fastopt" / "errors.py").write_text(line)
    assert len(upward(PYTHON_LAYERS, python_arrows(tmp_path))) == 1


def test_a_module_without_a_place_in_the_order_is_found(tmp_path: Path) -> None:
    (tmp_path / "fastopt").mkdir()
    (tmp_path / "fastopt" / "errors.py").write_text("")
    (tmp_path / "fastopt" / "novelty.py").write_text("import fastopt.errors")
    with pytest.raises(AssertionError, match=r"fastopt\.novelty has no place"):
        upward(PYTHON_LAYERS, python_arrows(tmp_path))


# ---- C++ ----


def cpp_files(root: Path) -> list[Path]:
    return sorted(p for p in (root / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))


def included(path: Path) -> list[str]:
    """What a file includes, as written: `<...>` or `"..."`."""
    return re.findall(r'^\s*#\s*include\s*(<[^>]+>|"[^"]+")', path.read_text(), flags=re.MULTILINE)


def folder_of(path: Path, root: Path) -> str:
    return path.relative_to(root).parent.as_posix()


def cpp_arrows(root: Path) -> list[tuple[Path, Path]]:
    """Who includes whom within csrc; every quoted include has to be there."""
    arrows = []
    for path in cpp_files(root):
        for name in included(path):
            if name.startswith('"'):
                target = (path.parent / name.strip('"')).resolve()
                assert target.exists(), f"{path} includes {name}, which is not beside it"
                arrows.append((path, target))
    return arrows


def foreign_includes(root: Path) -> list[str]:
    found = []
    for path in cpp_files(root):
        allowed = ANGLED.get(folder_of(path, root))
        angled = (name.strip("<>") for name in included(path) if name.startswith("<"))
        found += [f"{path.name}: <{name}>" for name in angled if allowed and not re.fullmatch(allowed, name)]
    return found


def cycle_in(arrows: list[tuple[Path, Path]]) -> list[str]:
    """Files that are left when those that include none of the rest are taken away, over and over."""
    left = {path for arrow in arrows for path in arrow}
    while leaves := {path for path in left if not any(a == path and b in left for a, b in arrows)}:
        left -= leaves
    return sorted(path.name for path in left)


def folder_arrows(root: Path) -> list[Arrow]:
    pairs = {(folder_of(a, root), folder_of(b, root)) for a, b in cpp_arrows(root)}
    return sorted((a, b) for a, b in pairs if a != b)


def test_cpp_includes_run_one_way() -> None:
    assert folder_arrows(ROOT)
    assert upward(CPP_LAYERS, folder_arrows(ROOT)) == []
    assert cycle_in(cpp_arrows(ROOT)) == []


def test_every_folder_of_cpp_has_a_place_in_the_order() -> None:
    for path in cpp_files(ROOT):
        rank(CPP_LAYERS, folder_of(path, ROOT))


def test_core_and_cuda_include_neither_torch_nor_python() -> None:
    assert any(folder_of(path, ROOT) == "csrc/core" for path in cpp_files(ROOT))
    assert foreign_includes(ROOT) == []


@pytest.mark.parametrize("folder", ["core", "cuda"])
@pytest.mark.parametrize(
    "header", ["torch/extension.h", "ATen/ATen.h", "c10/util/Exception.h", "pybind11/pybind11.h", "Python.h"]
)
def test_a_foreign_include_is_found(tmp_path: Path, folder: str, header: str) -> None:
    path = tmp_path / "csrc" / folder / "a.cpp"
    path.parent.mkdir(parents=True)
    path.write_text(f"#include <vector>\n#  include <{header}>\n")
    assert foreign_includes(tmp_path) == [f"a.cpp: <{header}>"]


def test_core_knows_no_cuda(tmp_path: Path) -> None:
    path = tmp_path / "csrc" / "core" / "a.h"
    path.parent.mkdir(parents=True)
    path.write_text("#include <cuda_runtime_api.h>\n")
    assert foreign_includes(tmp_path) == ["a.h: <cuda_runtime_api.h>"]


def test_an_include_against_the_order_and_a_cycle_are_found(tmp_path: Path) -> None:
    for name, text in {
        "core/a.h": '#include "../bindings/b.h"',
        "bindings/b.h": '#include "../core/a.h"',
    }.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert upward(CPP_LAYERS, folder_arrows(tmp_path)) == ["csrc/core -> csrc/bindings"]
    assert cycle_in(cpp_arrows(tmp_path)) == ["a.h", "b.h"]


def test_the_module_is_defined_in_a_file_that_does_nothing_else() -> None:
    [module] = [path for path in cpp_files(ROOT) if "PYBIND11_MODULE" in path.read_text()]
    assert module == ROOT / "csrc" / "bindings" / "module.cpp"
    code = re.sub(r"^\s*(//.*|#.*)$", "", module.read_text(), flags=re.MULTILINE).strip()
    head, brace, rest = code.partition("{")
    assert re.fullmatch(r"PYBIND11_MODULE\(_C, \w+\)", head.strip())
    assert depth_ends_at(brace + rest) == len(brace + rest), "something stands after PYBIND11_MODULE"


def depth_ends_at(code: str) -> int:
    """Where the block that `code` begins with is closed."""
    depth = 0
    for position, character in enumerate(code, start=1):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return position
    raise AssertionError("a block is never closed")
