#!/usr/bin/env bash
# Search with the fine-tuned LLaMA and print its table.
set -e
export SYSTEM="${SYSTEM:-llama}"
bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/12_retrieve.sh" "$@"
bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/13_test_retriever.sh"
