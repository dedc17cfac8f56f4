"""A release read by its recipients: transformers without fbitrain, this version and older ones, from disk and the hub.

OLDER_TRANSFORMERS names folders with older versions, separated by colons, each from
    pip install --no-deps --target FOLDER transformers==4.51.3 'tokenizers<0.22' 'huggingface-hub<1'
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from fbitrain.base.command import run
from fbitrain.commands import generate as generate_command
from fbitrain.commands.verbs import call
from fbitrain.config import Config, load_config
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.inference import generate
from fbitrain.inference.generate import Sampling, stream_tokens
from fbitrain.loading.model_folder import load_lm, open_model
from fbitrain.loading.tokenizer_folder import PROBES, prompt_start, write_tokenizer
from fbitrain.model.build import build_student, llama_config
from fbitrain.model.hf import ReleasedModel
from fbitrain.releasing.model_card import Labels, Training, model_card
from fbitrain.releasing.release import replacing_release, write_release

PROMPTS = ["the model learns one bit", "a", "  two  spaces"]
UNLABELED = Labels()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = [folder for folder in os.environ.get("OLDER_TRANSFORMERS", "").split(":") if folder]

READ = """
import json, sys
older, out, *places = sys.argv[1:]
if older:
    sys.path.insert(0, older)
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
prompts, probes = json.loads(places.pop(0))
found = {"version": transformers.__version__}
for place in places:
    repo, _, folder = place.partition("#")
    where = {"subfolder": folder} if folder else {}
    trusted = {} if "dense" in place else {"trust_remote_code": True}
    tokenizer = AutoTokenizer.from_pretrained(repo, **where)
    model = AutoModelForCausalLM.from_pretrained(repo, torch_dtype=torch.float32, **where, **trusted).eval()
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(2, 14)[None]).logits[0, -1]
    found[place] = {
        "names": list(inputs), "new": made[:, inputs["input_ids"].shape[1]:].tolist(), "logits": logits.tolist(),
        "ids": [tokenizer(text).input_ids for text in probes], "max_length": tokenizer.model_max_length,
        "text": [tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) for text in probes],
    }
assert "fbitrain" not in sys.modules
with open(out, "w") as file:
    json.dump(found, file)
"""


def write(
    folder: Path,
    workspace: Any,
    *formats: str,
    rope: dict[str, Any] | None = None,
    tokenizer: Path | None = None,
    **data: Any,
) -> Config:
    """A release of random weights, without a run. rope: other parameters of the rotary embedding."""
    loaded = load_config(workspace.config)
    config: Config = replace(loaded, data=replace(loaded.data, **data))
    student, _ = build_student(config.model, config.binarize, seed=1)
    lm_config = llama_config(config.model)
    lm_config.rope_parameters = rope or lm_config.rope_parameters
    released = ReleasedModel.of(lm_config, config.binarize, student.state_dict(), torch.float16)
    trained = load_tokenizer(tokenizer or workspace.teacher)
    training, chosen = Training(4, 768), formats or ("dense", "packed")
    with replacing_release(folder) as out:
        write_release(
            out, config, released, trained, training, chosen, "float16", Labels("mit", ["en", "de"], "me/base")
        )
    return config


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    texts, model = folder / "text.jsonl", folder / "small.model"
    texts.write_text("\n".join(json.dumps({"text": f"kato misen {i} sola"}) for i in range(400)))
    assert call(["data", "train-tokenizer", "--vocab-size", "280", "--out", str(model), str(texts)]) == 0
    return model


def on_the_hub(home: Path, name: str, folder: Path) -> None:
    """Puts a folder where the hub's cache keeps the repository `name`."""
    repo = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)


def read(tmp_path: Path, older: str, places: list[str]) -> dict[str, Any]:
    """What transformers without fbitrain makes of each place, "REPO" or "REPO#SUBFOLDER"."""
    out = tmp_path / "found.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "hf" / "modules")
    texts = json.dumps([PROMPTS, PROBES])
    command = [sys.executable, "-I", "-c", READ, older, str(out), texts, *places]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@torch.inference_mode()
def assert_logits(seen: dict[str, Any], folder: Path) -> None:
    expected = load_lm(folder, torch.float32)(input_ids=torch.arange(2, 14)[None]).logits[0, -1]
    torch.testing.assert_close(torch.tensor(seen["logits"]), expected, atol=1e-4, rtol=0)


def check_readers(tmp_path: Path, workspace: Any, older: str) -> None:
    release = tmp_path / "release"
    write(release, workspace)
    for name, folder in (("me/whole", release), ("me/packed", release / "packed"), ("me/dense", release / "dense")):
        on_the_hub(tmp_path / "hf", name, folder)
    local = [f"{release}#packed", f"{release}#dense", f"{release}/packed", f"{release}/dense"]
    places = [*local, "me/whole#packed", "me/whole#dense", "me/packed", "me/dense"]
    scaled = tmp_path / "scaled"
    write(scaled, workspace, "dense", rope={"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0})
    found = read(tmp_path, older, [*places, f"{scaled}#dense"])
    print(f"transformers {found.pop('version')}")
    assert_logits(found.pop(f"{scaled}#dense"), scaled / "dense")
    assert list(found) == places
    lm, tokenizer = load_lm(release / "dense", torch.float32), load_tokenizer(workspace.teacher)
    expected_ids = [[0, *tokenizer.encode(text)] for text in PROBES]
    lm.generation_config.eos_token_id = None
    for place, seen in found.items():
        assert seen["names"] == ["input_ids", "attention_mask"], place
        assert seen["ids"] == expected_ids, place
        assert seen["text"] == [tokenizer.decode(tokenizer.encode(text)) for text in PROBES], place
        assert seen["max_length"] == lm.config.max_position_embeddings, place
        assert_logits(seen, release / "dense")
        for prompt, new in zip(PROMPTS, seen["new"], strict=True):
            ids = [0, *tokenizer.encode(prompt)]
            assert len(new) == 6
            assert new == list(stream_tokens(lm, ids, Sampling(max_new_tokens=6))), (place, prompt)


def test_this_transformers_reads_a_release_from_disk_and_from_the_hub(tmp_path: Path, workspace: Any) -> None:
    check_readers(tmp_path, workspace, "")


@pytest.mark.slow
@pytest.mark.skipif(not OLDER, reason="OLDER_TRANSFORMERS names no folder with an older transformers")
@pytest.mark.parametrize("older", OLDER)
def test_older_transformers_read_a_release(tmp_path: Path, workspace: Any, older: str) -> None:
    check_readers(tmp_path, workspace, older)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_every_reader_puts_before_a_prompt_what_training_did(
    tmp_path: Path, workspace: Any, add_bos: bool, kind: str, sentencepiece_model: Path
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    original = workspace.teacher if kind == "byte-level" else sentencepiece_model
    trained = load_tokenizer(original)
    formats = ("dense", "packed", "gguf") if kind == "byte-level" else ("dense", "packed")
    config = write(tmp_path / "out", workspace, *formats, tokenizer=original, add_bos=add_bos)
    start = [trained.bos_id] if add_bos else []
    wanted = [*start, *trained.encode("the model")]
    paths = [tmp_path / "out" / name for name in ("dense", "packed")]
    if kind == "byte-level":
        paths.append(tmp_path / "out" / "gguf" / f"{config.run.name}-F16.gguf")
        fields = gguf.GGUFReader(paths[-1]).fields
        assert fields["tokenizer.ggml.add_bos_token"].contents() is add_bos
        assert fields["tokenizer.ggml.padding_token_id"].contents() == trained.eos_id
    for path in paths:
        with open_model(path, transformers_only=True) as model:
            assert model.prompt_start == start
            tokenizer = AutoTokenizer.from_pretrained(model.folder)
            assert tokenizer("the model").input_ids == wanted
            assert tokenizer.pad_token_id == trained.eos_id
            lm_eval = HFLM(pretrained=model.lm, tokenizer=tokenizer)
            assert lm_eval.tok_encode("the model") == wanted
            # What it puts before a text that stands alone: the border that training put before documents.
            assert lm_eval.prefix_token_id == (trained.bos_id if add_bos else trained.eos_id)


def test_generate_begins_as_the_tokenizer_says(
    tmp_path: Path, workspace: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(generate, "stream_tokens", lambda model, ids, sampling: iter(seen.append(list(ids)) or ()))
    for add_bos in (True, False):
        write(tmp_path / "out", workspace, "packed", add_bos=add_bos)
        arguments = [str(tmp_path / "out" / "packed"), "--prompt", "the model"]
        assert run(generate_command.main, generate_command.parser(), arguments) == 0
    plain = load_tokenizer(workspace.teacher).encode("the model")
    assert seen == [[0, *plain], plain]


def test_foreign_tokenizers_begin_as_in_transformers(tmp_path: Path, workspace: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(workspace.teacher / name, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    special = {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
    end, text = {"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    assert load_tokenizer(workspace.teacher).eos_id == 1
    eos = load_tokenizer(workspace.teacher).backend.id_to_token(1)
    special = {eos: {"id": eos, "ids": [1], "tokens": [eos]}}
    end["SpecialToken"]["id"] = eos
    for single in ([text], [text, end], [end, text], [end, end, text, end]):
        template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}
        (tmp_path / "tokenizer.json").write_text(json.dumps({**definition, "post_processor": template}))
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
        )
        ids = AutoTokenizer.from_pretrained(tmp_path)("a").input_ids
        start = prompt_start(load_tokenizer(tmp_path), tmp_path)
        assert ids[: len(start) + 1] == [*start, *load_tokenizer(tmp_path).encode("a")]
        assert len(start) == single.index(text)


def test_a_tokenizer_keeps_its_own_padding_and_chat_template(tmp_path: Path, workspace: Any) -> None:
    original, out = tmp_path / "original", tmp_path / "out"
    shutil.copytree(workspace.teacher, original)
    out.mkdir()
    settings = json.loads((original / "tokenizer_config.json").read_text())
    backend = load_tokenizer(original).backend
    settings |= {"pad_token": backend.id_to_token(7), "chat_template": "{{ messages }}", "tokenizer_class": "Unheard"}
    settings |= {"extra_special_tokens": [backend.id_to_token(8)]}  # a list, which versions before 5 cannot read
    (original / "tokenizer_config.json").write_text(json.dumps(settings))
    write_tokenizer(load_tokenizer(original), out, add_bos=True, max_length=None)
    read = AutoTokenizer.from_pretrained(out)
    assert read.pad_token_id == 7
    assert read.chat_template == "{{ messages }}"
    assert "extra_special_tokens" not in json.loads((out / "tokenizer_config.json").read_text())


def test_each_card_has_the_paths_that_are_right_where_it_lies(tmp_path: Path, workspace: Any) -> None:
    out = tmp_path / "out"
    config = write(out, workspace, "dense", "packed", "gguf")
    cards = {place: (out / place / "README.md").read_text() for place in ("", "dense", "packed", "gguf")}
    for place, card in cards.items():
        head = yaml.safe_load(card.split("---\n")[1])
        assert (head["license"], head["language"], head["base_model"]) == ("mit", ["en", "de"], "me/base")
        assert head["library_name"] == ("gguf" if place == "gguf" else "transformers")
        for repo, _, files in re.findall(r"from_pretrained\((REPO)(, subfolder=\"(\w+)\")?", card):
            assert (out / place / files / "config.json").is_file(), (place, repo, files)
        for file in re.findall(r"llama-cli -m (\S+)", card):
            assert (out / place / file).is_file(), (place, file)
        assert ("trust_remote_code=True" in card) == (place in ("", "packed"))
        assert ("llama-cli" in card) == (place in ("", "gguf"))
        assert ("## Size of packed" in card) == (place in ("", "packed"))
        assert ("from_pretrained" in card) == (place != "gguf")
    assert f"{config.run.name}-F16.gguf" in cards["gguf"]


def test_what_cannot_be_known_is_not_claimed(tmp_path: Path, workspace: Any) -> None:
    config = load_config(workspace.config)

    def head(pretrained: str, labels: Labels = UNLABELED, tokens: int = 1) -> dict[str, Any]:
        model = replace(config.model, pretrained=pretrained)
        fine_tuned = replace(config, model=model)
        card = model_card(fine_tuned, Training(1, tokens), None, {"dense": ""}, "float16", "llama", labels)
        values: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
        return values

    assert head("")["license"] == "unknown"
    assert "base_model" not in head("") | head(str(tmp_path)) | head("runs/that-is-gone")
    assert head("any/where", Labels(base_model="a/b"))["base_model_relation"] == "finetune"
    assert head("any/where", Labels(base_model="a/b"), tokens=0)["base_model_relation"] == "quantized"


def test_the_next_release_brings_its_own_code(tmp_path: Path, workspace: Any) -> None:
    out = tmp_path / "out"
    write(out, workspace, "packed")
    (out / "remote_code.py").write_text("older")
    (out / "notes.txt").write_text("mine")
    write(out, workspace, "packed")
    assert (out / "remote_code.py").read_text() == (out / "packed" / "remote_code.py").read_text()
    write(out, workspace, "dense")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "dense", "notes.txt"]
