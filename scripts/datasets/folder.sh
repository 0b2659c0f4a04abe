# A folder of your own pictures, without captions, searched with the models trained on the emoji sample:
#   export DATASET=folder PICTURES=~/photos
#   bash scripts/quickstart.sh && bash scripts/search.sh "a red car"
# For models trained on better data, point the paths below at them.
IMAGES="${PICTURES:?set PICTURES to your folder of pictures}"
DATA=RQ-VAE/data/folder
TOKENIZER=RQ-VAE/output/folder
RETRIEVER=retriever/output/folder

FOLLOWS="$IMAGES" # once there is an index, quickstart.sh brings it in line with this folder

STAGES="01_prepare_captions 03_prepare_emb 06_generate_codes 07_prepare_retriever_dataset 14_build_index"

CAPTIONS=(--skip-bad)
CLIP=(--model RQ-VAE/output/emoji/04_train_heads/clip)
FEATURES=$TOKENIZER/03_prepare_emb
RQVAE="${RQVAE:-RQ-VAE/output/emoji/05_train_rqvae}"
TRAINED_IN=retriever/output/emoji # the folder with the retrievers of every SYSTEM
BEST=retriever+stage2
RERANKER=reranker/output/emoji # where search.sh finds the share of the features
GENERATE_CODES=()
REPORT=()
