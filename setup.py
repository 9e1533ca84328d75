"""Builds the extension module `_dla_native` with CMake; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Drives csrc/CMakeLists.txt instead of the compiler."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        # cmake and ninja from the interpreter's own environment, activated or not.
        scripts = os.path.dirname(sys.executable)
        env = {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), scripts])}
        # --fresh: an isolated build's cached paths die with its environment.
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(build)]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DDLA_OUTPUT_DIR={output}"]
        try:
            subprocess.run(configure, check=True, env=env)
            subprocess.run(["cmake", "--build", str(build)], check=True, env=env)
        except FileNotFoundError:
            sys.exit("dla-kernels: no cmake found; pip install cmake ninja pybind11 provides it")
        except subprocess.CalledProcessError as error:
            sys.exit(f"dla-kernels: cmake failed ({error.returncode}); the reason is above")


setup(ext_modules=[Extension("_dla_native", sources=[])], cmdclass={"build_ext": CMakeBuild})
