#!/usr/bin/env bash
# Give every picture its codes.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
run RQ-VAE.generate_codes --features "$FEATURES" --rqvae "$RQVAE" "${GENERATE_CODES[@]}" --output "$CODES" "$@"
