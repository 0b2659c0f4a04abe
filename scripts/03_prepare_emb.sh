#!/usr/bin/env bash
# Encode each picture and each caption once.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run RQ-VAE.prepare_emb --captions "$DATA/01_prepare_captions" "${CLIP[@]}" --output "$TOKENIZER/03_prepare_emb" "$@"
