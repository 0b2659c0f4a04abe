# MS COCO, Karpathy's splits (113,287 / 5,000 / 5,000). Put the data here before the first script:
#   RQ-VAE/data/mscoco/images/train2014/*.jpg, images/val2014/*.jpg
#   RQ-VAE/data/mscoco/dataset_coco.json
# RECIPE=faithful runs the published recipe; the default corrects what is known to be wrong with it; large-batch is that
# one for eight GPUs.
DATA=RQ-VAE/data/mscoco
RECIPE="${RECIPE:-better}"
TOKENIZER=RQ-VAE/output/mscoco-$RECIPE
RETRIEVER=retriever/output/mscoco-$RECIPE
RERANKER=reranker/output/mscoco-$RECIPE

TOKENIZE="05_train_rqvae 06_generate_codes 07_prepare_retriever_dataset"
if [ "$RECIPE" = faithful ]; then # whose tokenizer is trained on the pseudo queries too
    TOKENIZE="08_generate_pseudo_query $TOKENIZE"
else
    TOKENIZE="$TOKENIZE 08_generate_pseudo_query"
fi
STAGES="01_prepare_captions 03_prepare_emb $TOKENIZE
09_train_retriever_t5 12_retrieve 13_test_retriever
09_train_retriever_t5@retriever+pseudo 12_retrieve@retriever+pseudo 13_test_retriever@retriever+pseudo
10_train_retriever_t5_stage2@retriever+stage2 12_retrieve@retriever+stage2 13_test_retriever@retriever+stage2
14_build_index 15_convert_voken_to_seed
16_prepare_reranker_dataset@retriever+stage2 17_finetune_reranker_llama@retriever+stage2
18_test_reranker_llama@retriever+stage2 19_report"
BEST=retriever+stage2 # what search.sh searches with

IMAGES=$DATA/images
CAPTIONS=(--source "$DATA/dataset_coco.json" --format karpathy --expect 113287 5000 5000)

CLIP=(
    --model ViT-L-14-336
    --pretrained openai
    --batch-size 256
    --workers 8
)
FEATURES=$TOKENIZER/03_prepare_emb

TRAIN_RQVAE=(
    --width 1024 # of t5-large
    --hidden 1024 512
    --levels 4
    --codebook-size 1024
    --dropout 0.25
    --alignment mse
    --align-at after
    --kmeans-iterations 100
    --optimizer adamw
    --lr 1e-4
)
GENERATE_CODES=()
# A model behind an OpenAI-compatible address can write them too (add --dry-run to count the calls first):
#   PSEUDO_QUERIES=(--source endpoint --url https://HOST/v1 --language-model NAME --requests-per-minute 60)
#   with the key in OPENAI_API_KEY, or in the variable that --api-key-variable names
PSEUDO_QUERIES=(
    --source model
    --captioner Salesforce/blip2-opt-2.7b
    --candidates 10
    --per-picture 5
)
TRAIN_RETRIEVER=(
    --kind seq2seq
    --language-model t5-large
    --epochs 100
    --batch-size 128
    --lr 1e-3
    --warmup 0.1
    --dropout 0.2
    --max-source 128
    --validate-every 2
    --temperature 0.5
    --precision bf16
    --compile gpu
    --beams 10
)
TRAIN_STAGE2=(
    --epochs 5
    --batch-size 128
    --at-once 64
    --lr 1e-4
    --negatives 9
    --discriminative-weight 0.5
    --temperature 0.5
    --precision bf16
    --compile gpu
    --beams 10
)
FINETUNE_LLAMA=(
    --kind causal
    --language-model meta-llama/Llama-2-7b-hf # or meta-llama/Meta-Llama-3-8B
    --epochs 10
    --batch-size 16 # published: 1 x 16, which are the same updates in ten times as many kernels
    --lr 3e-4
    --lora-rank 8
    --lora-alpha 16
    --lora-dropout 0.1
    --temperature 1.0
    --precision bf16
    --beams 10
)
RETRIEVE=(
    --pools test all
    --beams 10
    --keep 10
)
# SEED_WEIGHTS: a folder with seed_quantizer.pt (AILab-CVC/seed-tokenizer-2) and eva_vit_g.pth (LAVIS, BLIP-2).
CONVERT=(
    --tokenizer seed
    --quantizer "${SEED_WEIGHTS:=models/seed}/seed_quantizer.pt"
    --vision "$SEED_WEIGHTS/eva_vit_g.pth"
    --batch-size 64
    --workers 8
)
RANK=(
    --pools test all
    --train-beams 100
    --beams 50
)
TRAIN_RERANKER=(
    --language-model AILab-CVC/seed-llama-8b-sft
    --tokenizer AILab-CVC/seed-tokenizer-2
    --negatives 7
    --lora-rank 16
    --lora-alpha 32
    --lora-dropout 0.05
    --epochs 3
    --batch-size 16 # published: 1 x 16, the same updates
    --at-once 4     # for a card of 80 GB; of 48 GB: --at-once 1
    --lr 3e-5
    --warmup 0.1
    --weight-decay 0
    --precision bf16
    --top-k 50
)
TEST_RERANKER=(
    --top-k 50
    --pairs 1024
    --memory 16
)
REPORT=(
    --queries 1000
    --speed-queries 512
)

if [ "$RECIPE" = faithful ]; then
    # A row a caption and a row a pseudo query, in one order; k-means on the first batch. The 0.003 is not published.
    PSEUDO_FROM=(--features "$FEATURES")
    PSEUDO_QUERIES+=(--splits test)
    TRAIN_RQVAE+=(--pairs caption --pseudo-queries "$RETRIEVER/08_pseudo_queries" --epochs 5000 --batch-size 2048)
    TRAIN_RQVAE+=(--shared-codebook --no-normalize --no-skip --kmeans-first-batch --kmeans-balance 0 --revive-every 0)
    TRAIN_RQVAE+=(--no-shuffle --sinkhorn-temperature 0.003)
    GENERATE_CODES+=(--no-resolve-collisions)
    TRAIN_RETRIEVER+=(--label-temperature 0 --train-end --score-end)
    TRAIN_STAGE2+=(--label-temperature 0 --train-end --score-end --discriminative double-softmax --no-spare-same-words --mix)
    FINETUNE_LLAMA+=(--label-temperature 0 --train-end --score-end)
    RETRIEVE+=(--score-end)
    RANK+=(--score-end)
    TRAIN_RERANKER+=(--compat --max-length 64 --no-spare-same-words)
else
    TRAIN_RQVAE+=(--epochs 1000 --batch-size 2048)
    # The tokenizer's guide steers the search (models/guide.py); trainings stop when val gets no better.
    TRAIN_RQVAE+=(--patience 10)
    TRAIN_RETRIEVER+=(--label-temperature 0.03 --guide --patience 4)
    TRAIN_STAGE2+=(--label-temperature 0.03 --guide --discriminative list-wise)
    FINETUNE_LLAMA+=(--label-temperature 0.03 --guide)
fi
if [ "$RECIPE" = large-batch ]; then # the better recipe for eight GPUs: batches 8 times as large, rates times sqrt(8)
    TRAIN_RETRIEVER+=(--batch-size 1024 --lr 2.8e-3)
    TRAIN_STAGE2+=(--batch-size 1024 --lr 2.8e-4)
    FINETUNE_LLAMA+=(--batch-size 128 --lr 8.5e-4)
    TRAIN_RERANKER+=(--batch-size 128 --lr 8.5e-5)
fi
