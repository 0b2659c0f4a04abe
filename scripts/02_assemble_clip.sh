#!/usr/bin/env bash
# Join an image tower and a text tower into one open_clip model, for data that CLIP has not seen.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run RQ-VAE.assemble_clip "${ASSEMBLE_CLIP[@]}" --output "$TOKENIZER/02_assemble_clip" "$@"
