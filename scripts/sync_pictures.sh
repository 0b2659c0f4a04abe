#!/usr/bin/env bash
# Bring the index in line with a folder whose pictures came, changed, moved or went: bash scripts/sync_pictures.sh ~/photos
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.sync --index "$RETRIEVER/14_index" --rqvae "$RQVAE" "$@"
