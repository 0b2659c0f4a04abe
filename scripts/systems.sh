# Sourced by scripts/env.sh: reads the dataset's file, and names the folders of its stages and of each SYSTEM.
nearest() { # "; did you mean ...?" for a misspelt word, of those that follow it
    python -c 'import sys; from tools.texts import did_you_mean; print(did_you_mean(sys.argv[1], sys.argv[2:]))' "$@"
}

refuse() { # with one line
    echo "error: $1" >&2
    exit 2
}

DATASET="${DATASET:-emoji}"
DATASET_NAME="$(basename "$DATASET" .sh)"
DATASET_FILE="$DATASET"
if [ ! -f "$DATASET" ]; then DATASET_FILE="scripts/datasets/$DATASET.sh"; fi
if [ ! -f "$DATASET_FILE" ]; then
    near="$(nearest "$DATASET" $(basename -s .sh scripts/datasets/*.sh))"
    refuse "DATASET=$DATASET: there is no $DATASET_FILE${near:-; write one after scripts/datasets/flickr30k.sh}"
fi
source "$DATASET_FILE"
case "$DATASET_FILE:${RECIPE:-better}" in
*:better | *:faithful | *:large-batch) ;;
scripts/datasets/*)
    refuse "RECIPE=$RECIPE: write better, faithful or large-batch$(nearest "$RECIPE" better faithful large-batch)" ;;
esac

TOKENIZER="${TOKENIZER:-RQ-VAE/output/$DATASET_NAME}" RETRIEVER="${RETRIEVER:-retriever/output/$DATASET_NAME}"
RERANKER="${RERANKER:-reranker/output/$DATASET_NAME}"
RQVAE="${RQVAE:-$TOKENIZER/05_train_rqvae}" CODES="$TOKENIZER/06_generate_codes" SUMMARY="$RETRIEVER/summary.json"
PSEUDO_FOLDER="$RETRIEVER/08_pseudo_queries"
if [ -z "${PSEUDO_FROM:-}" ]; then PSEUDO_FROM=(--dataset "$RETRIEVER/07_dataset"); fi # or features: before there are codes
if [ -n "${ABLATION:-}" ]; then # stages from the tokenizer on write into a folder of their own
    SUMMARY="$RETRIEVER/ablations/summary.json"
    RETRIEVER="$RETRIEVER/ablations/$ABLATION"
    RQVAE="$RETRIEVER/05_train_rqvae" CODES="$RETRIEVER/06_generate_codes"
    RERANKER="$RERANKER/ablations/$ABLATION"
fi

# Each SYSTEM: the script that trains it, its folder, the one that it starts from, and whether it reads pseudo queries,
# which makes it transductive. "best" is the one that the dataset's file names.
GOES_ON=-
if [ -n "${PSEUDO_GOES_ON:-}" ]; then GOES_ON=09_train/retriever; fi
SYSTEMS="
retriever         09_train_retriever_t5         09_train/retriever          -                          -
retriever+pseudo  09_train_retriever_t5         09_train/retriever+pseudo   $GOES_ON                   pseudo
retriever+stage2  10_train_retriever_t5_stage2  10_stage2/retriever+stage2  09_train/retriever+pseudo  pseudo
inductive+stage2  10_train_retriever_t5_stage2  10_stage2/inductive+stage2  09_train/retriever         -
llama             11_finetune_retriever_llama   11_llama/llama              -                          -
llama+pseudo      11_finetune_retriever_llama   11_llama/llama+pseudo       -                          pseudo
"
SYSTEM="${SYSTEM:-retriever}"
if [ "$SYSTEM" = best ]; then SYSTEM="${BEST:-retriever}"; fi
TRAINED_BY= PSEUDO=() START=()
while read -r name script folder start pseudo; do
    if [ "$name" != "$SYSTEM" ]; then continue; fi
    TRAINED_BY="$script" OWN="$RETRIEVER/$folder" START_FROM="$RETRIEVER/$start"
    TRAINED="${TRAINED:-${TRAINED_IN:-$RETRIEVER}/$folder}"
    if [ "$start" != - ]; then START=(--start "$START_FROM"); fi
    if [ "$pseudo" = pseudo ]; then PSEUDO=(--pseudo-queries "$PSEUDO_FOLDER"); fi
done <<<"$SYSTEMS"
if [ -z "$TRAINED_BY" ]; then
    names="$(awk 'NF { print $1 }' <<<"$SYSTEMS")"
    refuse "SYSTEM=$SYSTEM: write ${names//$'\n'/, } or best$(nearest "$SYSTEM" $names best)"
fi
case "$SCRIPT:${ABLATION:-}" in
"$TRAINED_BY":*) ;;
09_* | 10_* | 11_*) refuse "SYSTEM=$SYSTEM is trained by scripts/$TRAINED_BY.sh: $RUN_SCRIPTS/$TRAINED_BY.sh" ;;
08_*:?*) refuse "pseudo queries are the same in every ABLATION: leave it out here" ;;
esac
LISTS="$RERANKER/16_lists/$SYSTEM"
RERANKER_SYSTEM="${RERANKER_SYSTEM:-$SYSTEM}" # whose lists train the reranker
RERANKER_MODEL="${RERANKER_MODEL:-$RERANKER/17_train/$RERANKER_SYSTEM}"
if [ "$RERANKER_SYSTEM" != "$SYSTEM" ]; then RANK+=(--train-per-picture 0); fi

output_of() { # the run folder that a stage writes: output_of 09_train_retriever_t5@retriever+pseudo
    local system=retriever
    case "$1" in *@*) system="${1#*@}" ;; esac
    case "$1" in
    00_* | 01_*) echo "$DATA/${1%@*}" ;;
    02_* | 03_* | 04_*) echo "$TOKENIZER/${1%@*}" ;;
    05_*) echo "$RQVAE" ;;
    06_*) echo "$CODES" ;;
    07_*) echo "$RETRIEVER/07_dataset" ;;
    08_*) echo "$PSEUDO_FOLDER" ;;
    09_*) echo "$RETRIEVER/09_train/$system" ;;
    10_*) echo "$RETRIEVER/10_stage2/$system" ;;
    11_*) echo "$RETRIEVER/11_llama/$system" ;;
    12_*) echo "$RETRIEVER/12_retrieve/$system" ;;
    13_*) echo "$RETRIEVER/13_test/$system" ;;
    14_*) echo "$RETRIEVER/14_index" ;;
    15_*) echo "$RERANKER/15_tokens" ;;
    16_*) echo "$RERANKER/16_lists/$system" ;;
    17_*) echo "$RERANKER/17_train/$system" ;;
    18_*) echo "$RERANKER/18_test/$system" ;;
    19_*) echo "$RETRIEVER/19_report" ;;
    esac
}
