#!/usr/bin/env bash
# Search the pictures with words, or with a picture (--picture): bash scripts/search.sh "outlined drawing of a turtle"
SYSTEM="${SYSTEM:-best}"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.search --index "$RETRIEVER/14_index" --retriever "$TRAINED" --sheet "$RETRIEVER/search.png" ${RERANKER:+--weights "$RERANKER/18_test/$SYSTEM"} "$@"
