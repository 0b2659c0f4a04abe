# Sourced by scripts/env.sh: notes where the user stands, goes to the repository's root, and takes relative paths along.
#   HERE         the folder in which the user typed the command
#   TYPED        how many words the script was given; tools/command_line/place.py finds the paths among them
#   SCRIPT       the script's own name, without .sh
#   RUN_SCRIPTS  how a script is started from there, with the user's variables
#   SETTINGS     these variables as they are typed before a command
# Scripts that a script calls run in HERE too, so that their messages speak of the same place.
HERE="$PWD" TYPED=$# RUN_SCRIPTS="bash scripts" SETTINGS=
SCRIPT="$(basename "$(readlink -f "$0")" .sh)"
ROOT="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd -P)"

for name in PICTURES CAPTIONS_FILE DATASET; do
    if [ "$name" = DATASET ] && [ ! -f "${DATASET:-}" ]; then continue; fi # it is a name
    if [ -n "${!name:-}" ]; then printf -v "$name" %s "$(realpath -m -- "${!name}")"; fi
done
if [ ! "$HERE" -ef "$ROOT" ]; then # at the root, these stay as they were typed: manifests record them
    for name in SEED_WEIGHTS RQVAE TRAINED TOKENIZER RETRIEVER RERANKER RERANKER_MODEL LLAMA; do
        if [ "$name" = LLAMA ] && [ ! -e "${LLAMA:-}" ]; then continue; fi # it is a name
        if [ -n "${!name:-}" ]; then printf -v "$name" %s "$(realpath -m -- "${!name}")"; fi
    done
    RUN_SCRIPTS="bash $ROOT/scripts" words=
    for word in ${LAUNCH:-}; do # a launcher's configuration file
        if [ "${word#/}" = "$word" ] && [ -f "$word" ]; then word="$HERE/$word"; fi
        words="$words${words:+ }$word"
    done
    if [ -n "$words" ]; then LAUNCH="$words"; fi
fi
for name in DATASET PICTURES CAPTIONS_FILE RECIPE MODELS ABLATION SYSTEM RERANKER_SYSTEM RERANKER_MODEL TRAINED RQVAE \
    TOKENIZER RETRIEVER RERANKER SEED_WEIGHTS LLAMA LAUNCH; do # in messages, as they may be not exported
    if [ -z "${!name:-}" ] || [[ "$(declare -p "$name")" != "declare -x"* ]]; then continue; fi # a script's own default
    if [ "$name=${!name}" = SYSTEM=retriever ]; then continue; fi # the default, which quickstart.sh names too
    if [[ "${!name}" =~ ^[A-Za-z0-9_./+@:,-]+$ ]]; then typed="${!name}"; else typed="'${!name//\'/\'\\\'\'}'"; fi
    SETTINGS="$SETTINGS$name=$typed "
done
RUN_SCRIPTS="$SETTINGS$RUN_SCRIPTS"
cd "$ROOT"
