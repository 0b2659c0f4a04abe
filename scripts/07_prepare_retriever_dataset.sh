#!/usr/bin/env bash
# Join captions and codes into the retriever's dataset.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.prepare --codes "$CODES" --output "$RETRIEVER/07_dataset" "$@"
