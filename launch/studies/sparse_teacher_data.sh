#!/usr/bin/env bash
# The corpus and the teacher's targets of launch/studies/sparse_teacher.yaml, in .cache/recipes: a quarter of an hour of
# one core. Its teacher is the larger model in full precision that launch/studies/recipes.yaml trains. Run again, it goes
# on with what is not finished.
#
#   launch/studies/sparse_teacher_data.sh      with the environment that ./quickstart.sh makes, or another that is active
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipes_data.sh" # the environment, $SAMPLE and the tokenizer

BASE=launch/studies/sparse_teacher_base.yaml
PART=$FOLDER/part
TARGETS=$FOLDER/targets

# As many documents as the students read once: about 2.6 million tokens.
mkdir -p "$PART/github"
python - "$SAMPLE/github/github_00.jsonl.zst" "$PART/github/github_00.jsonl" <<'PY'
import itertools, sys, zstandard
with zstandard.open(sys.argv[1], "rt", encoding="utf-8") as lines, open(sys.argv[2], "w", encoding="utf-8") as part:
    part.writelines(itertools.islice(lines, 330))
PY
fbitrain data pretokenize "$BASE" data.pretokenized= --out "$PART/tokens"

for draws in 12 25 50; do
    fbitrain cache-teacher "$BASE" --out "$TARGETS/draws_$draws" --draws "$draws"
done
fbitrain cache-teacher "$BASE" --out "$TARGETS/systematic_12" --draws 12 --systematic
fbitrain cache-teacher "$BASE" --out "$TARGETS/top_16" --top 16
