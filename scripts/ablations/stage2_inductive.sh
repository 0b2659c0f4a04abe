#!/usr/bin/env bash
# Ablation: stage 2 without pseudo queries, behind the inductive stage 1.
ABLATION= SYSTEM=inductive+stage2
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/stages.sh"
stage 10_train_retriever_t5_stage2
row "$SYSTEM"
