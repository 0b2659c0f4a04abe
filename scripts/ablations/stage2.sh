#!/usr/bin/env bash
# Ablation: with stage 2, beside the same without it.
for SYSTEM in ${SYSTEM:-retriever retriever+stage2}; do
    (
        ABLATION=
        source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/stages.sh"
        row "$SYSTEM"
    )
done
