#!/usr/bin/env bash
# Set everything up and run the whole chain; finished stages are skipped, a killed one goes on where it was.
#   bash scripts/quickstart.sh --overwrite     throws away what the stages have made, and starts again
#   bash scripts/quickstart.sh --skip-bad      for the first stage: go on without bad pictures and captions; so is
#                                              --follow-links
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
every=() first=()
for word in "$@"; do
    case "$word" in
    --overwrite) every+=("$word") ;;
    --skip-bad | --follow-links) first+=("$word") ;;
    --help | -h) sed -n '/^source/q; s/^# //p' "$ROOT/scripts/quickstart.sh" && exit ;;
    *) refuse "$word is not an option of quickstart.sh, which takes --overwrite, --skip-bad and --follow-links; settings of the stages are in $DATASET_FILE" ;;
    esac
done
if [ -n "${FOLLOWS:-}" ] && [ "${#every[@]}" = 0 ] && [ -f "$RETRIEVER/14_index/manifest.json" ]; then
    echo "== sync_pictures: $(sed -n '2s/^# \(.*\):.*/\1./p' scripts/sync_pictures.sh)"
    cd "$HERE"
    case " ${first[*]} " in *" --follow-links "*) first=(--follow-links) ;; *) first=() ;; esac # bad ones are passed over
    exec bash "$ROOT/scripts/sync_pictures.sh" "${first[@]}" "$FOLLOWS"
fi
# What is missing for a later stage is said now; PREFLIGHT=off passes over it.
OVERWRITE="${every:-}" FIRST="${first[*]}" bash scripts/preflight.sh --brief
export STARTED_BY="scripts/quickstart.sh${first[*]:+ ${first[*]}}" # as the stages' messages name it
cd "$HERE"
for stage in $STAGES; do # "09_train_retriever_t5", or "09_train_retriever_t5@retriever+pseudo" for another SYSTEM
    script="$ROOT/scripts/${stage%@*}.sh" system=retriever own=()
    case "$stage" in *@*) system="${stage#*@}" ;; 01_*) own=("${first[@]}") ;; esac
    echo "== $stage: $(sed -n '2s/^# //p' "$script")"
    SYSTEM="$system" bash "$script" "${every[@]}" "${own[@]}"
done
