#!/usr/bin/env bash
# Ablation: one codebook for all levels (published), or one for each, as the dataset's recipe does not.
ABLATION=codebook_shared
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/stages.sh"
case " ${TRAIN_RQVAE[*]} " in
*" --shared-codebook "*) other=(--no-shared-codebook) name="a codebook for each level" ;;
*) other=(--shared-codebook) name="one shared codebook" ;;
esac
tokenizer_and_retriever "${other[@]}"
row "$name"
