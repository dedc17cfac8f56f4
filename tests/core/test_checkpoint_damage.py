"""Every change to a checkpoint's files is found before any of them is believed."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fbitrain.base.errors import UserError
from fbitrain.checkpoint import DTYPES, write_named
from fbitrain.checkpoint_files import load_weights
from fbitrain.checkpoint_marker import FIXED, LM_CONFIG, damage, damage_of_files
from fbitrain.checkpoint_sums import BLOCK_BYTES, Checksum, checksum
from fbitrain.checkpoint_tensors import fault_of_tensors
from fbitrain.fine_tune import own_checkpoint
from fbitrain.releasing.release import release
from tests.checkpoints import write_checkpoint

SMALL = ("data_rank00000.json", "data_shards.json", "trainer.json", "config.yaml", LM_CONFIG)
PAGE = 4096  # bytes


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000014")


def test_a_whole_one_is_whole_and_strangers_in_it_are_nobodys_concern(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").write_text("mine")
    assert damage(checkpoint) == ""
    assert load_weights(checkpoint)["w"].shape == (50, 100)


@pytest.mark.parametrize("name", SMALL)
def test_one_changed_digit_is_found(checkpoint: Path, name: str) -> None:
    text = (checkpoint / name).read_text()
    for place, letter in enumerate(text):
        if letter.isalnum():
            (checkpoint / name).write_text(f"{text[:place]}{'7' if letter != '7' else '3'}{text[place + 1 :]}")
            assert damage_of_files(checkpoint) == f"{name} fails its checksum"


def test_any_bit_of_any_file_is_found(checkpoint: Path) -> None:
    """Of COMPLETE.json, too, but for its white space and a bit that turns JSON into the same JSON."""
    generator = random.Random(0)
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        places = range(len(content)) if len(content) < 1500 else generator.sample(range(len(content)), 300)
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1 << generator.randrange(8)
            path.write_bytes(changed)
            same = path.name == "COMPLETE.json" and same_json(content, bytes(changed))
            assert bool(damage(checkpoint)) != same, f"byte {place} of {path.name}"
        path.write_bytes(content)


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_pages_that_changed_places_are_found(checkpoint: Path) -> None:
    shard = checkpoint / "shard_rank00000.safetensors"
    content = shard.read_bytes()
    start = len(content) - 4 * PAGE
    one, two = content[start : start + PAGE], content[start + PAGE : start + 2 * PAGE]
    shard.write_bytes(content[:start] + two + one + content[start + 2 * PAGE :])
    assert damage_of_files(checkpoint) == ""
    assert damage(checkpoint) == "shard_rank00000.safetensors fails its checksum at weight|w|0"
    with pytest.raises(UserError, match="is damaged"):
        load_weights(checkpoint)


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("[]", "names no files"),
        ("null", "names no files"),
        ("{}", "names no files"),
        ('{"files": {}}', "names no files"),
        ('{"format": 3, "step": 14, "files": []}', "names no files"),
        ('{"format": 3, "step": 14, "files": {"trainer.json": null}}', "does not name config.yaml"),
        ("COMPLETE", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("\xff", ""),
    ],
)
def test_a_marker_that_marks_nothing_is_refused_everywhere(checkpoint: Path, marker: str, words: str) -> None:
    (checkpoint / "COMPLETE.json").write_text(marker, encoding="latin-1")
    assert words in damage(checkpoint)
    run = checkpoint.parent.parent
    for read in (load_weights, lambda folder: own_checkpoint(str(folder)), lambda f: release(f, run / "out")):
        with pytest.raises(UserError, match="is damaged"):
            read(checkpoint)
    with pytest.raises(UserError, match="is damaged"):
        release(run, run / "out")


def test_a_marker_of_another_step_or_format_is_named(checkpoint: Path) -> None:
    other = checkpoint.rename(checkpoint.with_name("step_00000015"))
    assert damage(other) == "COMPLETE.json is of step 14"
    copy = other.rename(checkpoint.with_name("my best"))
    assert damage(copy) == ""
    marker = json.loads((copy / "COMPLETE.json").read_text())
    (copy / "COMPLETE.json").write_text(json.dumps(marker | {"format": 2}))
    assert damage(copy) == "it is of checkpoint format 2, and this version of fbitrain reads 3 only"


@pytest.mark.parametrize("name", [*SMALL, FIXED, "shard_rank00000.safetensors"])
def test_files_too_few_and_too_many(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    assert damage_of_files(checkpoint) == f"{name} is missing"
    (checkpoint / name).mkdir()
    assert damage_of_files(checkpoint) == f"{name} is missing"
    (checkpoint / name).rmdir()
    (checkpoint / name).write_bytes(content[:-1])
    assert f"{name} has {len(content) - 1} bytes instead of {len(content)}" in damage_of_files(checkpoint)
    (checkpoint / name).write_bytes(content)
    (checkpoint / "data_rank00001.json").write_text("{}")
    assert damage_of_files(checkpoint) == "COMPLETE.json does not name data_rank00001.json"


@pytest.mark.skipif(os.geteuid() == 0, reason="SKIPPED LOUDLY: root reads what nobody may read")
def test_a_file_that_may_not_be_read(checkpoint: Path) -> None:
    (checkpoint / "trainer.json").chmod(0)
    assert "PermissionError" in damage(checkpoint)


def test_all_files_have_the_mode_that_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = write_checkpoint(tmp_path / "checkpoints" / "step_00000014")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


# The checksum itself


def reference(data: bytes) -> int:
    """The same sum, a word at a time, in Python's integers."""
    mask = 2**64 - 1

    def odd(place: int) -> int:
        z = (place + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return (z ^ z >> 31) | 1

    whole = len(data) // 8 * 8
    total = int.from_bytes(data[whole:], "little")
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, whole, 8)]
    for start in range(0, len(words), 2**14):
        block = words[start : start + 2**14]
        total = (total * 0x9E3779B97F4A7C15 + sum((w ^ w >> 32) * odd(i) for i, w in enumerate(block))) & mask
    return total


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 4096, 2**17 - 1, 2**17, 2**17 + 8, 2**18 + 3])
def test_the_sum_is_the_formula(n: int) -> None:
    data = np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)
    assert checksum(data) == reference(data.tobytes())
    by_pieces = Checksum()
    for start in range(0, n, BLOCK_BYTES):
        by_pieces.add(data[start : start + BLOCK_BYTES])
    assert by_pieces.value() == reference(data.tobytes())


@pytest.mark.parametrize("dtype", [*DTYPES])
def test_any_dtype_and_shape_is_read_by_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.arange(60).view(3, 4, 5).to(dtype)
    tensors = {"a": whole, "b": whole.transpose(0, 2), "c": whole[0, 0, 0], "none": whole[:0], "\u0161 d": whole[1:]}
    write_named(tmp_path / "some.safetensors", [*tensors.items()])
    found = load_file(tmp_path / "some.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype is dtype
    assert fault_of_tensors(tmp_path / "some.safetensors") == ""


def test_no_tensors_and_tensors_of_unlike_numbers(tmp_path: Path) -> None:
    write_named(tmp_path / "none.safetensors", [])
    assert load_file(tmp_path / "none.safetensors") == {}
    unlike = [("w", torch.ones(3)), ("h", torch.ones(5, dtype=torch.bfloat16)), ("b", torch.ones(7, dtype=torch.int8))]
    write_named(tmp_path / "unlike.safetensors", unlike)
    found = load_file(tmp_path / "unlike.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in unlike)


@given(st.data())
def test_two_words_that_change_places_change_the_sum(data: st.DataObject) -> None:
    """Words that differ in one bit are the hardest case, the highest bit above all."""
    words = np.random.default_rng(1).integers(0, 2**63, 3 * 2**14, dtype=np.uint64)
    one, two = (data.draw(st.integers(0, len(words) - 1)) for _ in range(2))
    words[two] = words[one] ^ np.uint64(1 << data.draw(st.integers(0, 63)))
    before = checksum(words.view(np.uint8))
    words[[one, two]] = words[[two, one]]
    assert (checksum(words.view(np.uint8)) != before) == (one != two)
