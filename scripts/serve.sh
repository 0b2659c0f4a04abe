#!/usr/bin/env bash
# The search page, at http://127.0.0.1:7860: bash scripts/serve.sh
SYSTEM="${SYSTEM:-best}"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.serve --index "$RETRIEVER/14_index" --retriever "$TRAINED" ${RERANKER:+--weights "$RERANKER/18_test/$SYSTEM"} "$@"
