#!/usr/bin/env bash
# Count the small errors in the core modules that their tests notice (mutation testing; docs/mutation.md).
REQUIREMENTS=requirements-dev.txt
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
export WANDB_MODE=disabled HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
if [ ! -d .venv/mutation/mutmut ]; then # beside the pinned packages, not among them
    bash scripts/install.sh --no-deps --target .venv/mutation mutmut==3.8.1 libcst==1.9.0
fi
PYTHONPATH=.venv/mutation python -m tests.mutation "$@"
