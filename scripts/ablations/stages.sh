# Sourced by each ablation, which may set ABLATION before: how it runs stages, and how it adds its row to the table.
# All figures are of val: test is touched once, at the end, by the systems of the main table.
#   OVERWRITE=1   make again what stands there from another recipe
export ABLATION SYSTEM="${SYSTEM:-retriever}"
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../env.sh"
[ -n "$ABLATION" ] && ABLATIONS="$(dirname "$RETRIEVER")" || ABLATIONS="$RETRIEVER/ablations"

stage() { # stage NAME FLAGS...: one numbered script
    echo "== ${ABLATION:-$SYSTEM}: $1"
    bash "scripts/$1.sh" "${@:2}" ${OVERWRITE:+--overwrite}
}

row() { # row NAME FLAGS...: search val with these flags, and add the figures under this name
    local name="$1" folder
    case "$SYSTEM" in retriever | "$name") ;; *) name="$name ($SYSTEM)" ;; esac
    folder="$ABLATIONS/rows/$name"
    stage 12_retrieve --split val --pools val "${@:2}" --output "$folder/retrieve"
    stage 13_test_retriever --predictions "$folder/retrieve" --system "$name" --summary "$ABLATIONS/summary.json" \
        --quantized-system "two-tower, quantised${ABLATION:+ ($name)}" --output "$folder/test"
}

tokenizer_and_retriever() { # tokenizer_and_retriever FLAGS...: everything behind another tokenizer
    stage 05_train_rqvae "$@"
    stage 06_generate_codes
    stage 07_prepare_retriever_dataset
    stage 09_train_retriever_t5
}

recipe_has() { # recipe_has FLAG VALUE: whether the dataset's tokenizer is that one anyway
    case " ${TRAIN_RQVAE[*]} " in *" $1 $2 "*) ;; *) return 1 ;; esac
    echo "$1 $2 is the recipe's own"
}
