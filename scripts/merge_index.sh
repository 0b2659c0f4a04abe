#!/usr/bin/env bash
# Merge the index's segments into one, as before it is copied; searches find the same: bash scripts/merge_index.sh
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.merge --index "$RETRIEVER/14_index" "$@"
