#!/usr/bin/env bash
# From a fresh clone to a trained, released, evaluated 1-bit model that continues a prompt. Run again, it reuses what is valid and says so.
#
#   ./quickstart.sh      needs Python 3.10 or later, a C++ compiler, 6 GB of disk and a package index
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source launch/setup_env.sh
source launch/supervise.sh

CONFIG=launch/configs/quickstart.yaml
TEACHER=.cache/smollm2-135m
SAMPLE=.cache/sample
RUN=runs/quickstart
RELEASE=releases/quickstart

heading() {
    printf '\n== %s (%d s)\n' "$1" "$SECONDS"
}

# The newest complete checkpoint's marker; nothing if there is none.
last_checkpoint() {
    find "$RUN/checkpoints" -path '*/step_????????/COMPLETE.json' 2>/dev/null | sort | tail -n 1
}

# newer FILE OTHER…: FILE exists and none of the others is newer.
newer() {
    local file=$1 other
    shift
    [[ -f $file ]] || return 1
    for other in "$@"; do
        [[ ! $other -nt $file ]] || return 1
    done
}

# evaluate NAME MODEL: held-out perplexity of MODEL in $RELEASE/eval_NAME.json.
evaluate() {
    local out=$RELEASE/eval_$1.json
    if newer "$out" "$2/config.json" "$SAMPLE/manifest.json" "$CONFIG"; then
        echo "  $1: reusing $out"
    else
        supervise python launch/eval.py "$2" --ppl "heldout=$SAMPLE/heldout.jsonl.zst" \
            --seq-len "$seq_len" --max-tokens "$eval_tokens" --batch-size 8 --out "$out" || fail "the evaluation of $2 failed; see above."
    fi
}

# The most of $1 ranks that a step's tokens can be shared over.
most_ranks() {
    python - "$CONFIG" "$1" <<'PY'
import sys
from fbitrain.config import ConfigError, load_config
for ranks in range(int(sys.argv[2]), 1, -1):
    try:
        load_config(sys.argv[1], world_size=ranks)
    except ConfigError:
        continue
    break
else:
    ranks = 1
print(ranks)
PY
}

heading "1/9 environment"
check_python
check_compiler
if ! venv_is_valid; then
    # With a GPU, pip takes torch's CUDA build, which is far larger.
    check_disk "$(command -v nvidia-smi >/dev/null && echo 16 || echo 6)"
fi
ensure_venv
# Only the teacher's package is still to be fetched; no model is ever looked up on a hub here.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONWARNINGS="ignore::FutureWarning:torch.distributed.c10d_logger"

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=2 # CPU
if ((gpus > 0)); then
    ranks=$(most_ranks "$gpus")
else
    export DS_ACCELERATOR=cpu
fi

heading "2/9 teacher: SmolLM2-135M-Instruct"
supervise python launch/fetch_teacher.py --out "$TEACHER" || exit 1

heading "3/9 sample corpus, from this Python installation"
supervise fbitrain data sample --out "$SAMPLE" || exit 1

heading "4/9 doctor"
supervise python launch/doctor.py --config "$CONFIG" --world-size "$ranks" || exit 1

heading "5/9 training on $ranks $( ((gpus > 0)) && echo GPUs || echo CPU ranks)"
supervise deepspeed -q --master_port "$(free_port)" --num_accelerators "$ranks" launch/pretrain.py "$CONFIG" ||
    fail "training stopped before its end; ./quickstart.sh goes on from the last checkpoint in $RUN/checkpoints."
# A launcher that was killed itself can report success.
[[ -f $RUN/FINISHED.json ]] ||
    fail "training stopped before its end; ./quickstart.sh goes on from the last checkpoint in $RUN/checkpoints."

heading "6/9 release"
if newer "$RELEASE/dense/config.json" "$(last_checkpoint)" && newer "$RELEASE/packed/config.json" "$(last_checkpoint)"; then
    echo "  reusing $RELEASE: it is newer than the run's last checkpoint"
else
    supervise python launch/release.py "$RUN" --format dense,packed --out "$RELEASE" || exit 1
fi

heading "7/9 evaluation"
read -r seq_len eval_tokens < <(python - "$CONFIG" "$ranks" <<'PY'
import sys
from fbitrain.config import load_config
config = load_config(sys.argv[1], world_size=int(sys.argv[2]))
print(config.data.seq_len, config.eval.max_tokens)  # as in training, so that the numbers can be compared
PY
)
evaluate dense "$RELEASE/dense"
evaluate packed "$RELEASE/packed"
evaluate teacher "$TEACHER"

heading "8/9 a continuation by the packed model"
supervise python launch/generate.py "$RELEASE/packed" --prompt "def main(" | tee "$RELEASE/sample.txt"

heading "9/9 summary"
supervise python launch/summarize.py "$RUN" "$RELEASE"
