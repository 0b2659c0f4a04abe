#!/usr/bin/env bash
# Remove pictures from the index by id or file; the files stay: bash scripts/remove_pictures.sh ~/new_photos/cat.jpg
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.remove --index "$RETRIEVER/14_index" "$@"
