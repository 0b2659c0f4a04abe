#!/usr/bin/env bash
# Encode and tokenize a large collection in shards: bash scripts/encode_collection.sh --source "s3://bucket/{0000..0999}.tar"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run RQ-VAE.encode_shards --features "$FEATURES" --rqvae "$RQVAE" --output "$TOKENIZER/collection" "$@"
