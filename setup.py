"""Package metadata. Ranges here; the versions that are tested together stand in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="megastruct",
    version="0.1.0",
    description="Pretrain transformers whose feed-forward layers are structured matrices, on DeepSpeed",
    packages=find_packages(include=["megastruct", "megastruct.*"]),
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19",
        "datasets>=3.0",
        "huggingface_hub>=1.0",
        "pyarrow>=16.0",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "numpy>=1.26",
        "submitit>=1.5",
        "pydantic>=2.9",
        "PyYAML>=6.0",
        "psutil>=5.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "plot": ["matplotlib>=3.8"],
        "test": [
            "megastruct[plot]",
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "tokenizers",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
