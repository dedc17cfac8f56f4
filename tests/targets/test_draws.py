"""Draws have the probabilities of the softmax; windows give every token one target, with what comes before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fbitrain.targets.cache_folder import CacheSettings
from fbitrain.targets.draws import Drawing, draw
from fbitrain.targets.windows import batches, padded, windows

V = 300


def settings(**changes: object) -> CacheSettings:
    values: dict[str, object] = {
        **{"kind": "sampled", "n": 50, "systematic": False, "temperature": 1.0, "seed": 0, "context": 16, "overlap": 8},
        **{"precision": "fp32", "vocab_size": V, "add_bos": True, "add_eos": True, "teacher": "t"},
        **{"teacher_fingerprint": "", "tokenizer": "k", "tokenizer_fingerprint": ""},
    }
    return CacheSettings(**{**values, **changes})  # type: ignore[arg-type]


def logits(n_tokens: int) -> torch.Tensor:
    return 3 * torch.randn(n_tokens, V, generator=torch.Generator().manual_seed(2))


def mean_weights(made: CacheSettings, repeats: int) -> np.ndarray:
    """What the targets of one token, made anew many times, put on each word in the mean."""
    drawing, t_RV = Drawing(made), logits(1).expand(repeats, V)
    targets = drawing.targets(lambda rows: t_RV[rows], torch.from_numpy(drawing.uniforms(repeats, "key")), 100)
    found = np.zeros(V)
    np.add.at(found, targets.ids, targets.weights.astype(np.float64))
    return found / repeats / made.n


@pytest.mark.parametrize("systematic", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_the_mean_of_many_targets_is_the_softmax(systematic: bool, temperature: float) -> None:
    exact = logits(1).softmax(1)[0].double().numpy()
    found = mean_weights(settings(systematic=systematic, temperature=temperature), 4000)
    noise = np.sqrt(exact / (4000 * 50)) + 1e-5
    assert (np.abs(found - exact) < 6 * noise).all()


def test_systematic_draws_are_as_many_as_expected_rounded_up_or_down() -> None:
    probability = logits(1).softmax(1).expand(200, V)
    uniforms = torch.rand(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(200, V).scatter_add_(1, draw(probability, uniforms, 50), torch.ones(200, 50))
    expected = 50 * probability
    assert ((counts >= (expected - 1e-3).floor()) & (counts <= (expected + 1e-3).ceil())).all()


def test_a_word_without_probability_is_never_drawn() -> None:
    probability = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    uniforms = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1 - 2**-53]], dtype=torch.float64)
    assert draw(probability, uniforms, 5).tolist() == [[1, 1, 3, 3, 3]]


def test_a_targets_words_are_ascending_and_its_counts_all_draws() -> None:
    drawing, t_RV = Drawing(settings()), logits(33)
    targets = drawing.targets(lambda rows: t_RV[rows], torch.from_numpy(drawing.uniforms(33, "a")), 7)
    ends = np.cumsum(targets.n)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        assert (np.diff(targets.ids[start:end].astype(int)) > 0).all()
        assert targets.weights[start:end].sum() == 50


def test_the_likeliest_words_have_their_probabilities() -> None:
    drawing, t_RV = Drawing(settings(kind="top", n=4)), logits(5)
    targets = drawing.targets(lambda rows: t_RV[rows], torch.empty(5, 0, dtype=torch.float64), 3)
    best = t_RV.softmax(1).topk(4, dim=1)
    assert targets.n.tolist() == [4] * 5
    for row in range(5):
        of_row = slice(4 * row, 4 * row + 4)
        wanted = dict(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True))
        assert targets.ids[of_row].tolist() == sorted(wanted)
        assert targets.weights[of_row] == pytest.approx([wanted[word] for word in sorted(wanted)], rel=1e-3)


def test_random_numbers_depend_on_seed_and_place_alone() -> None:
    drawing = Drawing(settings())
    first = drawing.uniforms(4, "a", "b", 3)
    drawing.uniforms(9, "a", "b", 4)
    np.testing.assert_array_equal(drawing.uniforms(4, "a", "b", 3), first)
    assert not (drawing.uniforms(4, "a", "b", 4) == first).any()
    assert not (Drawing(settings(seed=1)).uniforms(4, "a", "b", 3) == first).any()


@given(st.integers(0, 200), st.integers(2, 40), st.data())
def test_windows_give_every_token_one_target(length: int, context: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, context - 1))
    found = list(windows(0, length, context, overlap))
    targets = [token for window in found for token in range(window.first, window.stop + 1)]
    assert targets == list(range(1, length))
    for window in found:
        assert 0 < window.stop - window.start <= context
        assert window.start == 0 or window.first - 1 - window.start == overlap


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(1, 100))
def test_batches_hold_every_window_once_and_few_tokens(lengths: list[int], most: int) -> None:
    documents = [np.arange(length, dtype=np.int32) for length in lengths]
    every = [window for i, length in enumerate(lengths) for window in windows(i, length, 16, 5)]
    found = list(batches(every, most))
    assert sorted(str(window) for batch in found for window in batch) == sorted(map(str, every))
    for batch in found:
        ids = padded(batch, documents)
        assert len(batch) == 1 or ids.size <= most
        for row, window in zip(ids, batch, strict=True):
            assert row[: window.stop - window.start].tolist() == list(range(window.start, window.stop))
