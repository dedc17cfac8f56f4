"""Lanes: every document once per epoch whatever the layout, mixture by tokens, and no endless search for documents."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fbitrain.base.errors import UserError
from fbitrain.data.config import DataConfig, PhaseConfig, SourceConfig
from fbitrain.data.holdout_rule import is_heldout
from fbitrain.data.reading.documents import Document
from fbitrain.data.sources.cache import ShardCache
from fbitrain.data.sources.shards import Shard
from fbitrain.data.streaming.plan import LanePlan, Unit, cut, deal, find_sources, plan_lanes
from fbitrain.data.streaming.source_reader import SharedFiles, SourceState
from fbitrain.data.streaming.stream import Lane
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import UNENCODABLE

BOS, EOS = 256, 257


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: str) -> Tokenizer:
    return load_tokenizer(byte_tokenizer)


def config(root: Path, names: list[str], **fields: Any) -> DataConfig:
    weights = fields.pop("weights", [1.0] * len(names))
    sources = [SourceConfig(name, [str(root / name)], weight) for name, weight in zip(names, weights, strict=True)]
    return DataConfig(sources=sources, **{"seq_len": 16, "n_lanes": 1, **fields})


def open_lane(plan: LanePlan, tokenizer: Tokenizer, state: Any = None) -> Lane:
    return Lane(plan, tokenizer, SharedFiles(ShardCache("/nonexistent", 0)), state)


def lanes(data: DataConfig, tokenizer: Tokenizer) -> list[Lane]:
    return [open_lane(plan, tokenizer) for plan in plan_lanes(data, find_sources(data))]


def source_states(lane: Lane) -> dict[str, SourceState]:
    return {name: SourceState.from_list(values) for name, values in lane.state()["sources"].items()}


def documents_in(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Whole documents of a stream with BOS and EOS around each."""
    whole = ids[: len(ids) - ids[::-1].index(EOS)] if EOS in ids else []
    found = []
    for at_end, group in itertools.groupby(whole, key=lambda token: token == EOS):
        if not at_end:
            first, *content = group
            assert first == BOS
            found.append(tokenizer.decode(content))
    return found


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(0, 10**6), min_size=1, max_size=40),
    n_lanes=st.integers(1, 24),
)
def test_every_line_is_dealt_to_one_lane(sizes: list[int], n_lanes: int) -> None:
    shards = [Shard(f"/{i}", str(i), size) for i, size in enumerate(sizes)]
    dealt = deal(cut(shards, n_lanes), n_lanes, "seed")
    lines = Counter(
        (unit.shard.name, line) for units in dealt for unit in units for line in range(unit.part, 60, unit.n_parts)
    )
    assert lines == Counter(itertools.product(map(str, range(len(sizes))), range(60)))
    if sum(sizes):
        loads = [sum(unit.size for unit in units) for units in dealt]
        largest = max(unit.size for units in dealt for unit in units)
        assert max(loads) - min(loads) <= largest + 1e-6  # what LPT guarantees
        assert min(map(len, dealt)) >= 1


def test_one_shard_is_shared_evenly() -> None:
    dealt = deal(cut([Shard("/a", "a", 999)], 16), 16, "seed")
    assert [len(units) for units in dealt] == [1] * 16
    assert {unit.n_parts for units in dealt for unit in units} == {16}
    assert deal([Unit(Shard("/a", "a", 9), 0, 1, 9.0)], 1, "seed")[0][0].part == 0


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_each_document_once_per_epoch(data: Any, tokenizer: Tokenizer, tmp_path_factory: Any, write_shard: Any) -> None:
    """Any shard layout, any number of lanes, stopped and restored anywhere, blank lines and bad lines between."""
    root = tmp_path_factory.mktemp("corpus")
    names = ["one", "two"][: data.draw(st.integers(1, 2))]
    corpus = {}
    for name in names:
        counts = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any))
        corpus[name] = []
        for i, n in enumerate(counts):
            suffix = data.draw(st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst"]))
            length = data.draw(st.integers(0, 60))
            texts = [f"{name} {i} {j} " + "x" * (j * 7 % (length + 1)) for j in range(n)]
            write_shard(root / name / f"{i}{suffix}", texts)
            corpus[name] += texts
    n_lanes = data.draw(st.integers(1, 6))
    settings_ = config(
        root, names, n_lanes=n_lanes, seq_len=data.draw(st.integers(1, 40)), seed=data.draw(st.integers(0, 9))
    )
    seen = {name: Counter[str]() for name in names}
    for plan in plan_lanes(settings_, find_sources(settings_)):
        lane, ids = open_lane(plan, tokenizer), []
        stop_every = data.draw(st.integers(1, 9))
        for n in range(4000):
            piece = next(lane, None)
            if piece is None:
                break
            assert len(piece) == settings_.seq_len + 1
            ids += piece.tolist()
            if all(source.epoch > 1 or source.dropped for source in source_states(lane).values()):
                break
            if n % stop_every == 0:
                lane = open_lane(plan, tokenizer, json.loads(json.dumps(lane.state())))
        for name in names:
            mine = [text for text in documents_in(ids, tokenizer) if text.startswith(name)]
            epoch = len(set(mine))
            for start in range(0, len(mine) - epoch + 1, epoch or 1):
                assert len(set(mine[start : start + epoch])) == epoch  # no document twice within an epoch
            seen[name].update(mine[:epoch])
    assert seen == {name: Counter(texts) for name, texts in corpus.items()}


def test_restored_bit_for_bit_inside_long_documents(tmp_path: Path, tokenizer: Tokenizer, write_shard: Any) -> None:
    rng = random.Random(3)
    for name, longest in (("short", 10), ("long", 500)):
        for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
            texts = ["".join(rng.choices("abc dé漢\n", k=rng.randint(1, longest))) for _ in range(9)]
            write_shard(tmp_path / name / f"a{suffix}", texts)
    data = config(tmp_path, ["short", "long"], weights=[1, 3], n_lanes=2, seq_len=12)
    for plan in plan_lanes(data, find_sources(data)):
        lane = open_lane(plan, tokenizer)
        pieces, states = [], [lane.state()]
        for _ in range(150):
            pieces.append(next(lane).tolist())
            states.append(json.loads(json.dumps(lane.state())))
        for stop in range(0, 140, 7):
            restored = open_lane(plan, tokenizer, states[stop])
            assert restored.state() == states[stop]
            for n in range(stop, stop + 8):
                assert next(restored).tolist() == pieces[n]
                assert restored.state() == states[n + 1]


def test_mixture_is_by_tokens(tmp_path: Path, tokenizer: Tokenizer, write_shard: Any) -> None:
    write_shard(tmp_path / "short" / "a.jsonl", [f"{i:05d}" for i in range(50)])
    write_shard(tmp_path / "long" / "a.jsonl", [f"{i:097d}" for i in range(50)])
    data = config(tmp_path, ["short", "long"], weights=[3, 1], seq_len=99)
    lane = lanes(data, tokenizer)[0]
    for n in range(1, 101):
        next(lane)
        tokens = {name: source.tokens for name, source in source_states(lane).items()}
        # A source is behind by less than one document of the other, and ahead by less than one of its own.
        assert abs(tokens["short"] - 0.75 * sum(tokens.values())) <= 99, n
    assert source_states(lane)["long"].documents == tokens["long"] / 99
    assert source_states(lane)["short"].bytes == tokens["short"] / 7 * 5


def test_epochs_are_shuffled_by_seed(tmp_path: Path, tokenizer: Tokenizer, write_shard: Any) -> None:
    for i in range(8):
        write_shard(tmp_path / "a" / f"{i}.jsonl", [str(i)])

    def order(seed: int) -> list[str]:
        lane = lanes(config(tmp_path, ["a"], seed=seed, seq_len=2), tokenizer)[0]
        return [tokenizer.decode(next(lane)[1:2].tolist()) for _ in range(24)]

    first = order(0)
    epochs = [first[:8], first[8:16], first[16:]]
    assert all(sorted(epoch) == [str(i) for i in range(8)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order(0) == first != order(1)


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "expected"), [(1, 1, [BOS, 0, EOS]), (1, 0, [BOS, 0]), (0, 1, [0, EOS])]
)
def test_borders(
    tmp_path: Path, tokenizer: Tokenizer, write_shard: Any, add_bos: int, add_eos: int, expected: Any
) -> None:
    write_shard(tmp_path / "a" / "a.jsonl", ["!"])
    lane = lanes(config(tmp_path, ["a"], add_bos=bool(add_bos), add_eos=bool(add_eos), seq_len=11), tokenizer)[0]
    bang = tokenizer.encode("!")
    wanted = [bang[0] if token == 0 else token for token in expected]
    assert next(lane).tolist() == list(itertools.islice(itertools.cycle(wanted), 12))


def test_a_tokenizer_without_bos(tmp_path: Path, byte_tokenizer: str, write_shard: Any) -> None:
    nameless = tmp_path / "tokenizer.json"
    nameless.write_text((Path(byte_tokenizer) / "tokenizer.json").read_text())
    write_shard(tmp_path / "a" / "a.jsonl", ["!"])
    with pytest.raises(UserError, match=r"names no BOS token; set data\.add_bos=false"):
        lanes(config(tmp_path, ["a"]), load_tokenizer(nameless))


@pytest.mark.parametrize("content", [b"", b"\n\n\n", b"bad\n" * 5])
def test_no_documents_end_a_lane(tmp_path: Path, tokenizer: Tokenizer, content: bytes) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a.jsonl").write_bytes(content)
    lane = lanes(config(tmp_path, ["a"]), tokenizer)[0]
    assert next(lane, None) is None
    assert lane.state()["empty"]
    assert lane.bad_records == content.count(b"bad")
    assert "source 'a' has no document" in lane.take_notes()[0][-1]
    assert next(open_lane(lane.plan, tokenizer, lane.state()), None) is None


def test_documents_without_tokens_end_a_lane(tmp_path: Path, tokenizer: Tokenizer, write_shard: Any) -> None:
    class Silent(Tokenizer):
        bos_id = eos_id = None
        path = ""
        vocab_size = 1

        def _encode_whole(self, text: str) -> list[int]:
            return []

        def _find_seams(self) -> None:
            return None

        def decode(self, ids: Any) -> str:
            return ""

    write_shard(tmp_path / "a" / "a.jsonl", ["one", "two"])
    assert next(lanes(config(tmp_path, ["a"], add_bos=False, add_eos=False), Silent())[0], None) is None


def test_a_source_too_small_for_a_lane_is_dropped_there(tmp_path: Path, tokenizer: Tokenizer, write_shard: Any) -> None:
    write_shard(tmp_path / "big" / "a.jsonl", ["big"] * 40)
    write_shard(tmp_path / "small" / "a.jsonl", ["small"])
    found = lanes(config(tmp_path, ["small", "big"], n_lanes=3), tokenizer)
    for lane in found:
        for _ in range(20):
            next(lane)
    assert sorted(bool(source_states(lane)["small"].dropped) for lane in found) == [False, True, True]
    assert sum("source 'small' has no document" in note for lane in found for note in lane.take_notes()[0]) == 2


def test_bad_records_count_once_and_up_to_the_limit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\nbad\n{"text": 5}\n')
    lane = lanes(config(tmp_path, ["a"], max_bad_records=2), tokenizer)[0]
    for _ in range(10):
        next(lane)
    assert source_states(lane)["a"].epoch > 5
    assert lane.bad_records == 2  # in later epochs they are told again, and not counted again
    notes, last_bad = lane.take_notes()
    told = {note.split(":")[0]: notes.count(note) for note in notes}
    assert told[f"skipped {path}, line 2"] > 5
    assert told[f"skipped {path}, line 3"] > 5
    assert last_bad.startswith(str(path))
    assert lane.take_notes() == ((), "")
    with pytest.raises(
        UserError, match=rf"max_bad_records=1 bad records, the last one in {path}, line [23].*raise data"
    ):
        next(lanes(config(tmp_path, ["a"], max_bad_records=1), tokenizer)[0])


def test_a_text_on_which_the_tokenizer_gives_up_is_a_bad_record(
    tmp_path: Path, panicking_tokenizer: str, write_shard: Any
) -> None:
    path = write_shard(tmp_path / "a" / "a.jsonl", ["one", UNENCODABLE, "two"])
    tokenizer = load_tokenizer(panicking_tokenizer)
    lane = lanes(config(tmp_path, ["a"]), tokenizer)[0]
    before = [next(lane).tolist() for _ in range(3)]
    assert lane.bad_records == 1
    assert source_states(lane)["a"].epoch > 1
    notes, _ = lane.take_notes()
    assert any(
        f"{path}, line 2: the tokenizer {panicking_tokenizer} gives up on a text of 32" in note for note in notes
    )
    again = lanes(config(tmp_path, ["a"]), tokenizer)[0]
    assert next(again).tolist() == before[0]
    resumed = open_lane(again.plan, tokenizer, json.loads(json.dumps(again.state())))
    assert [next(resumed).tolist() for _ in range(2)] == before[1:]


def test_held_out_shards_cannot_be_trained_on(tmp_path: Path, write_shard: Any) -> None:
    path = write_shard(tmp_path / "a" / "a.jsonl", ["x"])
    with pytest.raises(UserError, match=r"a\.jsonl is both held out and part of source 'a'"):
        find_sources(config(tmp_path, ["a"], heldout=[str(path)]))
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(UserError, match=r"a\.jsonl is both held out and part of source 'a'"):
        find_sources(config(tmp_path, ["a"], heldout=[str(tmp_path / "link.jsonl")]))


def test_phases_change_the_mixture_at_their_step(tmp_path: Path, tokenizer: Tokenizer, write_shard: Any) -> None:
    """By the tokens of the phase, not of the run: the source that rested does not catch up."""
    for name in ("one", "two"):
        write_shard(tmp_path / name / "a.jsonl", [f"{name} {i:04d}" for i in range(60)])
    phases = [PhaseConfig(5, {"two": 0}), PhaseConfig(10, {"one": 1, "two": 3})]
    data = config(tmp_path, ["one", "two"], phases=phases, seq_len=99)
    plan = plan_lanes(data, find_sources(data), sequences_per_step=4)[0]
    lane = open_lane(plan, tokenizer)
    tokens = []
    for n in range(60):
        next(lane)
        tokens.append([state.tokens for state in source_states(lane).values()])
        if n % 7 == 0:
            lane = open_lane(plan, tokenizer, json.loads(json.dumps(lane.state())))

    def drawn(start: int, stop: int) -> list[int]:
        return [after - before for before, after in zip(tokens[start], tokens[stop], strict=True)]

    assert drawn(0, 19) == pytest.approx([950, 950], abs=20)
    assert drawn(20, 39) == pytest.approx([1900, 0], abs=20)
    assert drawn(40, 59) == pytest.approx([475, 1425], abs=20)


def test_a_phase_whose_sources_a_lane_lacks_is_an_error(tmp_path: Path, tokenizer: Tokenizer, write_shard: Any) -> None:
    write_shard(tmp_path / "one" / "a.jsonl", ["some text"] * 9)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.jsonl").write_bytes(b"")
    data = config(tmp_path, ["one", "two"], phases=[PhaseConfig(1, {"one": 0})])
    lane = open_lane(plan_lanes(data, find_sources(data), sequences_per_step=1)[0], tokenizer)
    next(lane)
    with pytest.raises(UserError, match=r"no document of the sources that phase 1 of data\.phases gives a weight"):
        list(itertools.islice(lane, 9))


def test_left_out_documents_are_never_seen(tmp_path: Path, tokenizer: Tokenizer, write_shard: Any) -> None:
    texts = [f"text {i}" for i in range(60)]
    write_shard(tmp_path / "a" / "a.jsonl", texts)
    data = config(tmp_path, ["a"], heldout_fraction=0.3, seed=5)
    lane = lanes(data, tokenizer)[0]
    ids: list[int] = []
    while source_states(lane)["a"].epoch == 0:
        ids += next(lane).tolist()
    held = {text for text in texts if is_heldout(Document(text).content_hash, 5, 0.3)}
    assert 5 < len(held) < 35
    assert source_states(lane)["a"].heldout >= len(held)  # the second epoch has begun
    assert set(documents_in(ids, tokenizer)) == set(texts) - held


def test_blocks_are_shuffled_within_themselves(tmp_path: Path, tokenizer: Tokenizer, write_shard: Any) -> None:
    write_shard(tmp_path / "a" / "a.jsonl", [f"{i:02d}" for i in range(40)])

    def order(block: int) -> list[int]:
        lane = lanes(config(tmp_path, ["a"], shuffle_block=block, seq_len=3), tokenizer)[0]
        return [int(tokenizer.decode(next(lane)[1:3].tolist())) for _ in range(80)]

    assert order(1) == list(range(40)) * 2
    found = order(10)
    for start in range(0, 80, 10):
        block = found[start : start + 10]
        assert sorted(block) == list(range(start % 40, start % 40 + 10))
        assert block != sorted(block)
    assert found[:40] != found[40:]  # in another order in every epoch
