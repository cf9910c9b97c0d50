"""Show that a change computes what was computed before: record tiny runs, then compare two records bit for bit.

    python tests/end_to_end/reproduce.py record FOLDER [NAME ...]      train all runs (or those named) into FOLDER
    python tests/end_to_end/reproduce.py compare FOLDER OTHER          list what differs; exit code 1 if anything does

Record once with the code before the change, for example in a second clone, and once with the code after it. A record
holds, for every step of every run, the loss and the gradient norm, all validation losses, and the SHA-256 of every
tensor of the final checkpoint. The runs cover every structure, self-guided training, pipelines, tensor parallelism,
ZeRO 0 to 3, Muon, bf16, text sources and attention inside of documents. They take about eight minutes on two cores.

Records are comparable on one machine with one version of PyTorch: another processor may sum in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "was",
    "he",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
    "by",
    "which",
    "this",
    "from",
    "had",
    "not",
    "are",
    "but",
]
BLOCKS = ["ffn.structure=blockdense", "ffn.rank=16", "ffn.nblocks=4"]
SHUFFLE = ["ffn.structure=blockshuffle", "ffn.rank=null", "ffn.nblocks=4"]
GUIDED = ["guided.schedule=fixedflop"]
LLAMA = ["model.norm=rmsnorm", "model.activation=swiglu", "model.bias=false", "model.tie_embeddings=false"]

# name -> (processes, overrides of the config below)
RUNS: dict[str, tuple[int, list[str]]] = {
    "dense": (1, ["ffn.structure=dense", "ffn.rank=null"]),
    "lowrank": (1, []),
    "blockdense": (1, BLOCKS),
    "blockshuffle": (1, SHUFFLE),
    "llama": (1, [*LLAMA, "model.num_key_value_heads=2"]),
    "guided_rows": (1, [*GUIDED, "guided.levels=8"]),
    "guided_coin_tp2": (2, [*GUIDED, "guided.skip=coin", "parallel.tp=2", *BLOCKS]),
    "guided_rows_zero3": (2, [*GUIDED, "guided.levels=8", "parallel.zero_stage=3", *SHUFFLE]),
    "tp2_pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "tp2_blockshuffle": (2, ["parallel.tp=2", *SHUFFLE]),
    "tp2_zero2_dense": (2, ["parallel.tp=2", "parallel.zero_stage=2", "ffn.structure=dense", "ffn.rank=null"]),
    "dp2_pp2_zero0": (4, ["parallel.pp=2", "parallel.zero_stage=0"]),
    "zero3": (2, ["parallel.zero_stage=3"]),
    "bf16": (2, ["training.precision=bf16", *BLOCKS]),
    "bf16_zero3_llama": (2, ["training.precision=bf16", "parallel.zero_stage=3", *LLAMA]),
    "muon_tp2": (2, ["optimizer.kind=muon", "parallel.tp=2", *BLOCKS]),
    "muon_zero3_base_width": (2, ["optimizer.kind=muon", "parallel.zero_stage=3", "model.base_width=16"]),
    "base_width_recompute": (1, ["model.base_width=16", "training.activation_checkpointing=true", *SHUFFLE]),
    "separate_pp2": (2, ["training.document_attention=separate", "parallel.pp=2"]),
    "text": (2, ["data.kind=text", "data.path={folder}/text", "data.tokenizer={folder}/tokenizer.model"]),
}

CONFIG = """
run: {{name: {name}, folder: {folder}/runs}}
model: {{hidden_size: 32, num_layers: 3, num_attention_heads: 4, ffn_hidden_size: 64, vocab_size: 320}}
ffn: {{structure: lowrank, rank: 8}}
data: {{kind: tokens, path: {folder}/tokens, validation_fraction: 0.1}}
training: {{seq_length: 32, global_batch_size: 8, micro_batch_size: 2, num_steps: 10, precision: fp32}}
optimizer: {{learning_rate: 1e-2}}
evaluation: {{interval_steps: 5, num_samples: 8}}
logging: {{interval_steps: 1, progress_bar: false}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("record")
    command.add_argument("folder", type=Path)
    command.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}")
    command = commands.add_parser("compare")
    command.add_argument("folder", type=Path)
    command.add_argument("other", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.folder.absolute(), arguments.names or list(RUNS))
    elif differences := compare(arguments.folder, arguments.other):
        sys.exit("\n".join(differences))


def record(folder: Path, names: list[str]) -> None:
    make_data(folder)
    for name in names:
        processes, overrides = RUNS[name]
        config = folder / f"{name}.yaml"
        config.write_text(CONFIG.format(name=name, folder=folder))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        run(*launcher, "-m", "megastruct.train", config, *(text.format(folder=folder) for text in overrides))
        path = folder / f"{name}.json"
        path.write_text(json.dumps(describe(folder / "runs" / name), indent=1))
        print(f"{name}: recorded", flush=True)


def make_data(folder: Path) -> None:
    """Three shards of random words, a tokenizer, and their token shards, the same in every folder."""
    if (folder / "tokens" / "manifest.json").exists():
        return
    text = folder / "text"
    text.mkdir(parents=True)
    generator = random.Random(0)
    for shard in range(3):
        lines = [
            json.dumps({"content": " ".join(generator.choices(WORDS, k=generator.randint(20, 120))) + "."})
            for _ in range(80)
        ]
        (text / f"shard-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    tools = ROOT / "tools"
    run(tools / "train_tokenizer.py", "--input", text, "--output", folder / "tokenizer", "--vocab-size", 320)
    made_from = ["--input", text, "--tokenizer", folder / "tokenizer.model", "--validation-fraction", 0.1]
    run(tools / "prepare_data.py", *made_from, "--output", folder / "tokens")


def run(*arguments: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def describe(folder: Path) -> dict[str, Any]:
    """What a finished run left: its metrics that do not depend on time, and a hash of each tensor that it saved."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "alpha", "guide_share", "tokens")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {key: value for key, value in line.items() if key in kept or key.startswith(("validation", "guide"))}
        for line in lines
    ]
    return {"metrics": metrics, "tensors": tensor_hashes(max((folder / "checkpoints").glob("step_*")))}


def tensor_hashes(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, by name: its dtype, shape and bytes."""
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {
        name: hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes()).hexdigest()
        for name, tensor in sorted(tensors.items())
    }


def compare(folder: Path, other: Path) -> list[str]:
    """A line for everything that differs between two records."""
    found = []
    names = [name for name in RUNS if any((one / f"{name}.json").exists() for one in (folder, other))]
    for name in names:
        paths = [one / f"{name}.json" for one in (folder, other)]
        if not all(path.exists() for path in paths):
            found.append(f"{name}: recorded in one of the folders only")
            continue
        differences = len(found)
        before, after = (json.loads(path.read_text()) for path in paths)
        for old, new in zip(before["metrics"], after["metrics"], strict=False):
            differing = [key for key in old | new if old.get(key) != new.get(key)]
            found += [f"{name}: step {old['step']}: {key} {old.get(key)} -> {new.get(key)}" for key in differing]
        if len(before["metrics"]) != len(after["metrics"]):
            found.append(f"{name}: {len(before['metrics'])} -> {len(after['metrics'])} records of metrics")
        tensors = before["tensors"] | after["tensors"]
        found += [f"{name}: {t}" for t in tensors if before["tensors"].get(t) != after["tensors"].get(t)]
        if len(found) == differences:
            print(f"{name}: equal ({len(before['metrics'])} records, {len(tensors)} tensors)")
    if not names:
        found.append("nothing is recorded")
    return found


if __name__ == "__main__":
    main()
