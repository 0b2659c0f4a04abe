#!/usr/bin/env bash
# Build the index that search reads; pictures can be added to it and removed without training.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.build --dataset "$RETRIEVER/07_dataset" --rqvae "$RQVAE" --output "$RETRIEVER/14_index" "$@"
