#!/usr/bin/env bash
# Add pictures to the index by embeddings of clip-retrieval: bash scripts/add_embeddings.sh --model ViT-L-14-336 --pretrained openai FOLDER
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run retriever.gallery.add_embeddings --index "$RETRIEVER/14_index" "$@"
