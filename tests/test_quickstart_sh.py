"""The shell scripts at the door: one clear sentence for what a fresh machine may lack; a venv is believed only whole.

Each test runs the real script in a copy of the checkout's shell part, with stand-ins on PATH for the programs it calls.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("quickstart.sh", "test.sh", "constraints.txt", "setup.cfg", "pyproject.toml")
# What the scripts may use of a bare machine: no Python, no compiler. (cp is for the stand-in below.)
TOOLS = """
awk basename bash cat cp cut dirname df env find grep head kill mkdir rm sed setsid sha256sum sleep sort tail tee touch
"""

# A Python whose `-m venv` makes an environment where pip fails with the words of $PIP_SAYS, or works if that is empty.
PYTHON = """#!/bin/bash
case "$*" in
--version) echo "Python ${FAKE_VERSION:-3.12.1}" ;;
*version_info*) [[ ${FAKE_VERSION:-3.12.1} != 3.9* ]] ;;
*ensurepip*) [[ -z ${NO_VENV:-} ]] ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "made $3" >>made.log ;;
"-m pip "*) echo "$*" >>pip.log; [[ -z ${PIP_SAYS:-} ]] || { echo "$PIP_SAYS"; exit 1; } ;;
-) [[ ! -e broken ]] ;;  # the look at what is installed
*) exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "launch").mkdir()
    for path in (ROOT / "launch").glob("*.sh"):
        shutil.copy(path, tmp_path / "launch" / path.name)
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for tool in TOOLS.split():
        found = shutil.which(tool)
        assert found, tool
        (bin_dir / tool).symlink_to(found)
    stand_in(tmp_path, "python3", PYTHON)
    stand_in(tmp_path, "g++", "#!/bin/bash\n")
    stand_in(tmp_path, "df", "#!/bin/bash\necho header\necho disk 1 1 $((${FREE_GB:-100} * 1024 * 1024)) 1% /\n")
    return tmp_path


def stand_in(checkout: Path, name: str, script: str) -> None:
    path = checkout / "bin" / name
    path.unlink(missing_ok=True)
    path.write_text(script)
    path.chmod(0o755)


def run(checkout: Path, script: str = "quickstart.sh", **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(checkout / script)],
        env={"PATH": str(checkout / "bin"), "HOME": str(checkout), **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",  # a script finds its own folder
    )


def the_error(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence on stderr of a run that failed."""
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_no_python(checkout: Path) -> None:
    (checkout / "bin" / "python3").unlink()
    assert "install Python 3.10 or later" in the_error(run(checkout))


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_old_python(checkout: Path, script: str) -> None:
    error = the_error(run(checkout, script, FAKE_VERSION="3.9.2"))
    assert "Python 3.9.2" in error
    assert "3.10 or later" in error


def test_another_python_can_be_named(checkout: Path) -> None:
    stand_in(checkout, "python3.12", PYTHON)
    (checkout / "bin" / "python3").unlink()
    assert "package index" in the_error(run(checkout, PYTHON="python3.12", PIP_SAYS="Network is unreachable"))


def test_no_venv_module(checkout: Path) -> None:
    assert "apt install python3-venv" in the_error(run(checkout, NO_VENV="1"))


def test_no_compiler(checkout: Path) -> None:
    (checkout / "bin" / "g++").unlink()
    assert "no C++ compiler" in the_error(run(checkout))


def test_clang_will_do(checkout: Path) -> None:
    (checkout / "bin" / "g++").rename(checkout / "bin" / "clang++")
    assert "package index" in the_error(run(checkout, PIP_SAYS="Connection refused"))


def test_no_disk_space(checkout: Path) -> None:
    error = the_error(run(checkout, FREE_GB="5"))
    assert "only 5 GB" in error
    assert "6 GB are needed" in error


def test_a_gpu_needs_more_disk(checkout: Path) -> None:
    stand_in(checkout, "nvidia-smi", "#!/bin/bash\n")
    assert "16 GB are needed" in the_error(run(checkout, FREE_GB="10"))


@pytest.mark.parametrize(
    ("pip_says", "sentence"),
    [
        ("WARNING: Retrying: NewConnectionError: [Errno -3] Temporary failure in name resolution", "cannot be reached"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk filled up"),
        ("ERROR: No matching distribution found for torch==2.13.0", "No matching distribution found for torch==2.13.0"),
    ],
)
def test_pip_fails(checkout: Path, pip_says: str, sentence: str) -> None:
    done = run(checkout, PIP_SAYS=pip_says)
    error = the_error(done)
    assert "== 1/9 environment" in done.stdout
    assert sentence in error
    assert ".cache/install.log" in error
    assert pip_says in (checkout / ".cache" / "install.log").read_text()
    assert not (checkout / ".venv" / "fbitrain-stamp").exists()


def sourced(checkout: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`command` under the shared functions."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source launch/setup_env.sh; source launch/supervise.sh; {command}"],
        env={"PATH": str(checkout / "bin"), **variables},
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=60,
    )


def times_made(checkout: Path) -> int:
    log = checkout / "made.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_torch_is_installed_before_deepspeed_and_everything_under_the_pins(checkout: Path) -> None:
    sourced(checkout, "ensure_venv").check_returncode()
    calls = (checkout / "pip.log").read_text().splitlines()
    assert all("-c constraints.txt" in call for call in calls)
    torch = next(i for i, call in enumerate(calls) if " torch" in call)
    deepspeed = next(i for i, call in enumerate(calls) if "-e ." in call)
    assert torch < deepspeed
    assert "--no-build-isolation" in calls[deepspeed]


def test_a_whole_venv_is_reused(checkout: Path) -> None:
    sourced(checkout, "ensure_venv").check_returncode()
    again = sourced(checkout, "ensure_venv")
    assert "reusing .venv" in again.stdout
    assert times_made(checkout) == 1


@pytest.mark.parametrize("damage", ["half made", "packages gone", "other pins", "moved", "other Python"])
def test_a_venv_that_is_not_what_it_should_be_is_made_anew(checkout: Path, damage: str) -> None:
    if damage == "half made":
        assert sourced(checkout, "ensure_venv", PIP_SAYS="Read timed out").returncode == 1
    else:
        sourced(checkout, "ensure_venv").check_returncode()
    variables = {}
    if damage == "packages gone":
        (checkout / "broken").touch()
    elif damage == "other pins":
        (checkout / "constraints.txt").write_text("torch==1.0\n")
    elif damage == "moved":
        checkout = checkout.rename(checkout.with_name(f"{checkout.name}-moved"))
    elif damage == "other Python":
        variables["FAKE_VERSION"] = "3.13.0"
    done = sourced(checkout, "ensure_venv", **variables)
    done.check_returncode()
    assert "making it anew" in done.stdout
    assert times_made(checkout) == 2


# Signals

TREE = "bash -c 'sleep 300 & echo $! >child; wait'"


def test_a_stop_signal_ends_the_whole_tree_and_nothing_is_left(checkout: Path) -> None:
    script = checkout / "main.sh"
    script.write_text(f"set -euo pipefail\nsource launch/supervise.sh\nsupervise {TREE}\necho not reached\n")
    started = subprocess.Popen(["bash", str(script)], cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child = wait_for_number(checkout / "child")
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=30)
    assert started.returncode == 130
    assert out == b""
    assert b"stopping" in err
    assert not is_alive(child)


def test_what_a_dead_launcher_leaves_behind_is_ended(checkout: Path) -> None:
    done = sourced(checkout, "supervise bash -c 'sleep 300 & echo $! >child'; echo went on")
    assert (done.stdout, done.returncode) == ("went on\n", 0)
    assert not is_alive(wait_for_number(checkout / "child"))


def test_the_exit_code_of_a_supervised_command_is_kept(checkout: Path) -> None:
    assert sourced(checkout, "supervise bash -c 'exit 7' || echo \"got $?\"").stdout == "got 7\n"


def wait_for_number(path: Path) -> int:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # polls; there is nothing to wait on
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, and not yet collected by whoever adopted it


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.sh"), *(ROOT / "launch").rglob("*.s[hb]*"), ROOT / ".ci" / "run"], ids=lambda path: path.name
)
def test_the_scripts_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if path.parent == ROOT or path.parent.name == ".ci":
        assert os.access(path, os.X_OK)
