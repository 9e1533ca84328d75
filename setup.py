"""Builds the extension modules with CMake; everything else is in pyproject.toml.

``_dla_native`` is always built; ``_dla_native_cuda`` as the environment variable ``DLA_BUILD_CUDA``
says: 1 it must, 0 it is not, unset if there is an nvcc that can (csrc/cuda.cmake).
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Drives csrc/CMakeLists.txt instead of the compiler; all modules at once."""

    def build_extensions(self) -> None:
        try:
            self.cmake()
        except subprocess.CalledProcessError:
            # The reason may be in the C++ sources: then the second attempt fails as well.
            if os.environ.get("DLA_BUILD_CUDA") or not self.tries_cuda():
                self.give_up()
            print("dla-kernels: the build failed; trying again without CUDA kernels", flush=True)
            try:
                self.cmake("-DDLA_CUDA_FAILED=nvcc failed when dla-kernels was built")
            except subprocess.CalledProcessError:
                self.give_up()

    def cmake(self, *options: str) -> None:
        """Configures and builds."""
        output = Path(self.get_ext_fullpath("_dla_native")).resolve().parent
        build = Path(self.build_temp).resolve()
        # cmake and ninja from the interpreter's own environment, activated or not.
        scripts = os.path.dirname(sys.executable)
        env = {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), scripts])}
        # --fresh: an isolated build's cached paths die with its environment.
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(build)]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DDLA_OUTPUT_DIR={output}"]
        try:
            subprocess.run([*configure, *options], check=True, env=env)
            subprocess.run(["cmake", "--build", str(build)], check=True, env=env)
        except FileNotFoundError:
            sys.exit("dla-kernels: no cmake found; pip install cmake ninja pybind11 provides it")

    def tries_cuda(self) -> bool:
        """Whether the attempt got as far as nvcc."""
        cache = Path(self.build_temp) / "CMakeCache.txt"
        return cache.exists() and "DLA_TRIES_CUDA:" in cache.read_text()

    def give_up(self) -> None:
        """Ends the installation."""
        sys.exit("dla-kernels: cmake failed; the reason is above")


setup(
    # Optional: it need not be there in the end.
    ext_modules=[Extension("_dla_native", []), Extension("_dla_native_cuda", [], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
