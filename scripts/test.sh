#!/usr/bin/env bash
# Set everything up and run the tests: formatting, types, then pytest.
REQUIREMENTS=requirements-dev.txt
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/env.sh"
export WANDB_MODE=disabled HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
