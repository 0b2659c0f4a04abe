#!/usr/bin/env bash
# Ablation: with and without stage 2, both with pseudo queries; the trainings are those of the main table.
set -e
for SYSTEM in retriever+pseudo retriever+stage2; do
    (
        ABLATION=
        source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/stages.sh"
        row "$SYSTEM"
    )
done
