"""The cells of one column of a .parquet file, from any row on; only that column is read, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from fbitrain.data.reading.line_files import MAX_RECORD_BYTES, Damaged, unreadable

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 32  # rows hold whole documents: more of them would fill memory
# Text shrinks to a third or a tenth. Where a row group claims more, its rows may share one long value: one at a time.
COMPRESSED_WELL = 20
COMPRESSED_TOO_WELL = 200  # beyond, a large row group is no text: a page of it is decompressed whole
BUFFER_BYTES = 1 << 20  # read ahead within the column, instead of all of it at once
ID_BYTES = 4  # a token id counts as this many bytes, whatever integer the file stores


class Cell(NamedTuple):
    """The value of one cell: bytes of a string, a list of a list, else whatever it is."""

    value: Any

    @property
    def size(self) -> int:
        """UTF-8 bytes of a string, ID_BYTES per item of a list, else 0."""
        if isinstance(self.value, bytes):
            return len(self.value)
        return ID_BYTES * len(self.value) if isinstance(self.value, list) else 0


def read_cells(path: str, column: str, row: int = 0) -> Iterator[Cell]:
    """The cells of `column` of the parquet file `path`, from row `row` on.

    Row groups before `row` are skipped unread. Batches are counted from the start of their row group, so that a
    damaged page ends the reading at the same row wherever it began. Raises Damaged where the content ends before its
    time, and UserError where the system does not give it.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        opening = {"buffer_size": BUFFER_BYTES, "pre_buffer": False, "page_checksum_verification": True}
        with parquet.ParquetFile(path, **opening) as file:
            _require_column(file.schema_arrow, column)
            for group in range(file.num_row_groups):
                n_rows = file.metadata.row_group(group).num_rows
                if row < n_rows:
                    batch_rows = _batch_rows(file.metadata.row_group(group), column)
                    options = {"batch_size": batch_rows, "columns": [column], "use_threads": False}
                    for batch in file.iter_batches(row_groups=[group], **options):
                        yield from _cells(batch.column(0).slice(min(row, len(batch))))
                        row = max(0, row - len(batch))
                else:
                    row -= n_rows
    except (OSError, pyarrow.ArrowException) as error:
        # pyarrow raises OSError for what is no parquet too, but then there is no number from the system.
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from None
        raise Damaged(" ".join(str(error).split())) from None


def _batch_rows(group: pyarrow.RowGroupMetaData, column: str) -> int:
    """How many rows of the group to read at a time. Raises Damaged where even one may fill the memory."""
    n_stored = n_expanded = 0
    for i in range(group.num_columns):
        chunk = group.column(i)
        if chunk.path_in_schema.partition(".")[0] == column:
            n_stored += chunk.total_compressed_size
            n_expanded += max(chunk.total_uncompressed_size, ID_BYTES * chunk.num_values)
    if n_expanded > max(MAX_RECORD_BYTES, COMPRESSED_TOO_WELL * n_stored):
        raise Damaged(f"{n_stored:,} bytes of a row group stand for {n_expanded:,}, which no text does")
    return 1 if n_expanded > COMPRESSED_WELL * n_stored else BATCH_ROWS


def _require_column(schema: pyarrow.Schema, column: str) -> None:
    if column not in schema.names:
        raise Damaged(f"it has no column {column!r} but only {', '.join(schema.names) or 'none'}")


def _cells(array: pyarrow.Array) -> Iterator[Cell]:
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_string(array.type) or types.is_large_string(array.type) or types.is_string_view(array.type):
        # As bytes: pyarrow does not check that they are UTF-8, and would raise for the whole batch.
        array = array.cast(pyarrow.large_binary())
    if types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type):
        for item in array:
            yield Cell(item.values.to_numpy(zero_copy_only=False).tolist() if item.is_valid else None)
        return
    for item in array:
        yield Cell(item.as_py())
