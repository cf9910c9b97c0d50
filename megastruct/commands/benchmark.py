"""Benchmark parts of the project against common alternatives.

    megastruct-benchmark data --input DIR_OR_GLOB --tokenizer tokenizer.model
    megastruct-benchmark documents configs/run/s_dense.yaml training.micro_batch_size=8
    megastruct-benchmark decode configs/run/m_gqa.yaml configs/run/m_wide_lowrank_63.yaml --form structured --form auto
    megastruct-benchmark prefill configs/run/l_dense.yaml configs/run/l_lowrank_32.yaml
    megastruct-benchmark step configs/run/s_lowrank_32.yaml training.compile=true
    torchrun --nproc-per-node 8 tools/benchmark.py step configs/run/s_lowrank_32.yaml
    megastruct-benchmark trace runs/NAME/profile/step_00000010_rank_0.json.gz
    megastruct-benchmark kernels --widths 2048 --compile both

data: tokenising text, and reading batches. documents: attention within documents, compared with attention across
document borders. decode: generating tokens with a cache, by batch size. prefill: reading prompts. step: a training
step beside plain PyTorch, on one process or several, and its time by part. trace: the time by part of a step that a
run has traced. kernels: the feed-forward layer alone, structured beside dense.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

import torch

from megastruct.benchmarks import data as data_benchmark
from megastruct.benchmarks import documents as documents_benchmark
from megastruct.commands import benchmark_inference as inference_command
from megastruct.commands import benchmark_kernels as kernels_command
from megastruct.commands import benchmark_step as step_command
from megastruct.commands.text_options import add_column_option, columns_of
from megastruct.config import load_config
from megastruct.console import command
from megastruct.errors import Problem, UserError, user_errors_exit
from megastruct.launch.environment import is_first_process
from megastruct.paths import option_text


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark and print its table. A user's mistake exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    data = what.add_parser("data", help="tokenising text, and reading batches")
    data.add_argument(
        "--input", required=True, type=option_text, help="folder, glob, file or Hugging Face name of text shards"
    )
    data.add_argument(
        "--tokenizer", required=True, type=option_text, help="SentencePiece model file (BPE) or tokenizer.json"
    )
    add_column_option(data)
    data.add_argument(
        "--max-characters",
        type=int,
        default=10_000_000,
        help="number of characters of text to measure on (default: %(default)s)",
    )
    data.add_argument(
        "--rounds", type=int, default=3, help="number of rounds; the best one counts (default: %(default)s)"
    )
    documents = what.add_parser("documents", help="attention within documents")
    documents.add_argument("config", help="YAML file; sets the model, micro-batch, precision and compilation")
    documents.add_argument("overrides", nargs="*", metavar="section.key=value")
    documents.add_argument(
        "--mean-tokens", type=int, default=600, help="mean length of a document in tokens (default: %(default)s)"
    )
    documents.add_argument(
        "--rounds", type=int, default=10, help="number of rounds; the best one counts (default: %(default)s)"
    )
    for benchmark, run in ((data, benchmark_data), (documents, benchmark_documents)):
        benchmark.set_defaults(run=run)
    inference_command.add_parsers(what)
    step_command.add_parsers(what)
    kernels_command.add_parsers(what)
    arguments = _parsed(parser, argv)
    with user_errors_exit(print_message=is_first_process()):
        _check_counts(arguments)
        arguments.run(arguments)


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand behind options, where argparse itself does not look for them."""
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _check_counts(arguments: argparse.Namespace) -> None:
    for option in ("max_characters", "rounds", "mean_tokens", "prompt_tokens", "new_tokens", "steps", "warmup"):
        if getattr(arguments, option, 1) < 1:
            name = "--" + option.replace("_", "-")
            raise UserError(Problem(name, f"{getattr(arguments, option)} is less than 1", f"leave {name} out"))


def benchmark_documents(arguments: argparse.Namespace) -> None:
    """Print the time (ms), the ratio to the first variant, and on GPUs the peak memory (GiB) of each variant.

    Raises:
        UserError: the config is invalid.
    """
    config = load_config(arguments.config, arguments.overrides)
    cuda = torch.cuda.is_available() and config.hardware.device != "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    training, where = config.training, torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{where}, PyTorch {torch.__version__}, {training.precision}{', compiled' if training.compile else ''}")
    print(
        f"one step of {training.micro_batch_size} x {training.seq_length} tokens, "
        f"{arguments.mean_tokens} tokens per document on average"
    )
    ways = documents_benchmark.measure(config, arguments.mean_tokens, arguments.rounds, device)
    for way in ways:
        memory = f"  {way.peak_bytes / 2**30:6.2f} GiB" if way.peak_bytes else ""
        print(f"  {way.name:<20}{way.milliseconds:9.2f} ms  {way.milliseconds / ways[0].milliseconds:5.2f}{memory}")


def benchmark_data(arguments: argparse.Namespace) -> None:
    """Print the speed of tokenising (tokens per CPU second) and of reading batches (tokens per second).

    Raises:
        UserError: the text or the tokenizer cannot be read.
    """
    measured = data_benchmark.measure(
        arguments.input, arguments.tokenizer, columns_of(arguments), arguments.max_characters, arguments.rounds
    )
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{measured.num_documents:,} documents, {measured.num_characters:,} characters")
    print_table("text to tokens, per CPU second", measured.preparing)
    print_table("batches, per second of one training process", measured.reading)


def print_table(title: str, rows: list[data_benchmark.Row]) -> None:
    """Print each row's speed (million tokens/s), its percentage of the first row's, and its number of tokens."""
    print(f"\n{title}")
    for row in rows:
        speed = f"{row.tokens_per_second / 1e6:8.2f} M tokens/s"
        ratio = f"{row.tokens_per_second / rows[0].tokens_per_second:6.1%}"
        print(f"  {row.name:<44}{speed}  {ratio}  {row.num_tokens:,}")
