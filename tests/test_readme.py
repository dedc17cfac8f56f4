"""Every command that the documentation shows is run, or parsed by the program it calls, or run by quickstart.sh."""

from __future__ import annotations

import glob
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
import zstandard
from deepspeed.launcher import runner

from fbitrain.base.command import run
from fbitrain.commands import cache_teacher, doctor, verbs
from fbitrain.config import load_config
from fbitrain.model.size import count_parameters
from fbitrain.studies.study_file import load_study
from tests.conftest import Workspace
from tests.data import faulty_http

ROOT = Path(__file__).parents[1]
DOCS = ("configurations", "data", "distillation", "finetuning", "glossary", "hardware")
DOCS += ("release", "running", "training")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{page}.md" for page in DOCS))]
PAGES += [ROOT / "docs" / "troubleshooting.md"]
WIDE = ("kernels", "kernels-measured", "log")
README = PAGES[0].read_text(encoding="utf-8")
QUICKSTART = (ROOT / "quickstart.sh").read_text(encoding="utf-8")
ASSIGNMENT = re.compile(r"[A-Z_]+=")
CHECKS = {"ruff", "mypy", "pytest"}  # in CONTRIBUTING.md; test.sh must run the very same


def commands(page: Path) -> list[str]:
    """The lines of the page's ```bash blocks, without comments and blank lines."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    lines = (shlex.join(shlex.split(line, comments=True)) for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


ALL_COMMANDS = [pytest.param(line, id=f"{page.name}: {line[:60]}") for page in PAGES for line in commands(page)]


@pytest.mark.parametrize("line", ALL_COMMANDS)
def test_every_command_is_known_and_right(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], readers_folder: Path
) -> None:
    monkeypatch.chdir(readers_folder if "my.yaml" in line and line.startswith("python") else ROOT)
    words = [word for word in shlex.split(line) if not ASSIGNMENT.match(word)]
    program, arguments = words[0], words[1:]
    if program == "python":
        if arguments[0] == "launch/doctor.py":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
            check_doctor(arguments[1:], capsys)
        elif arguments[0] == "-m":
            module = importlib.util.find_spec(arguments[1])
            assert module is not None, arguments
            assert 'if __name__ == "__main__":' in Path(str(module.origin)).read_text()
        else:
            check_python(arguments)
    elif program == "fbitrain":
        monkeypatch.chdir(readers_folder)
        check_verb(arguments)
    elif program == "deepspeed":
        check_launcher(arguments)
    elif program == "sbatch":
        check_config(next(word for word in arguments if word.endswith(".yaml")))
        assert (ROOT / next(word for word in arguments if word.endswith(".sbatch"))).is_file()
    elif program == "tensorboard":
        assert shutil.which("tensorboard", path=Path(sys.executable).parent)
        assert arguments[0] == "--logdir"
        assert "tensorboard --logdir" in (ROOT / "fbitrain" / "commands" / "summarize.py").read_text()
    elif program in CHECKS:
        assert line.replace("'", '"') in (ROOT / "test.sh").read_text() or line == "pytest -m 'not slow'"
    elif program.endswith(".sh"):
        assert os.access(ROOT / program, os.X_OK)
        for word in arguments:
            check_config(word)
    else:
        assert line == "source .venv/bin/activate", f"no test knows {line}"


def check_config(name: str) -> None:
    """my.yaml stands for the reader's own; any other name must be a shipped file."""
    name = name.removeprefix("$PWD/")
    assert name == "my.yaml" or (ROOT / name).is_file(), name


def check_doctor(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Runs it. What it finds depends on the machine; that it finishes and that its exit code is true does not."""
    code = run(doctor.main, doctor.parser(), arguments)
    captured = capsys.readouterr()
    assert captured.out.startswith("versions ")
    assert code == (1 if captured.err else 0)
    assert all(line.startswith("problem: ") for line in captured.err.splitlines())


def check_python(arguments: list[str]) -> None:
    """Runs the command that shows a config error; lets the other scripts' own parsers read their arguments."""
    script = Path(arguments[0])
    assert script.parent == Path("launch"), arguments
    if script.name == "pretrain.py":
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        for hint in ("optim.lr?", "train.total_steps?"):
            assert f"did you mean {hint}" in done.stderr
        return
    if script.name == "finetune.py":
        load_config(ROOT / arguments[1], arguments[2:])
        return
    parsed = importlib.import_module(f"fbitrain.commands.{script.stem}").parser().parse_args(arguments[1:])
    if script.name == "compare.py":
        assert load_study(ROOT / parsed.study).variants
        return
    assert f"python {script} " in QUICKSTART, f"quickstart.sh does not run {script}"


@pytest.fixture(scope="session")
def readers_folder(tmp_path_factory: pytest.TempPathFactory, workspace: Workspace) -> Iterator[Path]:
    """What a reader of the README has: my.yaml, whose shards are behind a list of URLs, and a corpus of their own."""
    folder = tmp_path_factory.mktemp("reader")
    shards = sorted((workspace.path / "shards").rglob("*.jsonl"))
    (folder / "corpus").mkdir()
    (folder / "data").mkdir()
    with faulty_http.serving() as server:
        urls = []
        for shard in shards:
            urls.append(server.put(f"v1/{shard.parent.name}/{shard.name}", shard.read_bytes()))
            compressed = zstandard.compress(shard.read_bytes())
            (folder / "corpus" / f"{shard.parent.name}_{shard.name}.zst").write_bytes(compressed)
        config = yaml.safe_load(workspace.config.read_text())
        config["data"] |= {"heldout_fraction": 0.2, "cache_dir": str(folder / "cache"), "n_lanes": 16}
        config["train"]["global_batch_tokens"] = 384  # for 16 ranks, which a command asks for
        for source in config["data"]["sources"]:
            del source["paths"]
            source |= {"url_lists": [server.put("v1/urls.txt", "\n".join(urls).encode())]}
            source |= {"include": [f"*/{source['name']}/*"]}
        (folder / "my.yaml").write_text(yaml.safe_dump(config))
        yield folder


def check_verb(arguments: list[str]) -> None:
    """Runs a command of the data room; of its benchmark, and of other verbs, the arguments are parsed and no more."""
    verb, rest = verbs.split(arguments)
    if not verb.startswith("data ") or verb == "data bench":
        importlib.import_module(f"fbitrain.{verbs.VERBS[verb][0]}").parser().parse_intermixed_args(rest)
        return
    # The reader's corpus here is smaller than the vocabulary that the page asks for.
    words = ["400" if word == "32000" else word for word in rest]
    assert verbs.call([*verb.split(), *(path for word in words for path in sorted(glob.glob(word)) or [word])]) == 0
    if "--out" in rest:
        assert Path(rest[rest.index("--out") + 1]).exists()


def check_launcher(arguments: list[str]) -> None:
    """DeepSpeed's own parser must take the options as meant, and the hostfile must be readable to it."""
    parsed = runner.parse_args(arguments)
    assert parsed.user_script in ("launch/pretrain.py", "launch/finetune.py", "launch/cache_teacher.py")
    if parsed.user_script == "launch/cache_teacher.py":
        assert cache_teacher.parser().parse_intermixed_args(parsed.user_args).out
    check_config(parsed.user_args[0])
    if parsed.hostfile != runner.DLTS_HOSTFILE:
        nodes = runner.fetch_hostfile(str(ROOT / parsed.hostfile))
        assert dict(nodes) == {"node0": 8, "node1": 8}
        assert 0 <= parsed.node_rank < len(nodes) if parsed.no_ssh else parsed.node_rank == -1


def test_the_readme_opens_with_the_two_commands() -> None:
    assert [shlex.split(line)[0] for line in commands(PAGES[0])[:2]] == ["./quickstart.sh", "./test.sh"]
    assert README.index("```bash") < 40


def test_the_map_of_rooms_names_every_module() -> None:
    """In docs/design.md; of commands/ it says that each verb has a module, and docs/kernels.md has the kernels."""
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rooms = design[design.index("## Rooms") : design.index("## Letters")]
    missing = [
        str(path.relative_to(ROOT))
        for room in ("fbitrain", "model")
        for path in (ROOT / room).rglob("*.py")
        if path.parent.name != "commands" and not path.name.startswith("__")
        if not re.search(rf"(?<![\w.]){re.escape(path.stem)}(?!\w)", rooms)
    ]
    assert missing == []


def test_the_table_of_configurations_is_what_the_doctor_counts() -> None:
    page = (ROOT / "docs" / "configurations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+\.yaml)` \|[^|]*\| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|", page, re.MULTILINE)
    configs = {path.name: load_config(path) for path in (ROOT / "launch" / "configs").glob("*.yaml")}
    assert {row[0] for row in rows} == {name for name, config in configs.items() if not config.model.pretrained}
    described = set(re.findall(r"^\| `(\S+\.yaml)` \|[^|]*\|$", page, re.MULTILINE))
    assert described == {name for name, config in configs.items() if config.model.pretrained}
    for name, total, binary, bits in rows:
        count = count_parameters(configs[name].model, configs[name].binarize)
        assert (f"{count.total:,}", f"{count.binary:,}") == (total, binary), name
        assert f"{count.bits_per_weight:.3f}" == bits, name


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / "docs" / f"{page}.md" for page in ("design", *WIDE))], ids=lambda page: page.name
)
def test_lines_are_short(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = page.parent.name == "docs"  # a row of a table cannot be wrapped; the README does with short ones
    assert [line for line in lines if len(line) > 120 and not (rows and line.startswith("|"))] == []


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CHANGELOG.md", ROOT / "docs" / "design.md", ROOT / "docs" / "add_a_method.md"],
    ids=lambda page: page.name,
)
def test_links_lead_somewhere(page: Path) -> None:
    for target, section in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            path = page.parent / target if target else page
            assert path.exists(), target
            assert not section or section in sections(path), (target, section)


def sections(page: Path) -> set[str]:
    """A page's headings as GitHub writes them in links."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The cluster templates, with stand-ins for what only a cluster has


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose .venv/bin holds stand-ins that write down how they were called."""
    shutil.copytree(ROOT / "launch", tmp_path / "checkout" / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    programs = {
        "deepspeed": 'printf "%s\\n" "$@" >"$LOG.${SLURM_NODEID:-0}"; echo "${DS_ACCELERATOR:-}" >"$LOG.accelerator"; '
        "exit ${EXIT:-0}",
        "python": '[[ $* == *socket* ]] && echo 12345 || exit "${NO_GPU:-0}"',
        "squeue": 'echo "${ENDS:-}"',
        "fbitrain": 'printf "%s\\n" "$@" "ends ${SLURM_JOB_END_TIME:-}" >"$LOG"',
    }
    folder = tmp_path / "checkout" / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return tmp_path / "checkout"


def start(checkout: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout / '.venv' / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(checkout / "launch" / "cluster" / script), "a b.yaml", "optim.lr=1"],
        env={"PATH": path, "LOG": str(checkout / "log"), **variables},
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("told", "ends"),
    [
        ({"SLURM_JOB_END_TIME": "1800000000"}, "1800000000"),
        ({"ENDS": "2027-01-15T08:00:00", "TZ": "UTC"}, "1800000000"),
        ({"ENDS": "NOT_SET"}, ""),
        ({}, ""),
    ],
)
def test_slurm_starts_the_supervisor(checkout: Path, told: dict[str, str], ends: str) -> None:
    slurm = {"SLURM_JOB_ID": "70001", "SLURM_CPUS_PER_TASK": "6", **told}
    done = start(checkout, "slurm.sbatch", FBITRAIN=str(checkout), **slurm)
    assert (done.returncode, done.stderr) == (0, "")
    words = ["run", "--", "pretrain", "a b.yaml", "optim.lr=1"]
    assert (checkout / "log").read_text().splitlines() == [*words, f"ends {ends}"]


def test_slurm_without_the_checkout_says_so(checkout: Path) -> None:
    done = start(checkout, "slurm.sbatch")
    assert done.returncode != 0
    assert "set FBITRAIN to the checkout" in done.stderr


@pytest.mark.parametrize(("no_gpu", "ranks", "accelerator"), [("1", 3, "cpu"), ("0", -1, "")])
def test_a_single_node_takes_its_gpus_or_cpu_ranks(checkout: Path, no_gpu: str, ranks: int, accelerator: str) -> None:
    done = start(checkout, "single_node.sh", NO_GPU=no_gpu, CPU_RANKS="3", EXIT="7")
    assert done.returncode == 7
    parsed = runner.parse_args((checkout / "log.0").read_text().splitlines())
    assert (parsed.num_gpus, parsed.master_port, parsed.quiet) == (ranks, 12345, True)
    assert parsed.user_args == ["a b.yaml", "optim.lr=1"]
    assert (checkout / "log.accelerator").read_text() == f"{accelerator}\n"
