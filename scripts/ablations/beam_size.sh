#!/usr/bin/env bash
# Ablation: fewer or more beams: bash scripts/ablations/beam_size.sh 1 5 20 50 100
ABLATION=
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/stages.sh"
for beams in "${@:-1}"; do row "beam size $beams" --beams "$beams" --early-beams "$beams"; done
