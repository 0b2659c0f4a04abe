#!/usr/bin/env bash
# Ablation: codebooks of other sizes: bash scripts/ablations/codebook_size.sh 128 256 1024
set -e
for size in "${@:-256}"; do
    (
        ABLATION=codebook_size_$size
        source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/stages.sh"
        if recipe_has --codebook-size "$size"; then exit; fi
        tokenizer_and_retriever --codebook-size "$size"
        row "codebook size $size"
    )
done
