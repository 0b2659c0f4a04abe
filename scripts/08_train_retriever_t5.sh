#!/usr/bin/env bash
# Train the language model to write a caption's vokens (stage 1).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
python -m retriever.train --dataset "$RETRIEVER/07_dataset" "${TRAIN_RETRIEVER[@]}" --output "$RETRIEVER/08_train" "$@"
