"""Copies are found whatever the memory, however the hashes crowd, however often one text is repeated."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fbitrain.data.tools.hash_buckets import PLACE, Buckets, copies, hash_byte

halves = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1), st.integers(0, 2).map(lambda n: n << 40))


@settings(deadline=None, max_examples=60)
@given(hashes=st.lists(st.tuples(halves, st.integers(0, 1)), max_size=60), n_rows=st.sampled_from([1, 2, 5, 1000]))
def test_copies_are_all_rows_but_the_first_of_each_hash(
    tmp_path_factory: pytest.TempPathFactory, hashes: list[tuple[int, int]], n_rows: int
) -> None:
    rows = np.array([[high, low, place, 1] for place, (high, low) in enumerate(hashes)], np.uint64).reshape(-1, 4)
    with Buckets(tmp_path_factory.mktemp("rows") / "buckets") as buckets:
        for start in range(0, len(rows), 7):
            buckets.add(rows[start : start + 7], hash_byte(rows[start : start + 7], 0))
    found = [pair for path in buckets.paths() for pair in found_in(path, n_rows)]
    assert sorted(found) == [(i, hashes.index(key)) for i, key in enumerate(hashes) if key in hashes[:i]]


def found_in(path: Path, n_rows: int) -> list[tuple[int, int]]:
    return [
        (place, first_place)
        for rows, first_places in copies(path, n_rows)
        for place, first_place in zip(rows[:, PLACE].tolist(), first_places.tolist(), strict=True)
    ]


def test_a_bucket_file_goes_when_it_has_been_gone_through(tmp_path: Path) -> None:
    rows = np.zeros((10, 4), np.uint64)
    with Buckets(tmp_path / "buckets") as buckets:
        buckets.add(rows, hash_byte(rows, 0))
    for path in buckets.paths():
        found_in(path, 3)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
