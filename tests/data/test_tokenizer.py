"""Tokenizers in all their file formats: plain text in, exact ids out, specials from the files that name them."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fbitrain.base.errors import UserError
from fbitrain.data.tokenizer import LONG_CHARS, Tokenizer, load_tokenizer

LLAMA = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizer" / "llama.model"
TEXTS = [
    *(
        "",
        " ",
        "\n",
        "hello world",
        "  two  spaces\t\ttabs \t mixed\n\n\n   x  ",
        "it's we'll I'M 'S",
        "a1b22c333 12,345.67",
    ),
    *(
        "x =    1234 |   5\n",
        "👩‍🔬🏳️‍🌈👍🏽 ok",
        "漢字かな交じり文 한국어",
        "مرحبا بالعالم שלום",
        "e\u0301 a\u0308\u0323 z͑ͫ̓ͪ",
    ),
    *("def f(x):\n    return x['a']\n\tif y: pass\r\n", "\u00a0nbsp\u2003em\u3000", "\ufeffbom \0 nul\x7f"),
    *("<s>a</s> <|im_end|> <|im_start|>user", "<|endoftext|>"),
]
NASTY = [  # decoding need not give these back: SentencePiece's own ▁ becomes a space
    *("\ufffd \ufffd\ufffd", "\ue000\uf8ff\U0010fffd", "a\u200b\u200d\u2060b\u00ad", "\u202eright\u202c to left"),
    *("▁ ▁▁ a▁b", "<0x0A><0xFF>", "\r\n\r\n \r x", "\x1c\x85\u2028\u2029", "\ufeff", "\0" * 9, "ﬁ ² ½ Ⅳ ①"),
    *("🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f 👨‍👩‍👧‍👦", "ก็ नमस्ते 각"),
]
LONG_TEXTS = [
    *(
        "x" * 1_000_000,
        " " * 100_000,
        "7" * 50_000,
        "\n" * 40_000,
        "漢字" * 20_000,
        "👍🏽" * 20_000,
        "e\u0301" * 20_000,
    ),
    "".join(TEXTS) * 150,
]


@pytest.fixture(scope="module")
def bpe() -> tokenizers.Tokenizer:
    """A byte-level BPE that splits digits, as SmolLM2's does, with merges over spaces and words."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    return tokenizer


def write_gguf(path: Path, bpe: tokenizers.Tokenizer, **changed: Any) -> Path:
    """Written by the `gguf` package, so that our reader is not checked against itself."""
    import gguf

    model = json.loads(bpe.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "something before the tokenizer")
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_tokenizer_model(changed.get("model", "gpt2"))
    writer.add_tokenizer_pre(changed.get("pre", "smollm"))
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (len(model["vocab"]) - 3))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_bool("something.after", True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def require_ids(expected: dict[str, list[int]], tokenizer: Tokenizer) -> None:
    for text, ids in expected.items():
        assert np.array_equal(tokenizer.encode_array(text), ids), text[:20]
        assert len(text) > LONG_CHARS or tokenizer.encode(text) == ids


def test_nasty_texts_get_the_ids_of_tokenizers(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    bpe.save(str(tmp_path / "tokenizer.json"))
    bpe.encode_special_tokens = True
    expected = {text: bpe.encode(text, add_special_tokens=False).ids for text in [*TEXTS, *NASTY, *LONG_TEXTS]}
    for path in (tmp_path, write_gguf(tmp_path / "t.gguf", bpe)):
        require_ids(expected, load_tokenizer(path))


@pytest.mark.parametrize("whose", ["ours", "LLaMA's"])
def test_nasty_texts_get_the_ids_of_sentencepiece(sentencepiece_model: Path, whose: str) -> None:
    path = sentencepiece_model if whose == "ours" else LLAMA
    if not path.is_file():
        pytest.skip(f"{path} is absent: LLaMA's own tokenizer is not tried")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    require_ids({text: reference.encode(text) for text in [*TEXTS, *NASTY, *LONG_TEXTS]}, load_tokenizer(path))


def test_half_a_surrogate_pair_is_a_replacement_character(
    tmp_path: Path, bpe: tokenizers.Tokenizer, sentencepiece_model: Path
) -> None:
    bpe.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (load_tokenizer(tmp_path), load_tokenizer(sentencepiece_model)):
        assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
        assert tokenizer.encode_array("\udfff").tolist() == tokenizer.encode("\ufffd")


def test_gguf_gives_the_ids_of_the_tokenizer_it_holds(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", bpe))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (400, 1, 2)
    bpe.encode_special_tokens = True
    for text in TEXTS:
        assert tokenizer.encode(text) == bpe.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gguf_gives_the_ids_of_transformers_once_that_splits_digits(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    """transformers drops tokenizer.ggml.pre: where that matters the two agree only once it is put back."""
    transformers = pytest.importorskip("transformers")
    path = write_gguf(tmp_path / "t.gguf", bpe)
    ours = load_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    plain = [text for text in TEXTS if "<" not in text]
    without_digits = [text for text in plain if not any(map(str.isdigit, text))]
    for text in without_digits:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    theirs.backend_tokenizer.pre_tokenizer = bpe.pre_tokenizer
    for text in plain:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_special_names_in_a_text_are_text(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", bpe))
    ids = tokenizer.encode("<|im_start|>user<|im_end|>")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == "<|im_start|>user<|im_end|>"
    assert tokenizer.decode([1, *ids, 2]) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    "files",
    [
        {
            "tokenizer_config.json": {
                "bos_token": "<|im_start|>",
                "eos_token": {"content": "<|im_end|>", "special": True},
            }
        },
        {"special_tokens_map.json": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}},
        {"tokenizer_config.json": {"bos_token": "<|im_start|>", "eos_token": None}, "config.json": {"eos_token_id": 2}},
        {"generation_config.json": {"bos_token_id": 1, "eos_token_id": [2, 0]}, "config.json": {"bos_token_id": 0}},
    ],
)
def test_one_tokenizer_in_several_formats(tmp_path: Path, bpe: tokenizers.Tokenizer, files: Any) -> None:
    bpe.save(str(tmp_path / "tokenizer.json"))
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    from_gguf = load_tokenizer(write_gguf(tmp_path / "t.gguf", bpe))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        found = load_tokenizer(str(path))
        assert (found.bos_id, found.eos_id, found.vocab_size) == (1, 2, 400)
        assert found.fingerprint == from_gguf.fingerprint


def test_fingerprint_sees_vocabulary_cutting_and_specials(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    undivided = json.loads(bpe.to_str())
    undivided["pre_tokenizer"] = undivided["pre_tokenizer"]["pretokenizers"][1]
    contents = [bpe.to_str(), json.dumps(undivided)]
    contents.append(bpe.to_str().replace("<|im_end|>", "<|end|>"))
    contents.append(contents[0])
    prints = []
    for i, content in enumerate(contents):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "tokenizer.json").write_text(content)
        if i == 3:
            (tmp_path / str(i) / "config.json").write_text('{"bos_token_id": 0}')
        prints.append(load_tokenizer(tmp_path / str(i)).fingerprint)
    assert len(set(prints)) == 4


def test_a_template_or_a_limit_in_the_file_is_not_applied(tmp_path: Path, bpe: tokenizers.Tokenizer) -> None:
    changed = tokenizers.Tokenizer.from_str(bpe.to_str())
    changed.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    changed.enable_truncation(4)
    changed.enable_padding(length=64)
    changed.save(str(tmp_path / "tokenizer.json"))
    text = "a rather long text for four tokens"
    assert load_tokenizer(tmp_path).encode(text) == bpe.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        input=__file__, model_prefix=str(folder / "tokenizer"), vocab_size=500, model_type="bpe", byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True, minloglevel=2,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    return folder / "tokenizer.model"


def test_sentencepiece_file_and_folder(sentencepiece_model: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for path in (sentencepiece_model, sentencepiece_model.parent):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (500, 1, 2)
        for text in TEXTS:
            assert tokenizer.encode(text) == reference.encode(text)
            assert not {1, 2} & set(tokenizer.encode(text))
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llama_tokenizer() -> None:
    if not LLAMA.is_file():
        pytest.skip(f"{LLAMA} is absent: LLaMA's own tokenizer is not tried")
    tokenizer = load_tokenizer(LLAMA)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.encode("Hello world") == [15043, 3186]
    assert not {1, 2} & set(tokenizer.encode("<s></s>"))


@pytest.mark.parametrize("kind", ["gguf", "json", "model"])
def test_pickled_by_path(tmp_path: Path, bpe: tokenizers.Tokenizer, sentencepiece_model: Path, kind: str) -> None:
    path = tmp_path / f"tokenizer.{kind}"
    if kind == "gguf":
        write_gguf(path, bpe)
    elif kind == "json":
        bpe.save(str(path))
    else:
        shutil.copy(sentencepiece_model, path)
    tokenizer = load_tokenizer(path)
    packed = pickle.dumps(tokenizer)
    again: Tokenizer = pickle.loads(packed)
    assert len(packed) < 500
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone", None, "does not exist"),
        ("folder/", None, "neither tokenizer.json nor tokenizer.model"),
        ("tokenizer.json", b"{}", "is not a tokenizer.json"),
        ("tokenizer.json", b"\xff", "cannot be read"),
        ("tokenizer.model", b"rubbish", "is not a SentencePiece model"),
        ("t.gguf", b"rubbish", "is not a GGUF file"),
        ("t.gguf", b"GGUF" + struct.pack("<IQQ", 1, 0, 1), "is GGUF version 1"),
        ("t.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + b"\x03", "is damaged"),
        ("t.txt", b"x", "is of unknown kind"),
    ],
)
def test_unreadable_tokenizers(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path / name)
    assert name.rstrip("/") in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read"), ("[]", "is not a JSON object")])
def test_damaged_special_files(tmp_path: Path, bpe: tokenizers.Tokenizer, content: str, message: str) -> None:
    bpe.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=rf"tokenizer_config\.json {message}"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_tokens_is_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has an empty vocabulary"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", [b"tokens", b"merges"])
def test_a_gguf_file_without_tokens_or_merges_is_refused(
    tmp_path: Path, bpe: tokenizers.Tokenizer, name: bytes
) -> None:
    path = write_gguf(tmp_path / "t.gguf", bpe)
    path.write_bytes(path.read_bytes().replace(b"tokenizer.ggml." + name, b"tokenizer.ggml.absent"))
    with pytest.raises(UserError, match=f"has no list of strings tokenizer.ggml.{name.decode()}"):
        load_tokenizer(path)


@pytest.mark.parametrize("value", [b"\xff" * 8, b"\xff" * 7 + b"\x0f", b"\xff" * 5 + b"\0\0\0", bytes(8)])
def test_a_gguf_file_damaged_anywhere_is_one_sentence(tmp_path: Path, bpe: tokenizers.Tokenizer, value: bytes) -> None:
    path = write_gguf(tmp_path / "t.gguf", bpe)
    whole = path.read_bytes()
    n_refused = 0
    # Every length at the beginning, where the lists begin, and some of the strings in them.
    for at in [*range(4, 220), *range(220, len(whole), 97)]:
        path.write_bytes(whole[:at] + value + whole[at + 8 :])
        try:
            load_tokenizer(path)
        except UserError as error:
            n_refused += str(error).startswith(f"tokenizer {path} ")
    assert n_refused > 150


@pytest.mark.parametrize("changed", [{"model": "llama"}, {"pre": "qwen2"}])
def test_gguf_tokenizers_of_other_kinds_are_refused(tmp_path: Path, bpe: tokenizers.Tokenizer, changed: Any) -> None:
    with pytest.raises(UserError, match=r"give the model's folder with its tokenizer\.json"):
        load_tokenizer(write_gguf(tmp_path / "t.gguf", bpe, **changed))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["bos", "eos"])
def test_a_special_outside_the_vocabulary_is_refused(
    bpe: tokenizers.Tokenizer, tmp_path: Path, name: str, kind: str
) -> None:
    """Of a folder that took another model's config: 128000 of 400 words."""
    bpe.save(str(tmp_path / "tokenizer.json"))
    for token_id in (400, 128000, -1):
        (tmp_path / name).write_text(json.dumps({f"{kind}_token_id": token_id}))
        with pytest.raises(UserError, match=rf"{name} names {token_id} as the {kind.upper()} token.* 0 to 399"):
            load_tokenizer(tmp_path)
    (tmp_path / name).write_text(json.dumps({f"{kind}_token_id": 399}))
    assert getattr(load_tokenizer(tmp_path), f"{kind}_id") == 399
