# Your own pictures with captions: every model is trained on them, and nothing but two paths is needed.
#   export DATASET=captioned PICTURES=~/photos CAPTIONS_FILE=~/photos/captions.csv
#   bash scripts/quickstart.sh && bash scripts/search.sh "a red car"
# The file is a table of image, caption and, if you like, split, or any other form of docs/pictures.md.
# MODELS=hub trains on CLIP and T5 of the Hugging Face Hub, which need a GPU; MODELS=sample on the small towers of the
# emoji sample. By default the Hub's, where there is a GPU and both are cached or can be fetched.
OFFLINE="${HF_HUB_OFFLINE:-0}"
source scripts/datasets/emoji.sh # the towers, and the shapes of small models
IMAGES="${PICTURES:?set PICTURES to your folder of pictures}"
CAPTIONS=(--source "${CAPTIONS_FILE:?set CAPTIONS_FILE to the file of their captions}" --skip-bad)
DATA=RQ-VAE/data/captioned
TOKENIZER=RQ-VAE/output/captioned
RETRIEVER=retriever/output/captioned
RERANKER=reranker/output/captioned
BEST=retriever

hub_is_there() { # a GPU, and the Hub's models in the cache or within reach
    nvidia-smi -L >/dev/null 2>&1 || return 1
    [ -z "$({
        printf '%s\0' 4 clip 03_prepare_emb name=ViT-L-14-336 tag=openai
        printf '%s\0' 3 model 09_train_retriever_t5 name=t5-base
    } | HF_HUB_OFFLINE="$OFFLINE" python -m tools.preflight --brief 2>&1)" ]
}
if [ -d "$TOKENIZER/02_assemble_clip" ]; then # what was begun goes on
    MODELS="${MODELS:-sample}"
elif [ -d "$TOKENIZER/03_prepare_emb" ]; then
    MODELS="${MODELS:-hub}"
elif [ -z "${MODELS:-}" ]; then
    MODELS=sample
    if hub_is_there; then MODELS=hub; fi
fi

# Trainings are as long as the data need: at least so many steps, and no longer than val gets better.
CLIP=(--model "$TOKENIZER/02_assemble_clip/clip" --layer tower)
TRAIN_HEADS+=(--steps 240 --validate-every 4 --patience 4)
FEATURES=$TOKENIZER/04_train_heads
TRAIN_RQVAE+=(--steps 240 --validate-every 4)
TRAIN_RETRIEVER=(
    --kind encoder-decoder
    --language-model "$TEXT_ENCODER"
    --decoder-layers 2
    --decoder-heads 8
    --epochs 8
    --steps 400
    --patience 3
    --batch-size 128
    --lr 1e-3
    --weight-decay 0.05
    --dropout 0.1
    --temperature 1.0
    --label-temperature 0.1
    --no-train-end
    --guide
    --beams 10
    --validate-queries 1000
)
REPORT=(--systems retriever --queries 200)
HEADS="02_assemble_clip 03_prepare_emb 04_train_heads"
if [ "$MODELS" = hub ]; then
    HEADS=03_prepare_emb
    CLIP=(--model ViT-L-14-336 --pretrained openai --batch-size 256 --workers 8)
    FEATURES=$TOKENIZER/03_prepare_emb
    TRAIN_RQVAE+=(--width 768 --hidden 1024 512 --codebook-size 1024) # the width of t5-base; as published
    TRAIN_RETRIEVER+=(--kind seq2seq --language-model t5-base --precision bf16 --compile gpu)
    HF_HUB_OFFLINE="$OFFLINE"
fi
STAGES="01_prepare_captions $HEADS 05_train_rqvae 06_generate_codes 07_prepare_retriever_dataset
09_train_retriever_t5 12_retrieve 13_test_retriever 14_build_index 19_report"
