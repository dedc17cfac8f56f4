"""The package is described in setup.cfg; this adds one step: its CPU kernels are compiled while it is installed."""

import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    """Compiles the kernels into the user's cache, where the installed package finds them by what they are made of.

    Without a compiler the installation goes on: the kernels are tried again, and what is missing said, on first use.
    """

    def run(self) -> None:
        super().run()
        subprocess.run([sys.executable, str(Path(__file__).parent / "kernels" / "cpu_build.py")], check=False)


setup(cmdclass={"build_py": BuildWithKernels})
