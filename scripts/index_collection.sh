#!/usr/bin/env bash
# Build an index of the collection that encode_collection.sh has coded; search it with search.sh --index.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.build_from_tables --collection "$TOKENIZER/collection" --output "$RETRIEVER/14_collection" "$@"
