# The repository with its pinned Python packages, for a machine with an NVIDIA GPU or without one:
#   docker build -t avg .
#   docker run --gpus all --shm-size 8g -v "$PWD/results:/volume" avg        # the emoji sample; results in ./results
#   docker run --gpus all --shm-size 8g -v "$PWD/results:/volume" -v ~/photos:/photos -e DATASET=folder -e PICTURES=/photos avg
# The base has CUDA's compiler and headers, which torch.compile and DeepSpeed ask for; torch brings its own libraries,
# which need driver 580 or newer. For older drivers: --build-arg TORCH_BACKEND=cu126
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ARG TORCH_BACKEND=
ENV DEBIAN_FRONTEND=noninteractive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git npm python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# The packages first: they are installed again only when the pins change.
WORKDIR /avg
COPY requirements*.txt ./
COPY scripts/install.sh scripts/venv.sh scripts/
COPY tools/__init__.py tools/packages.py tools/
RUN if [ -n "$TORCH_BACKEND" ]; then export TORCH_BACKEND; else unset TORCH_BACKEND; fi \
    && bash scripts/venv.sh requirements.txt
COPY . .

# What the stages write goes to a volume, so that a container may be thrown away.
RUN mkdir -p /volume/data /volume/rqvae /volume/retriever /volume/reranker \
    && ln -sfn /volume/data RQ-VAE/data \
    && ln -sfn /volume/rqvae RQ-VAE/output \
    && ln -sfn /volume/retriever retriever/output \
    && ln -sfn /volume/reranker reranker/output
VOLUME /volume
ENV PATH=/avg/.venv/bin:$PATH
EXPOSE 7860
CMD ["bash", "-c", "mkdir -p /volume/data /volume/rqvae /volume/retriever /volume/reranker && exec bash scripts/quickstart.sh"]
