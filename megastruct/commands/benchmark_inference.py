"""The benchmarks `decode` and `prefill` of megastruct-benchmark: models and forms side by side, in one run."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch

from megastruct.benchmarks.inference import Decoding, measure_decoding, measure_prefill, measure_transformers
from megastruct.config import Config, load_config
from megastruct.errors import Problem, UserError
from megastruct.inference.forms import Form
from megastruct.inference.load import DTYPES, available_device
from megastruct.paths import option_path
from megastruct.structures import DENSE

LARGEST = "largest"


def add_parsers(what: Any) -> None:
    """Add the two benchmarks to the subparsers `what`."""
    decode = what.add_parser("decode", help="generating tokens with a cache, by batch size")
    decode.add_argument("--new-tokens", type=int, default=256, help="tokens of a continuation (default: %(default)s)")
    decode.add_argument(
        "--transformers",
        type=option_path,
        metavar="FOLDER",
        help="also measure transformers' generate on an exported folder",
    )
    decode.set_defaults(run=benchmark_decode)
    prefill = what.add_parser("prefill", help="reading prompts")
    prefill.set_defaults(run=benchmark_prefill)
    for parser, tokens, batches in (
        (decode, 128, f"1,2,4,8,16,32,64,128,256,512,{LARGEST}"),
        (prefill, 512, "1,8,64"),
    ):
        add = parser.add_argument
        add("configs", nargs="+", help="YAML files; the first one is what the others are compared with")
        add("--form", action="append", choices=get_args(Form), help="of structured linears, may be repeated")
        add("--batches", default=batches, help="comma-separated batch sizes (default: %(default)s)")
        add("--prompt-tokens", type=int, default=tokens, help="tokens of each prompt (default: %(default)s)")
        add("--dtype", choices=sorted(DTYPES), default="bfloat16", help="default: %(default)s")
        add("--device", help="default: the GPU if there is one")


def benchmark_decode(arguments: argparse.Namespace) -> None:
    """Print milliseconds of a step and tokens/s of every model and form by batch size, and the ratio to the first."""
    folder = arguments.transformers
    if folder and not (folder / "config.json").is_file():  # it is measured last, after many minutes
        suggestion = "a folder of tools/export.py, in its merged form"
        raise UserError(Problem("--transformers", f"{folder} has no config.json", suggestion))
    device, dtype, batches = _where(arguments)
    prompt, new = arguments.prompt_tokens, arguments.new_tokens
    print(f"{new} new tokens after prompts of {prompt}; the likeliest token is taken; the cache is filled beforehand")
    first: dict[str, float] = {}
    for name, config, form in _models(arguments):
        found = measure_decoding(config, form, batches, prompt, new, device, dtype)
        _print_decoding(f"{name}, {form}", found, batches, first)
    if folder:
        sizes = [batch for batch in batches if batch]
        found = measure_transformers(folder, sizes, prompt, new, device, dtype)
        _print_decoding(f"{folder}, transformers", found, batches, first)


def _print_decoding(title: str, rows: Iterator[Decoding], batches: list[int], first: dict[str, float]) -> None:
    """`first`: the tokens/s of the first model by batch size, to which its rows are added."""
    print(f"\n{title}\n  batch     ms per step     tokens/s   speed of the first")
    for found in rows:
        asked = LARGEST if found.batch not in batches else str(found.batch)
        base = first.setdefault(asked, found.tokens_per_second)
        print(
            f"{found.batch:7,}{1e3 * found.step_seconds:16.3f}{found.tokens_per_second:13,.0f}"
            f"{found.tokens_per_second / base:21.2f}{'  (largest)' if asked == LARGEST else ''}",
            flush=True,
        )


def benchmark_prefill(arguments: argparse.Namespace) -> None:
    """Print the tokens/s of reading prompts of every model and form by batch size, and the ratio to the first."""
    device, dtype, batches = _where(arguments)
    print(f"prompts of {arguments.prompt_tokens} tokens")
    first: dict[int, float] = {}
    for name, config, form in _models(arguments):
        print(f"\n{name}, {form}\n  batch              ms     tokens/s   speed of the first")
        for found in measure_prefill(config, form, batches, arguments.prompt_tokens, device, dtype):
            base = first.setdefault(found.batch, found.tokens_per_second)
            print(
                f"{found.batch:7,}{1e3 * found.seconds:16.3f}{found.tokens_per_second:13,.0f}"
                f"{found.tokens_per_second / base:21.2f}",
                flush=True,
            )


def _where(arguments: argparse.Namespace) -> tuple[torch.device, torch.dtype, list[int]]:
    """(device, dtype, batch sizes), after a line that says them; 0 stands for the largest batch."""
    words = [word.strip() for word in arguments.batches.split(",")]
    if bad := [word for word in words if word != LARGEST and (not word.isdecimal() or int(word) < 1)]:
        raise UserError(Problem("--batches", f"{bad[0]!r} is not a batch size", f"--batches 1,8,64,{LARGEST}"))
    if arguments.what == "prefill" and LARGEST in words:
        raise UserError(Problem("--batches", f"prefill has no {LARGEST}", "--batches 1,8,64"))
    device = available_device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}, {arguments.dtype}")
    return device, DTYPES[arguments.dtype], [0 if word == LARGEST else int(word) for word in words]


def _models(arguments: argparse.Namespace) -> Iterator[tuple[str, Config, Form]]:
    """(name, config, form) of all that is measured: a dense model has one form."""
    configs = [(Path(path).stem, load_config(path)) for path in arguments.configs]
    for name, config in configs:
        asked: list[Form] = arguments.form or ["structured", "merged"]
        for form in asked if config.ffn.structure != DENSE else asked[:1]:
            yield name, config, form
