"""Builds icl_ft_fast._C; everything else about the package is in pyproject.toml."""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# Apple's compiler has no OpenMP: there the ops run on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

ParallelCompile().install()  # files at a time: as many as there are processors

setup(
    ext_modules=[
        Pybind11Extension(
            "icl_ft_fast._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *OPENMP],
            extra_link_args=OPENMP,  # the runtime torch has loaded, as long as torch is imported first
        )
    ],
    cmdclass={"build_ext": build_ext},
)
