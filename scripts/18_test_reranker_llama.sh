#!/usr/bin/env bash
# Reorder what the search found by features, reranker and both, and print the table.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run reranker.test --lists "$LISTS" --reranker "$RERANKER_MODEL" --tokens "$RERANKER/15_tokens" --name "$DATASET_NAME" --system "$SYSTEM" --summary "$SUMMARY" "${TEST_RERANKER[@]}" --output "$RERANKER/18_test/$SYSTEM" "$@"
