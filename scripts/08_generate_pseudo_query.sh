#!/usr/bin/env bash
# Write pseudo queries: captions for pictures of val and test, from other sources than their own captions.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.pseudo_queries.generate "${PSEUDO_FROM[@]}" "${PSEUDO_QUERIES[@]}" --output "$PSEUDO_FOLDER" "$@"
