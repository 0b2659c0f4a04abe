#!/usr/bin/env bash
# Train projection heads on the locked towers (LiT); the features of the new space are written with them.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run RQ-VAE.train_heads --features "$TOKENIZER/03_prepare_emb" "${TRAIN_HEADS[@]}" --output "$TOKENIZER/04_train_heads" "$@"
