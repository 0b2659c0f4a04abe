#!/usr/bin/env bash
# Train the image tokenizer on the features of the train split.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run RQ-VAE.train --features "$FEATURES" "${TRAIN_RQVAE[@]}" --output "$RQVAE" "$@"
