#!/usr/bin/env bash
# Write the report: one page with everything that has been run.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.report --dataset "$RETRIEVER/07_dataset" --runs "$DATA" "$TOKENIZER" "$RETRIEVER" "$RERANKER" --summary "$SUMMARY" --name "$DATASET_NAME" ${REPORT[@]+"${REPORT[@]}"} --output "$RETRIEVER/19_report" "$@"
