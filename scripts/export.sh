#!/usr/bin/env bash
# Write the trained retriever and its pictures into one folder, to copy or to put on a model hub: bash scripts/export.sh FOLDER
SYSTEM="${SYSTEM:-best}"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.export --index "$RETRIEVER/14_index" --retriever "$TRAINED" --summary "$SUMMARY" --system "${ABLATION:+$ABLATION, }$SYSTEM" ${RERANKER:+--weights "$RERANKER/18_test/$SYSTEM"} "$@"
