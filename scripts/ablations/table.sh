#!/usr/bin/env bash
# Print the table of the ablations that have been run.
ABLATION=
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/stages.sh"
run tools.results --summary "$ABLATIONS/summary.json" --levels image "$@"
