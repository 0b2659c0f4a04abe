#!/usr/bin/env bash
# Run every ablation and print one table; what is finished is not run again. Needs a finished quickstart.sh.
set -e
here="$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
bash "$here/pseudo_queries.sh"
bash "$here/stage2.sh"
bash "$here/stage2_inductive.sh"
bash "$here/alignment_off.sh"
bash "$here/codebook_shared.sh"
bash "$here/codebook_size.sh" 256 512 1024
bash "$here/code_length.sh" 2 3 4 6
bash "$here/beam_size.sh" 1 5 20 50 100
bash "$here/table.sh"
