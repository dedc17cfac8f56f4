# shellcheck shell=bash
# The environment that quickstart.sh and test.sh share. Sourced, in the repository root, by a script under `set -euo pipefail`.
#
#   check_python      python3 (or $PYTHON) is 3.10 or later and can make virtual environments
#   check_disk GB     that much is free here
#   check_compiler    a C++ compiler is on PATH
#   ensure_venv       .venv holds what constraints.txt, setup.cfg and pyproject.toml say; PATH starts with it

VENV=.venv
STAMP=$VENV/fbitrain-stamp # written last: a virtual environment without it is half made
INSTALL_LOG=.cache/install.log
PYTHON=${PYTHON:-python3}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

check_python() {
    command -v "$PYTHON" >/dev/null || fail "no $PYTHON on PATH; install Python 3.10 or later (Debian, Ubuntu: apt install python3 python3-venv)."
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$PYTHON is $("$PYTHON" --version 2>&1), and Python 3.10 or later is needed; name another one like this: PYTHON=python3.12 $0"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv)."
}

check_disk() {
    local free_gb
    free_gb=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024 / 1024) }')
    ((free_gb >= $1)) || fail "only $free_gb GB of disk are free in $PWD, and $1 GB are needed; make room and run this again."
}

check_compiler() {
    command -v "${CXX:-g++}" >/dev/null || command -v clang++ >/dev/null || command -v c++ >/dev/null ||
        fail "no C++ compiler on PATH; install one (Debian, Ubuntu: apt install g++)."
}

# What the environment is made from. The interpreter and the folder count: neither may change under a virtual environment.
wanted_stamp() {
    { cat constraints.txt setup.cfg pyproject.toml && "$PYTHON" --version && pwd; } | sha256sum | cut -d' ' -f1
}

venv_is_valid() {
    [[ -f $STAMP && $(<"$STAMP") == "$(wanted_stamp)" ]] && "$VENV/bin/python" - <<'PY' 2>/dev/null
import importlib.util, sys
needed = ("fbitrain", "torch", "deepspeed", "transformers", "tokenizers", "starlette", "openai", "pytest")
sys.exit(any(importlib.util.find_spec(name) is None for name in needed))
PY
}

# Runs "$@" with its output in the log, the newest line of which stands on the terminal meanwhile.
run_logged() {
    local status=0 watcher=
    if [[ -t 1 ]]; then
        while kill -0 $$ 2>/dev/null; do # ends with this script, however that ends
            printf '\r\033[K  %s' "$(tail -n 1 "$INSTALL_LOG" | cut -c 1-"$((${COLUMNS:-80} - 4))")"
            sleep 1
        done &
        watcher=$!
    fi
    "$@" >>"$INSTALL_LOG" 2>&1 </dev/null || status=$?
    if [[ -n $watcher ]]; then
        kill "$watcher" 2>/dev/null || true
        wait "$watcher" 2>/dev/null || true
        printf '\r\033[K'
    fi
    return "$status"
}

pip_install() {
    printf '  %s\n' "$1"
    shift
    run_logged "$VENV/bin/python" -m pip install --disable-pip-version-check -c constraints.txt "$@" || explain_pip_failure
}

# One sentence instead of pip's pages. Order matters: a full disk can look like a broken download.
explain_pip_failure() {
    if grep -q 'No space left on device' "$INSTALL_LOG"; then
        fail "the disk filled up while packages were being installed; make room and run this again (log: $INSTALL_LOG)."
    fi
    if grep -qE 'Temporary failure in name resolution|Name or service not known|Network is unreachable|Connection refused|Failed to establish a new connection|ConnectTimeout|Read timed out|ProxyError|Cannot connect to proxy' "$INSTALL_LOG"; then
        fail "the package index cannot be reached; check the network (or the proxy and index settings of pip) and run this again (log: $INSTALL_LOG)."
    fi
    fail "pip could not install the dependencies: $(grep -m 1 -E '^ *(ERROR|error)' "$INSTALL_LOG" || echo 'no error line'); the whole log is in $INSTALL_LOG."
}

ensure_venv() {
    if venv_is_valid; then
        echo "  reusing $VENV: it was made from these same constraints.txt, setup.cfg and pyproject.toml"
    else
        make_venv
    fi
    PATH=$PWD/$VENV/bin:$PATH
    export PATH
}

make_venv() {
    [[ ! -e $VENV ]] || echo "  $VENV is incomplete or out of date: making it anew"
    rm -rf "$VENV"
    mkdir -p "$(dirname "$INSTALL_LOG")"
    : >"$INSTALL_LOG"
    run_logged "$PYTHON" -m venv "$VENV" || fail "$PYTHON -m venv $VENV failed: $(tail -n 1 "$INSTALL_LOG")"
    pip_install "build tools" pip setuptools wheel ninja
    # DeepSpeed comes as source, and its setup looks at torch: torch goes first, and the build sees this environment.
    pip_install "torch (the largest download)" torch numpy
    pip_install "deepspeed, transformers and the rest, and the CPU kernels" --no-build-isolation -e '.[train,serve,dev,eval]'
    wanted_stamp >"$STAMP"
}
