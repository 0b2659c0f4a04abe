#!/usr/bin/env bash
# Rank pictures for the train, val and test captions: what the reranker learns from and reorders.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.rank_splits --dataset "$RETRIEVER/07_dataset" --retriever "$TRAINED" "${RANK[@]}" --output "$LISTS" "$@"
