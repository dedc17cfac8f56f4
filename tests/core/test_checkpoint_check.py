"""All ranks look for damage together: every file is read by one of them, and all of them know what any found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fbitrain.checkpoint import write_named
from fbitrain.checkpoint_check import deal
from fbitrain.checkpoint_marker import MARKER, write_marker
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_each_file_is_read_by_one_rank_and_a_changed_byte_in_any_is_found(tmp_path: Path, n_ranks: int) -> None:
    """Four ranks wrote it."""
    folder = write_checkpoint(tmp_path / "checkpoints" / "step_00000014")
    for rank in (1, 2, 3):
        shard = [(f"weight|w{rank}|0", torch.ones(1000 * rank))]
        write_named(folder / f"shard_rank{rank:05d}.safetensors", shard)
        (folder / f"data_rank{rank:05d}.json").write_text("{}")
    write_marker(folder, 14)
    script = Path(__file__).with_name("checking_ranks.py")
    subprocess.run([sys.executable, str(script), str(n_ranks), str(folder), str(tmp_path / "out")], check=True)
    ranks = [json.loads(Path(f"{tmp_path}/out.{rank}").read_text()) for rank in range(n_ranks)]
    files = sorted(path.name for path in folder.iterdir() if path.name != MARKER)
    for of_ranks in zip(*ranks, strict=True):
        changed = of_ranks[0]["changed"]
        assert sorted(name for rank in of_ranks for name in rank["read"]) == files
        assert all(rank["read"] for rank in of_ranks)
        assert len({rank["told"] for rank in of_ranks}) == 1
        sentences = of_ranks[0]["told"].split("; ")
        wrong = [name for name in files if changed in (name, "all")]
        assert [sentence.split(" ")[0] for sentence in sentences] == (wrong or ["whole"])
        assert all(" fails its checksum" in sentence for sentence in sentences) == bool(wrong)


def test_files_are_dealt_by_their_sizes() -> None:
    sizes = {"a": 100, "b": 60, "c": 50, "d": 40, "e": 1, "f": 0}
    shares = deal({name: {"bytes": size} for name, size in sizes.items()}, 2)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = sorted(sum(sizes[name] for name in share) for share in shares)
    assert loads == [111, 140]
    assert deal({"a": {"bytes": 5}}, 3) == [{"a": {"bytes": 5}}, {}, {}]
    assert sum(map(len, deal({"a": None, "b": {"bytes": "many"}, "c": {"bytes": 3}}, 2))) == 3
