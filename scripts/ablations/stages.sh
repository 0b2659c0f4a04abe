# Sourced by each ablation, which may set ABLATION before: how it runs stages, and how it adds its row to the table.
# All figures are of val: test is touched once, at the end, by the systems of the main table.
export ABLATION SYSTEM="${SYSTEM:-retriever}"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../env.sh"
[ -n "$ABLATION" ] && ABLATIONS="$(dirname "$RETRIEVER")" || ABLATIONS="$RETRIEVER/ablations"

stage() { # stage NAME FLAGS...: one numbered script
    echo "== ${ABLATION:-$SYSTEM}: $1"
    bash "scripts/$1.sh" "${@:2}"
}

row() { # row NAME FLAGS...: search val with these flags, and add the figures under this name
    local folder="$ABLATIONS/rows/$1"
    bash scripts/12_retrieve.sh --split val --pools val "${@:2}" --output "$folder/retrieve"
    bash scripts/13_test_retriever.sh --predictions "$folder/retrieve" --system "$1" --summary "$ABLATIONS/summary.json" \
        --quantized-system "two-tower, quantised${ABLATION:+ ($1)}" --output "$folder/test"
}

tokenizer_and_retriever() { # tokenizer_and_retriever FLAGS...: everything behind another tokenizer
    stage 05_train_rqvae "$@"
    stage 06_generate_codes
    stage 07_prepare_retriever_dataset
    stage 09_train_retriever_t5
}
