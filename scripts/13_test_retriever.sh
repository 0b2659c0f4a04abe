#!/usr/bin/env bash
# Print the final table beside brute-force two-tower search, and draw examples.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.test --predictions "$RETRIEVER/12_retrieve/$SYSTEM" --rqvae "$RQVAE" --name "$DATASET_NAME" --system "${ABLATION:+$ABLATION, }$SYSTEM" --summary "$SUMMARY" --output "$RETRIEVER/13_test/$SYSTEM" "$@"
