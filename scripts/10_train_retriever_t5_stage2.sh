#!/usr/bin/env bash
# Train on to tell the right picture from those the search confuses it with (stage 2).
SYSTEM="${SYSTEM:-retriever+stage2}" source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.train_stage2 --dataset "$RETRIEVER/07_dataset" --stage1 "$START_FROM" "${TRAIN_STAGE2[@]}" "${PSEUDO[@]}" --output "$OWN" "$@"
