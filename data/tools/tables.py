"""Tables and sizes as the data room's commands print them."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names, the first to the left and numbers to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        [cell.rjust(width) if i else cell.ljust(width) for cell in column]
        for i, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return "\n".join("  ".join(line) for line in zip(*aligned, strict=True))


def human_bytes(n: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
