#!/usr/bin/env bash
# Search the pools for every test caption.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.retrieve --dataset "$RETRIEVER/07_dataset" --retriever "$TRAINED" "${RETRIEVE[@]}" --output "$RETRIEVER/12_retrieve/$SYSTEM" "$@"
