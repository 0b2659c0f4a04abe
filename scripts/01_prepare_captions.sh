#!/usr/bin/env bash
# Check pictures and captions and write them in the one caption format.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run tools.prepare_captions ${IMAGES:+--images "$IMAGES"} "${CAPTIONS[@]}" --output "$DATA/01_prepare_captions" "$@"
