#!/usr/bin/env bash
# Ablation: stage 1 with and without pseudo queries; the trainings are those of the main table.
set -e
for SYSTEM in retriever retriever+pseudo; do
    (
        ABLATION=
        source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/stages.sh"
        row "$SYSTEM"
    )
done
