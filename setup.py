"""Drives CMakeLists.txt, which describes the native build, and maps kernels/ into the package."""

import fcntl
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures, builds and installs both modules with CMake: into the source tree, or into the wheel's folder."""

    def run(self) -> None:
        if self.inplace:
            # A folder of its own, kept between calls, so that an edit recompiles only what it touched.
            build_dir, package_dir = ROOT / "build" / f"inplace-{sys.implementation.cache_tag}", ROOT / "fault_a2a"
        else:
            build_dir, package_dir = Path(self.build_temp).resolve(), Path(self.build_lib).resolve() / "fault_a2a"
        build_dir.mkdir(parents=True, exist_ok=True)
        with open(build_dir / ".lock", "w") as lock:  # two builds at once in one folder would tread on each other
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._configure(build_dir)
            _cmake("--build", build_dir, "--parallel", str(os.cpu_count() or 1), quiet=False)
            _cmake("--install", build_dir, "--prefix", package_dir)
            if self.inplace:  # never into a wheel: what benchmarks alone need, if CMAKE_ARGS asked for it
                _cmake("--install", build_dir, "--prefix", package_dir, "--component", "benchmark")

    def _configure(self, build_dir: Path) -> None:
        import pybind11

        _cmake(
            *("-S", ROOT, "-B", build_dir, "-G", "Ninja"),
            # A wheel's build may find the leftovers of an isolated environment that is gone.
            *([] if self.inplace else ["--fresh"]),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )

    # CMake places the files itself; setuptools has nothing to copy, and must not look for what it did not build.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _tool(name: str) -> str:
    """Where cmake or ninja is: the wheel of this very environment first, since PATH may have an older one."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        found = shutil.which(name)
        if found is None:
            raise SystemExit(f"the build needs {name}: run `python -m pip install {name}`, then build again") from None
        return found
    return os.path.join(getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR, name)


def _cmake(*arguments: str | Path, quiet: bool = True) -> None:
    done = subprocess.run([_tool("cmake"), *arguments], capture_output=quiet, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout or ''}{done.stderr or ''}cmake {arguments[0]} failed, for the reason above")


def _packages() -> list[str]:
    kernels = ["fault_a2a.kernels", *(f"fault_a2a.kernels.{name}" for name in find_namespace_packages("kernels"))]
    return [*find_packages(include=["fault_a2a", "fault_a2a.*"]), *kernels, "fault_a2a.benchmarks"]


setup(
    packages=_packages(),
    package_dir={"fault_a2a.kernels": "kernels", "fault_a2a.benchmarks": "benchmarks"},
    package_data={"": ["*.cpp", "*.cu", "*.cuh", "*.hpp"], "fault_a2a": ["py.typed"]},
    ext_modules=[Extension("fault_a2a._C", sources=[]), Extension("fault_a2a._C_hooks", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
