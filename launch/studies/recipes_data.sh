#!/usr/bin/env bash
# The corpus, the tokenizer and the token shards of launch/studies/recipes.yaml, in .cache/recipes: about 10 seconds.
# Run again, it keeps what is valid.
#
#   launch/studies/recipes_data.sh      with the environment that ./quickstart.sh makes, or another that is active
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [[ -z ${VIRTUAL_ENV:-} && -f .venv/bin/activate ]]; then
    source .venv/bin/activate
fi

FOLDER=.cache/recipes
SAMPLE=$FOLDER/sample
TOKENIZER=$FOLDER/tokenizer.model
TOKENS=$FOLDER/tokens

# 45 MB of the Python installation's own sources, of which 0.3 MB are held out.
fbitrain data sample --out "$SAMPLE" --megabytes 45

if [[ $TOKENIZER -nt $SAMPLE/manifest.json ]]; then
    echo "kept $TOKENIZER"
else
    fbitrain data train-tokenizer --vocab-size 1024 --max-mb 10 --out "$TOKENIZER" "$SAMPLE/github" "$SAMPLE/docs"
    rm -rf "$TOKENS" # made with another tokenizer
fi

fbitrain data pretokenize launch/studies/recipes_base.yaml data.pretokenized= --out "$TOKENS"
