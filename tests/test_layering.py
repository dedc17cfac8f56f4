"""Who may import whom (docs/design.md, Rooms), and what importing costs: no GPU, no DeepSpeed, no CuPy, no lm-eval."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Room: its folder. Beside the run's own files, fbitrain/ has folders, each of them a room.
INNER = (
    *("base", "loading", "optim", "calibration", "inference", "targets"),
    *("serving", "releasing", "planning", "studies", "benches", "supervising", "commands"),
)
TOP = ("model", "kernels", "data", "launch")
ROOMS = {"run": "fbitrain", **{room: room for room in TOP}, **{room: f"fbitrain/{room}" for room in INNER}}
# Who may import whom. Besides, every room may import the base.
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),
    "kernels": set(),
    "data": set(),
    "model": {"kernels"},
    "loading": {"data", "model"},
    "optim": {"data", "model"},
    "calibration": {"data", "model", "loading"},
    "inference": {"data", "model"},
    "targets": {"data"},
    "serving": {"data", "loading", "inference"},
    "run": {"data", "model", "loading", "optim", "calibration", "inference", "targets"},
    "releasing": {"data", "model", "loading", "optim", "calibration", "run"},
    "planning": {"data", "model", "loading", "optim", "calibration", "run"},
    "studies": {"model", "run"},
    "benches": {"kernels", "data", "model", "targets", "releasing", "run"},
    "supervising": {"run"},
    "commands": {"kernels", "data", "model", *INNER, "run"},
    "launch": {"commands"},
}
# The rooms that the run is made of know its configuration, what is trained, and the talk between ranks.
WORDS = {"fbitrain.config", "fbitrain.config_optim", "fbitrain.parameters", "fbitrain.ranks"}
RUN_WORDS = {"optim": WORDS, "calibration": WORDS}
ONLY_IN = {
    "deepspeed": "fbitrain/engine.py",
    "lm_eval": "fbitrain/inference/lm_eval_tasks.py",
    "cupy": "kernels/cupy_backend.py",
    "uvicorn": "fbitrain/serving/server.py",
}
TORCH_FREE = (
    "fbitrain/config.py",
    "fbitrain/checkpoint_writer.py",
    "fbitrain/base/errors.py",
    "fbitrain/planning/estimate.py",
    "fbitrain/base/settings.py",
    "fbitrain/loading/pretrained_shape.py",
    "fbitrain/optim/schedules.py",
    "model/config.py",
    "model/method_table.py",
    "model/phases.py",
    "model/size.py",
    "model/storage.py",
    "data/config.py",
    "kernels/layout.py",
    "kernels/cuda_plan.py",
    "kernels/cuda_linear_plan.py",
    "kernels/cuda_source.py",
    "kernels/cuda_estimate.py",
)


def modules(room: str) -> list[Path]:
    # The run's own folder also holds the other rooms, and links to them.
    folder = ROOT / ROOMS[room]
    found = sorted(folder.glob("*.py") if room == "run" else folder.rglob("*.py"))
    return [path for path in found if path.name != "__main__.py"]  # the entry to the commands, above all rooms


ALL_MODULES = [path for room in ROOMS for path in modules(room)]


def name_of(path: Path) -> str:
    """The name a file is imported by: model/linear.py is fbitrain.model.linear."""
    parts = [*path.relative_to(ROOT).parts[:-1], path.stem]
    parts = parts if parts[0] == "fbitrain" else ["fbitrain", *parts]
    return ".".join(parts[:-1] if path.stem == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports anywhere, inside functions too; relative ones as they are written."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names]
            # `from fbitrain.data import shards` imports fbitrain.data.sources.shards, whose room is what counts.
            yield from names if module in ("fbitrain", *(f"fbitrain.{room}" for room in ROOMS)) else [module]


def room_of(module: str) -> str:
    second = [*module.split("."), ""][1]
    return second if second in ROOMS else "run"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    assert modules(room), f"{room} holds no module; has it moved?"
    for path in modules(room):
        for module in imports(path):
            if module.startswith("fbitrain."):
                may = MAY_IMPORT[room] | {room, "base", *({"run"} if module in RUN_WORDS.get(room, ()) else ())}
                assert room_of(module) in may, f"{path.relative_to(ROOT)} imports {module} ({room_of(module)})"


def test_the_base_needs_the_standard_library_and_omegaconf_only() -> None:
    """OmegaConf reads with PyYAML, whose errors are caught by name."""
    for path in modules("base"):
        for module in imports(path):
            root = module.split(".")[0]
            assert root in {*sys.stdlib_module_names, "fbitrain", "omegaconf", "yaml"}, f"{path.name} imports {module}"


def test_no_library_module_of_the_data_room_imports_a_command() -> None:
    for path in modules("data"):
        if path.parent != ROOT / "data" / "commands":
            assert not [module for module in imports(path) if module.startswith("fbitrain.data.commands")], path


@pytest.mark.parametrize("path", ALL_MODULES, ids=name_of)
def test_our_code_is_imported_by_its_full_name(path: Path) -> None:
    for module in imports(path):
        if (path.name, module) == ("remote_code.py", ".remote_layers"):
            continue  # the two are copied together to where fbitrain is not installed
        assert not module.startswith("."), f"relative import {module}"
        assert module.split(".")[0] not in {"model", "kernels", "data", "launch"}, (
            f"{module} without fbitrain. before it"
        )


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_heavy_package_is_imported_in_one_file_only(package: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in ALL_MODULES
        if package in {module.split(".")[0] for module in imports(path)}
    }
    assert users <= {ONLY_IN[package]}


def test_only_the_package_has_an_init_file() -> None:
    found = {path for room in ROOMS.values() for path in (ROOT / room).rglob("__init__.py")}
    assert found == {ROOT / "fbitrain" / "__init__.py"}
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "conftest.py").exists()


def test_the_package_links_to_the_top_level_rooms() -> None:
    for room in TOP:
        link = ROOT / "fbitrain" / room
        assert link.is_symlink()
        assert link.resolve() == ROOT / room


@pytest.mark.parametrize("path", modules("launch"), ids=lambda path: path.stem)
def test_no_script_shadows_a_module(path: Path) -> None:
    # Running launch/x.py puts launch/ first on sys.path: a file named like a module would be imported instead of it.
    assert path.stem not in sys.stdlib_module_names
    spec = importlib.util.find_spec(path.stem)
    assert spec is None or spec.origin is None or Path(spec.origin).resolve() == path, (
        f"{path.name} hides {spec.origin}"
    )


def needs_deepspeed() -> set[str]:
    """Modules that import fbitrain.engine, and so DeepSpeed, directly or through another of ours."""
    graph = {
        name_of(path): {m for m in imports_at_module_level(path) if m.startswith("fbitrain.")} for path in ALL_MODULES
    }
    found = {"fbitrain.engine"}
    while True:
        more = {name for name, imported in graph.items() if imported & found} - found
        if not more:
            return found
        found |= more


def imports_at_module_level(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_only_training_and_its_preflight_need_deepspeed() -> None:
    may = {
        "engine",
        "train",
        "build",
        "cache_teacher",
        "planning.preflight",
        "benches.cached_targets",
        "benches.checkpoints",
    }
    assert needs_deepspeed() <= {f"fbitrain.{name}" for name in may}


def run_isolated(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


# Hides packages as if they were not installed. A finder that raised would also fail a library that only asks for one.
HIDE = """
import importlib, sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *where):
        return None if name.split(".")[0] in {hidden!r} else self.finder.find_spec(name, *where)
sys.meta_path[:] = map(Hiding, sys.meta_path)
for name in {names!r}:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{{name}}: {{type(error).__name__}}: {{error}}")
"""


def test_every_module_imports_without_deepspeed_cupy_and_lm_eval() -> None:
    names = sorted({name_of(path) for path in ALL_MODULES} - needs_deepspeed())
    assert len(names) > 10
    done = run_isolated(HIDE.format(hidden={"deepspeed", "cupy", "lm_eval"}, names=names))
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr


def test_configs_and_estimates_import_without_torch() -> None:
    names = [name_of(ROOT / path) for path in TORCH_FREE]
    done = run_isolated(HIDE.format(hidden={"torch", "transformers", "deepspeed"}, names=names))
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr


def test_what_is_hidden_cannot_be_imported() -> None:
    done = run_isolated(HIDE.format(hidden={"yaml"}, names=["fbitrain.config"]))
    assert done.stdout.startswith("fbitrain.config: ModuleNotFoundError")
