# Sourced by every script: goes to the repository's root, sets Python up once, reads the dataset's settings.
#   DATASET       a name in scripts/datasets/, or your own file of that form (default: emoji)
#   REQUIREMENTS  the pins to install (default: requirements.txt; test.sh takes requirements-dev.txt)
#   SYSTEM        which retriever (scripts/systems.sh)
#   ABLATION      a name for stages 05 to 07, 09 to 13 and 15 to 19 with other flags, which then write to a folder of
#                 that name
#   TORCH_BACKEND which build of torch .venv gets: cpu, cu126, auto ... (docs/setup.md; default: PyPI's)
#   LAUNCH        how many processes: "accelerate launch --num_processes 8" (docs/scale.md)
#   WANDB_MODE    "disabled" switches Weights & Biases off; without a login it logs offline
#   VERBOSITY     quiet or verbose: what --quiet and --verbose are for one command (tools/verbosity.py)
#   VERIFY        "off": what a stage reads is not compared with its manifest's hashes; "all": even an index's large files
#                 are (docs/reliability.md)
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/place.sh" # which goes to the root
REQUIREMENTS="${REQUIREMENTS:-requirements.txt}"

use_python() { # the active environment when it has the packages, else .venv
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" lacks
    PYTHON_USED=".venv"
    case "$(command -v python)" in
    "$PWD"/.venv/*) ;;
    *)
        lacks="$(python -m tools.packages "$REQUIREMENTS" 2>/dev/null || echo "Python 3.10 or newer")"
        if [ -z "$lacks" ]; then
            PYTHON_USED="$(command -v python), the active one${TORCH_BACKEND:+; TORCH_BACKEND is for .venv alone}"
            return
        fi
        if [ -n "$active" ]; then PYTHON_USED=".venv; $active is active but lacks $lacks"; fi
        ;;
    esac
    bash scripts/venv.sh "$REQUIREMENTS"
    export PATH="$PWD/.venv/bin:$PATH"
}

run() { # a command of a room, on the processes that LAUNCH starts; without loading its libraries where it has finished
    local TYPED="$TYPED $HERE" SETTINGS="$DATASET_NAME $SETTINGS"
    export TYPED SETTINGS
    python -m tools.finished -m "$@" || ${LAUNCH:-python} -m "$@"
}

use_python
case "${LAUNCH:-}" in *zero*)
    if ! python -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec("deepspeed"))'; then
        echo "error: LAUNCH=$LAUNCH needs DeepSpeed: install it with 'pip install deepspeed' into $(command -v python)" >&2
        exit 2
    fi
    ;;
esac
# Every step frees and asks for the same large blocks of memory; glibc would return them, and the kernel clear them again.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-1073741824}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-4294967296}"
source scripts/systems.sh
if [ -z "${PYTHON_SAID:-}" ] && [ "${VERBOSITY:-}" != quiet ]; then echo "Python: $PYTHON_USED" >&2; fi # once, and not again in scripts that this one calls
export PYTHON_SAID=1
