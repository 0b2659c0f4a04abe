#!/usr/bin/env bash
# Set everything up and run the whole chain; finished stages are skipped, a killed one goes on where it was.
#   bash scripts/quickstart.sh --overwrite     throws away what the stages have made, and starts again
#   bash scripts/quickstart.sh --skip-bad      for the first stage: go on without bad pictures and captions; so is
#                                              --follow-links
overwrite='' first=() unknown=''
for word in "$@"; do # before anything is installed
    case "$word" in
    --overwrite) overwrite=yes ;;
    --skip-bad | --follow-links) first+=("$word") ;;
    --help | -h) sed -n '/^overwrite=/q; s/^# //p' "$0" && exit ;;
    *) unknown="${unknown:-$word}" ;;
    esac
done
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
if [ -n "$unknown" ]; then
    refuse "$unknown is not an option of quickstart.sh, which takes --overwrite, --skip-bad and --follow-links; settings of the stages are in $DATASET_FILE"
fi
if [ -n "${FOLLOWS:-}" ] && [ -z "$overwrite" ] && [ -f "$RETRIEVER/14_index/manifest.json" ]; then
    echo "== sync_pictures: $(sed -n '2s/^# \(.*\):.*/\1./p' scripts/sync_pictures.sh)"
    cd "$HERE"
    case " ${first[*]} " in *" --follow-links "*) first=(--follow-links) ;; *) first=() ;; esac # bad ones are passed over
    exec bash "$ROOT/scripts/sync_pictures.sh" "${first[@]}" "$FOLLOWS"
fi
# What is missing for a later stage is said now; PREFLIGHT=off passes over it.
OVERWRITE="$overwrite" FIRST="${first[*]}" bash scripts/preflight.sh --brief
export STARTED_BY="scripts/quickstart.sh${first[*]:+ ${first[*]}}" # as the stages' messages name it
if [ -n "$overwrite" ]; then # all at once: what a kill then leaves is a chain that goes on without --overwrite
    for stage in $STAGES; do outputs+=("$(output_of "$stage")"); done
    python -m tools.clear "${outputs[@]}"
fi
cd "$HERE"
for stage in $STAGES; do # "09_train_retriever_t5", or "09_train_retriever_t5@retriever+pseudo" for another SYSTEM
    script="$ROOT/scripts/${stage%@*}.sh" system=retriever own=()
    case "$stage" in *@*) system="${stage#*@}" ;; 01_*) own=("${first[@]}") ;; esac
    echo "== $stage: $(sed -n '2s/^# //p' "$script")"
    SYSTEM="$system" bash "$script" "${own[@]}"
done
