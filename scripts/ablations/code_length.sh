#!/usr/bin/env bash
# Ablation: more or fewer vokens a picture: bash scripts/ablations/code_length.sh 2 3 6
set -e
for levels in "${@:-3}"; do
    (
        ABLATION=code_length_$levels
        source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/stages.sh"
        if recipe_has --levels "$levels"; then exit; fi
        tokenizer_and_retriever --levels "$levels"
        row "code length $levels"
    )
done
