#!/usr/bin/env bash
# Set everything up and run the whole chain; finished stages are skipped, a killed one goes on where it was.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
bash scripts/preflight.sh --brief # what is missing for a later stage is said now; PREFLIGHT=off passes over it
for stage in $STAGES; do # "09_train_retriever_t5", or "09_train_retriever_t5@retriever+pseudo" for another SYSTEM
    script="scripts/${stage%@*}.sh" system=retriever
    case "$stage" in *@*) system="${stage#*@}" ;; esac
    echo "== $stage: $(sed -n '2s/^# //p' "$script")"
    SYSTEM="$system" bash "$script"
done
