#!/usr/bin/env bash
# Write the features of the pictures as an index of faiss: bash scripts/export_faiss.sh FOLDER
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.export_faiss --index "$RETRIEVER/14_index" "$@"
