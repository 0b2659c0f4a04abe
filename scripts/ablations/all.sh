#!/usr/bin/env bash
# Run every ablation and print one table; what is finished is not run again. Needs a finished quickstart.sh.
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
set -e
bash pseudo_queries.sh
bash stage2.sh
bash alignment_off.sh
bash codebook_shared.sh
bash codebook_size.sh 256 1024
bash code_length.sh 2 3 6
bash beam_size.sh 1 5 20 50 100
bash table.sh
