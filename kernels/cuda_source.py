"""The CUDA sources in kernels/cuda, each as one text. Standard library only."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "cuda"
_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)

# Flags of every compilation, on a GPU machine and in the tests. CuPy adds -ftz=true to them.
OPTIONS = ("--std=c++17",)


@cache
def source_text(name: str) -> str:
    """cuda/NAME.cu with our own headers written in, each where it is first included.

    CuPy's cache knows a kernel by its text: a header that it had to look up itself could change unnoticed. #line keeps
    the compiler's messages pointing at the files.
    """
    included: set[str] = set()

    def written_in(file: str) -> str:
        text = (SOURCES / file).read_text(encoding="utf-8").replace("#pragma once\n", "\n")
        included.add(file)
        parts, position = [f'#line 1 "{file}"\n'], 0
        for match in _INCLUDE.finditer(text):
            parts.append(text[position : match.start()])
            if match[1] not in included:
                line = text.count("\n", 0, match.end()) + 2
                parts.append(f'{written_in(match[1])}\n#line {line} "{file}"')
            position = match.end()
        return "".join([*parts, text[position:]])

    return written_in(f"{name}.cu")
