#!/usr/bin/env bash
# Train the reranker to score the right picture above the others of its list.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run reranker.train --lists "$LISTS" --tokens "$RERANKER/15_tokens" "${TRAIN_RERANKER[@]}" --output "$RERANKER_MODEL" "$@"
