#!/usr/bin/env bash
# Train the language model to write a caption's vokens (stage 1); SYSTEM=retriever+pseudo also trains on pseudo queries.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.train --dataset "$RETRIEVER/07_dataset" "${TRAIN_RETRIEVER[@]}" "${PSEUDO[@]}" "${START[@]}" --output "$OWN" "$@"
