#!/usr/bin/env bash
# Print the final table beside brute-force two-tower search, and draw examples.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
python -m retriever.test --predictions "$RETRIEVER/09_retrieve" --rqvae "${RQVAE:-$TOKENIZER/05_train_rqvae}" --name "$DATASET_NAME" --summary "$RETRIEVER/summary.json" --output "$RETRIEVER/10_test" "$@"
