#!/usr/bin/env bash
# Fine-tune a causal model (LLaMA) with LoRA to write a caption's vokens.
SYSTEM="${SYSTEM:-llama}" source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.train --dataset "$RETRIEVER/07_dataset" "${FINETUNE_LLAMA[@]}" "${PSEUDO[@]}" --output "$OWN" "$@"
