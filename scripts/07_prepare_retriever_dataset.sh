#!/usr/bin/env bash
# Join captions and codes into the retriever's dataset.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
python -m retriever.prepare --codes "$TOKENIZER/06_generate_codes" --output "$RETRIEVER/07_dataset" "$@"
