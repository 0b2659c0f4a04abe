#!/usr/bin/env bash
# Look at everything that can be known before the first stage: files, hub names, disk, driver and device memory.
#   bash scripts/preflight.sh            one list: stage, what, state, what to do; it ends with 2 when something is missing
#   bash scripts/preflight.sh --brief    only what is missing or cannot be known
#   PREFLIGHT=off                        switches it off, in scripts/quickstart.sh too
# Stages that are finished need nothing, unless OVERWRITE is set. What an earlier stage of the chain makes is not looked for.
# FIRST holds options that the first stage will be given beside those of the dataset's file.
if [ "${PREFLIGHT:-}" = off ]; then exit 0; fi
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"

# Numbers that no option says: the tokens of a long caption, also inside LLaMA's prompt; the reranker's prompt, and how
# much of it a picture's queries share; and the bytes that stages 01 to 18 write for a picture with five captions, beside
# trainings: features 18,000 (6 rows of 768 in fp32), codes and texts 6,000, ranked lists with 100 beams 15,000, others.
CAPTION_TOKENS=40 PROMPT_TOKENS=76 PAIR_TOKENS=80 SHARED_TOKENS=44 PICTURE_BYTES=50000
NEW_VOKENS=4096

value() { # the word behind an option, the last time that it is given, or a default: value --lr 0.1 "${ARRAY[@]}"
    local name="$1" found="$2"
    shift 2
    while [ $# -gt 0 ]; do
        if [ "$1" = "$name" ]; then found="${2:-}"; fi
        shift
    done
    printf '%s' "$found"
}

values() { # all words behind an option up to the next one, a line each
    local name="$1" inside=
    shift
    for word in "$@"; do
        case "$word" in
        "$name") inside=yes ;;
        --*) inside= ;;
        *) if [ -n "$inside" ]; then printf '%s\n' "$word"; fi ;;
        esac
    done
}

batch_of() { # a training's batch, of all processes, and how much of it one reads at once: batch_of DEFAULT "${ARRAY[@]}"
    echo "batch=$(value --batch-size "$@")"
    echo "at_once=$(value --at-once 0 "${@:2}")"
}

has() { # whether an option stands among words
    local name="$1"
    shift
    case " $* " in *" $name "*) return 0 ;; esac
    return 1
}

need() { # one line for tools.preflight: a kind of need, and what its check has to know
    printf '%s\0' "$(($# + 1))" "$1" "$STAGE" "${@:2}"
}

made_here() { # whether a path lies in a folder that the chain itself writes
    local folder
    for folder in "${OUTPUTS[@]}"; do
        case "$1" in "$folder" | "$folder"/*) return 0 ;; esac
    done
    return 1
}

need_file() { # a file that no stage makes
    if ! made_here "$1"; then need file path="$1" "${@:2}"; fi
}

need_model() { # a language model, or another one of Hugging Face: a folder or a name
    if [ -n "$1" ] && ! made_here "$1"; then need model name="$1" "${@:2}"; fi
}

need_clip() { # the open_clip model of --model and --pretrained
    local name tag
    name="$(value --model "" "$@")" tag="$(value --pretrained "" "$@")"
    if [ -n "$name" ] && ! made_here "$name"; then need clip name="$name" ${tag:+tag="$tag"}; fi
}

need_memory() { # what a training takes of a GPU, and of the disk: model, fields of tools.training_memory.Training
    need memory model="$1" launch="${LAUNCH:-}" output="$OUTPUT" "${@:2}" \
        advice="a smaller --at-once, or --gradient-checkpointing; with adapters also --load-in-4bit"
}

needs_of_captions() {
    local source count=0 number given=("${CAPTIONS[@]}" ${FIRST:-})
    while read -r source; do
        case "$source" in *[*?{]*) ;; *) need_file "$source" advice="put the captions there" ;; esac
    done < <(values --source "${CAPTIONS[@]}")
    for number in $(values --expect "${CAPTIONS[@]}"); do count=$((count + number)); done
    if [ -n "${IMAGES:-}" ] && ! made_here "$IMAGES"; then
        need pictures path="$IMAGES" count="$count" $(if has --skip-bad "${given[@]}"; then echo skippable=yes; fi) \
            $(if has --follow-links "${given[@]}"; then echo links=yes; fi)
    fi
    need disk path="$TOKENIZER" bytes=$((count * PICTURE_BYTES))
}

needs_of_pseudo_queries() {
    local captioner
    captioner="$(value --captioner "" "${PSEUDO_QUERIES[@]}")"
    case "$(value --source "" "${PSEUDO_QUERIES[@]}")" in
    model) need_model "$captioner" ;;
    endpoint) need key variable="$(value --api-key-variable OPENAI_API_KEY "${PSEUDO_QUERIES[@]}")" ;;
    esac
}

needs_of_retriever() { # of stage 1, or of a causal model: the options of its array
    local model adapters=() written=()
    model="$(value --language-model "" "$@")"
    need_model "$model"
    case "$(value --kind seq2seq "$@")" in
    encoder-decoder) return ;; # its encoder is frozen, and its decoder small
    causal) adapters=(rank="$(value --lora-rank 0 "$@")" tokens="$PROMPT_TOKENS" searched=1) ;;
    *) adapters=(tokens="$CAPTION_TOKENS") ;;
    esac
    if has --gradient-checkpointing "$@"; then adapters+=(checkpointing=1); fi
    if has --load-in-4bit "$@"; then adapters+=(four_bits=1) && need package name=bitsandbytes; fi
    need_memory "$model" $(batch_of 128 "$@") new_tokens="$NEW_VOKENS" "${adapters[@]}"
}

needs_of_stage2() { # it goes on from stage 1's model, a copy of which it keeps
    if [ "$(value --kind seq2seq "${TRAIN_RETRIEVER[@]}")" != seq2seq ]; then return; fi
    need_memory "$(value --language-model "" "${TRAIN_RETRIEVER[@]}")" new_tokens="$NEW_VOKENS" copies=1 \
        $(batch_of 128 "${TRAIN_STAGE2[@]}") tokens="$CAPTION_TOKENS" \
        written=$((2 + $(value --negatives 9 "${TRAIN_STAGE2[@]}")))
}

needs_of_tokens() {
    local vision
    vision="$(value --vision "" "${CONVERT[@]}")"
    if [ "$(value --tokenizer seed "${CONVERT[@]}")" = seed ]; then
        need_file "$(value --quantizer seed_quantizer.pt "${CONVERT[@]}")" \
            advice="hf download AILab-CVC/seed-tokenizer-2 seed_quantizer.pt --local-dir FOLDER, and SEED_WEIGHTS=FOLDER"
        case "$vision" in
        *.pth | *.pt | *.bin | *.safetensors) need_file "$vision" advice="LAVIS's eva_vit_g.pth, or --vision with a BLIP-2 model" ;;
        *) need_model "$vision" untokenized=yes ;;
        esac
    else
        need_clip "${CONVERT[@]}"
    fi
}

needs_of_reranker() {
    local model tokenizer options=(tokens="$PAIR_TOKENS")
    model="$(value --language-model "" "${TRAIN_RERANKER[@]}")" tokenizer="$(value --tokenizer "" "${TRAIN_RERANKER[@]}")"
    need_model "$model" ${tokenizer:+untokenized=yes}
    if [ -n "$tokenizer" ] && ! made_here "$tokenizer"; then need tokenizer name="$tokenizer"; fi
    if [ "$(value --new-layers 0 "${TRAIN_RERANKER[@]}")" != 0 ]; then return; fi
    if has --compat "${TRAIN_RERANKER[@]}"; then
        options=(tokens="$(value --max-length 64 "${TRAIN_RERANKER[@]}")")
    elif ! has --gradient-checkpointing "${TRAIN_RERANKER[@]}"; then
        options+=(shared="$SHARED_TOKENS")
    fi
    if has --gradient-checkpointing "${TRAIN_RERANKER[@]}"; then options+=(checkpointing=1); fi
    if has --load-in-4bit "${TRAIN_RERANKER[@]}"; then options+=(four_bits=1) && need package name=bitsandbytes; fi
    need_memory "$model" $(batch_of 16 "${TRAIN_RERANKER[@]}") new_tokens=0 scored=0 \
        each=$((1 + $(value --negatives 7 "${TRAIN_RERANKER[@]}"))) whole=1 adapted=7 \
        rank="$(value --lora-rank 16 "${TRAIN_RERANKER[@]}")" "${options[@]}"
}

needs_of_reranking() { # weights in 16 bits, and the room for all that scoring keeps
    if [ "$(value --new-layers 0 "${TRAIN_RERANKER[@]}")" != 0 ]; then return; fi
    need memory model="$(value --language-model "" "${TRAIN_RERANKER[@]}")" launch="${LAUNCH:-}" weights=2 \
        room="$(value --memory 4 "${TEST_RERANKER[@]}")" advice="a smaller --memory"
}

how_to_train() { # a tokenizer, by the name of the dataset in its path
    local dataset
    dataset="$(basename "$(dirname "$1")")"
    if [ -f "scripts/datasets/$dataset.sh" ]; then
        echo "DATASET=$dataset ${RUN_SCRIPTS#"$SETTINGS"}/quickstart.sh trains it"
    else
        echo "RQVAE names a tokenizer of 05_train_rqvae: train it first"
    fi
}

needs_of() { # what a stage will ask for; arrays that a dataset's file leaves out are passed over
    STAGE="$1" OUTPUT="$2"
    case "$1" in
    01_*) if [ -n "${CAPTIONS+x}" ]; then needs_of_captions; fi ;;
    03_*) if [ -n "${CLIP+x}" ]; then need_clip "${CLIP[@]}"; fi ;;
    06_*) need_file "$RQVAE/manifest.json" advice="$(how_to_train "$RQVAE")" ;;
    08_*) if [ -n "${PSEUDO_QUERIES+x}" ]; then needs_of_pseudo_queries; fi ;;
    09_*) if [ -n "${TRAIN_RETRIEVER+x}" ]; then needs_of_retriever "${TRAIN_RETRIEVER[@]}"; fi ;;
    10_*) if [ -n "${TRAIN_STAGE2+x}" ]; then needs_of_stage2; fi ;;
    11_*) if [ -n "${FINETUNE_LLAMA+x}" ]; then needs_of_retriever "${FINETUNE_LLAMA[@]}"; fi ;;
    15_*) if [ -n "${CONVERT+x}" ]; then needs_of_tokens; fi ;;
    17_*) if [ -n "${TRAIN_RERANKER+x}" ]; then needs_of_reranker; fi ;;
    18_*) if [ -n "${TRAIN_RERANKER+x}" ]; then needs_of_reranking; fi ;;
    esac
}

all_needs() {
    local stage left=()
    for stage in $STAGES; do
        OUTPUTS+=("$(output_of "$stage")")
        if [ -n "${OVERWRITE:-}" ] || [ ! -f "${OUTPUTS[-1]}/manifest.json" ]; then left+=("$stage"); fi
    done
    if [ "${#left[@]}" = 0 ]; then return; fi
    STAGE=all
    need processes launch="${LAUNCH:-}" $(if large; then echo gpu=yes; fi)
    for stage in "${left[@]}"; do
        needs_of "${stage%@*}" "$(output_of "$stage")"
    done
}

large() { # whether some training is of a size that wants a GPU: those that say their precision
    has --precision ${TRAIN_RETRIEVER[@]+"${TRAIN_RETRIEVER[@]}"}
}

OUTPUTS=()
all_needs | python -m tools.preflight "$@"
