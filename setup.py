"""Builds fastopt with its C++ extension, or without it where that cannot be built.

FASTOPT_BUILD=auto (default)  the extension with CUDA where torch has CUDA and nvcc is there, else for the CPU,
                              else, without torch or a compiler, the pure-Python package with a warning that says why
             =cpu | cuda      that extension, or an error
             =none            the pure-Python package
"""

import os
import shutil
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup

CHOICES = ("auto", "cpu", "cuda", "none")


NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]  # the last: one rule for rounding, on host and device


def sources(with_cuda: bool) -> list[str]:
    kinds = (".cpp", ".cu") if with_cuda else (".cpp",)
    found = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in kinds)
    if not found:
        raise RuntimeError("no sources: csrc/ is not there")
    return found


def import_torch_of_target() -> None:
    # An isolated build hides the environment it installs into, yet the extension has to match the torch it will run
    # with, which is the one over there.
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    import torch.utils.cpp_extension  # noqa: F401


def extension(choice: str) -> Extension:
    """The extension that `choice` asks for; raises RuntimeError or ImportError where it cannot be built."""
    import_torch_of_target()
    import torch
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        raise RuntimeError(f"no C++ compiler: {compiler!r} is not on PATH")
    missing = missing_for_cuda()
    if choice == "cuda" and missing:
        raise RuntimeError(f"no CUDA build: {missing}")
    with_cuda = choice != "cpu" and not missing
    print(
        f"fastopt: building the extension for {'CUDA and CPU' if with_cuda else 'the CPU'}: FASTOPT_BUILD={choice}, "
        f"torch {torch.__version__}, {f'no CUDA as {missing}' if missing else f'CUDA in {cpp_extension.CUDA_HOME}'}"
    )
    # -fopenmp while compiling only: at::parallel_for needs the pragmas, and torch brings the one OpenMP runtime.
    flags = ["-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-O3", "-g0"]
    flags.append("-fno-trapping-math")  # nobody reads the exception flags, and comparisons vectorise without them
    flags += [f"-DFASTOPT_TORCH_VERSION={torch.__version__}"]  # on the command line: another torch rebuilds everything
    flags += [f"-isystem{path}" for path in cpp_extension.include_paths()]  # warnings are for our code
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    return kind(
        "fastopt._C",
        sources(with_cuda),
        extra_compile_args={"cxx": flags + ["-DFASTOPT_WITH_CUDA"] * with_cuda, "nvcc": NVCC_FLAGS},
    )


def missing_for_cuda() -> str:
    """Why there can be no CUDA, or nothing where there can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "torch.version.cuda is None"
    if CUDA_HOME is None:
        return "there is no nvcc, and no CUDA_HOME"
    # torch takes the folder above nvcc's, which is another one where the nvcc on PATH is a script that calls it.
    if not (Path(CUDA_HOME) / "include" / "cuda_runtime.h").exists():
        return f"{CUDA_HOME} has no include/cuda_runtime.h; CUDA_HOME says where the toolkit is"
    return ""


def build_options() -> dict:
    choice = os.environ.get("FASTOPT_BUILD") or "auto"
    if choice not in CHOICES:
        raise SystemExit(f"fastopt: FASTOPT_BUILD={choice!r} is none of {', '.join(CHOICES)}")
    if choice == "none":
        return {}
    try:
        built = extension(choice)
    except (ImportError, RuntimeError) as cause:
        if choice != "auto":
            raise SystemExit(f"fastopt: FASTOPT_BUILD={choice}: {cause}") from cause
        warnings.warn(
            f"fastopt: building the pure-Python package, slower and with the same results: {cause}", stacklevel=1
        )
        return {}
    from torch.utils.cpp_extension import BuildExtension

    return {"ext_modules": [built], "cmdclass": {"build_ext": BuildExtension}}


setup(**build_options())
