#!/usr/bin/env bash
# Write the codes of the pictures as a catalogue of semantic ids: bash scripts/export_codes.sh codes.parquet
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.export_codes --index "$RETRIEVER/14_index" "$@"
