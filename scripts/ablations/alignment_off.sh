#!/usr/bin/env bash
# Ablation: a tokenizer that is not aligned with the captions.
ABLATION=alignment_off
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/stages.sh"
tokenizer_and_retriever --alignment none
row "alignment off"
