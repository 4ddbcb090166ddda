"""What pyproject.toml cannot say: the native kernels are compiled where that is possible, and done without elsewhere.

Whatever goes wrong in compiling them, the package is installed: products then run on XLA, and say so once.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
NAME = "qjax.kernels.cpu.native"


def the_build():
    """Return qjax/kernels/cpu/build.py as a module, without importing qjax, which needs what is not installed yet."""
    spec = importlib.util.spec_from_file_location("_qjax_build", HERE / "qjax" / "kernels" / "cpu" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Compiles the library by the command that a plain checkout is served with as well."""

    def get_ext_filename(self, fullname):
        """Return the name of the library, which is no Python module."""
        if fullname.rpartition(".")[2] != "native":
            return super().get_ext_filename(fullname)
        build = the_build()
        try:
            name = build.file_name(build.interface(build.headers()))
        except build.BuildError:
            name = "native.so"  # never made
        return os.path.join(*fullname.split(".")[:-1], name)

    def build_extension(self, ext):
        """Make the library, or say why there is none."""
        build = the_build()
        try:
            if os.environ.get("QJAX_NO_NATIVE"):
                raise build.BuildError("QJAX_NO_NATIVE is set")
            build.build(Path(self.get_ext_fullpath(ext.name)).parent)
        except (build.BuildError, OSError) as error:
            print(f"warning: qjax is installed without its CPU kernels: {error}")


setup(
    ext_modules=[Extension(NAME, sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
