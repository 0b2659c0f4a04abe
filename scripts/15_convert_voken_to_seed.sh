#!/usr/bin/env bash
# Give every picture the image tokens that the reranker reads.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run reranker.convert --captions "$DATA/01_prepare_captions" "${CONVERT[@]}" --output "$RERANKER/15_tokens" "$@"
