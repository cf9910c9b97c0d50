"""Package metadata. Ranges here; the versions that are tested together stand in constraints.txt."""

from setuptools import find_packages, setup

CONFIGS = "megastruct.configs"  # the folder configs/, which the wheel brings along inside of the package
COMMANDS = {
    "train": "start",
    "prepare": "commands.prepare",
    "inspect": "commands.inspect",
    "plan": "commands.plan",
    "generate": "commands.generate",
    "evaluate": "commands.evaluate",
    "export": "commands.export",
    "import": "commands.import_model",
    "benchmark": "commands.benchmark",
    "plot": "commands.plot_runs",
    "submit": "commands.submit",
    "tokenizer": "commands.train_tokenizer",
    "sample-corpus": "commands.make_sample_corpus",
}

setup(
    name="megastruct",
    version="0.1.0",
    description="Pretrain transformers whose feed-forward layers are structured matrices, on DeepSpeed",
    packages=[*find_packages(include=["megastruct", "megastruct.*"]), CONFIGS],
    package_dir={CONFIGS: "configs"},
    package_data={CONFIGS: ["*/*.yaml", "schema.json"]},
    entry_points={
        "console_scripts": [f"megastruct-{command} = megastruct.{module}:main" for command, module in COMMANDS.items()]
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",
        "datasets>=3.0",
        "fsspec>=2023.12",
        "huggingface_hub>=1.0",
        "fsspec>=2024.6",
        "pyarrow>=16.0",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "tensorboard>=2.16",
        "numpy>=1.26",
        "submitit>=1.5",
        "pydantic>=2.9",
        "PyYAML>=6.0",
        "psutil>=5.9",
        "tqdm>=4.66",
        "typing_extensions>=4.10",
    ],
    extras_require={
        "plot": ["matplotlib>=3.8"],
        "wandb": ["wandb>=0.19"],
        "huggingface": ["transformers>=4.57", "safetensors>=0.5"],
        "lm-eval": ["megastruct[huggingface]", "lm_eval>=0.4.9", "pytablewriter>=1.0", "accelerate>=1.0"],
        "s3": ["s3fs>=2024.6"],
        "gs": ["gcsfs"],  # each release asks for the fsspec of the same day
        "test": [
            "megastruct[plot,wandb,huggingface,lm-eval,s3]",
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "moto[s3,server]>=5.0",
            "boto3",
            "jsonschema>=4.0",
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
