#!/usr/bin/env bash
# Add a folder of pictures to the index, without training: bash scripts/add_pictures.sh ~/new_photos
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.add --index "$RETRIEVER/14_index" "$@"
