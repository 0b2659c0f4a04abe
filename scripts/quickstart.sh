#!/usr/bin/env bash
# Set everything up and run the whole chain; finished stages are skipped, a killed one goes on where it was.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
for stage in $STAGES; do
    echo "== $stage: $(sed -n '2s/^# //p' "scripts/$stage.sh")"
    bash "scripts/$stage.sh"
done
