"""The benchmark `kernels` of megastruct-benchmark: the feed-forward layer alone, structured beside dense."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch

from megastruct.benchmarks.device import device_name
from megastruct.benchmarks.exactness import BOUNDS
from megastruct.benchmarks.ffn import layers_to_compare
from megastruct.benchmarks.kernels import Compared, Setting, compare
from megastruct.benchmarks.speed_ups import plot_speed_ups
from megastruct.commands.kernel_options import PARTS, PRECISIONS, Choices, checked
from megastruct.commands.output_files import write_json
from megastruct.config.activations import ACTIVATIONS
from megastruct.launch.environment import keep_compiled_code
from megastruct.paths import option_path
from megastruct.structures import DENSE, STRUCTURES

NAME_WIDTH = 31


def add_parsers(what: Any) -> None:
    """Add the benchmark to the subparsers `what`. Values are read in `kernel_options.py`, all mistakes at once."""
    parser = what.add_parser("kernels", help="the feed-forward layer alone, structured beside dense")

    def add(option: str, meaning: str, default: str | list[str], **more: Any) -> None:
        shown = default if isinstance(default, str) else " ".join(default)
        parser.add_argument(option, default=default, help=f"{meaning} (default: {shown})", **more)

    several: dict[str, Any] = {"nargs": "+"}
    structures = [name for name in STRUCTURES if name != DENSE]
    meaning = "what is compared with the dense layer; sizes may be given, as in blockdense:rank=768,nblocks=4"
    add("--structures", meaning, structures, metavar="NAME", **several)
    add("--widths", "hidden sizes d", ["1024", "2048", "4096"], metavar="D", **several)
    add("--tokens", "numbers of tokens", ["30720"], metavar="T", **several)
    add("--share", "shares of the dense weights, of which the sizes follow", ["0.32", "0.63"], metavar="S", **several)
    add("--layer", "the network, or one of its linears: " + ", ".join(PARTS), "ffn", metavar="PART")
    add("--ffn-ratio", "the inner width f as a multiple of d", "4", metavar="F/D")
    add("--activation", ", ".join(ACTIVATIONS), "gelu", metavar="NAME")
    parser.add_argument("--no-bias", action="store_true", help="linears without biases")
    add("--precision", "of weights, values and gradients: " + ", ".join(PRECISIONS), "bf16", metavar="NAME")
    meaning = "measure layers through torch.compile: yes (also without a value), no, or both"
    add("--compile", meaning, "no", nargs="?", const="yes", metavar="yes|no|both")
    parser.add_argument("--device", help="default: the GPU if there is one")
    add("--calls", "timed calls; the median counts", "20", metavar="N")
    add("--warmup-calls", "calls before them", "5", metavar="N")
    parser.add_argument("--json", type=option_path, metavar="FILE", help="also write all numbers there")
    parser.add_argument("--plot", type=option_path, metavar="PNG", help="draw the speed-up by width, with its bound")
    parser.set_defaults(run=benchmark_kernels)


def benchmark_kernels(arguments: argparse.Namespace) -> None:
    """Print a row for every layer. Exit code 1 if a layer is wrong.

    Raises:
        UserError: options are wrong, or a file cannot be written.
    """
    choices = checked(arguments)
    if choices.device.type == "cuda" and choices.device.index is not None:  # events are the current GPU's
        torch.cuda.set_device(choices.device)
    if any(choices.compiled):
        keep_compiled_code(None)
    print(_heading(choices), flush=True)
    found: list[Compared] = []
    for compiled in choices.compiled:
        print(f"\n{'compiled' if compiled else 'not compiled'}\n{_titles()}", flush=True)
        for dense in choices.dense_layers:
            for tokens in choices.tokens:
                setting = Setting(tokens, compiled, choices.dtype, choices.device)
                for row in compare(layers_to_compare(dense, choices.variants, choices.shares), setting, choices.calls):
                    found.append(row)
                    print(_row(row), flush=True)
                    if choices.json:
                        write_json("--json", choices.json, _values(found, choices))
    if choices.plot:
        plot_speed_ups(found, choices.plot, "--plot")
    _end(found)


def _heading(choices: Choices) -> str:
    dense, bias = choices.dense_layers[0], "" if choices.bias else ", no biases"
    activation = f", {dense.activation.name}" if dense.part == "ffn" else ""
    return (
        f"{device_name(choices.device)}, PyTorch {torch.__version__}, {choices.precision}\n"
        f"{_WORDS[dense.part]}, f = {choices.ffn_ratio:g} d{activation}{bias}; "
        f"the median of {choices.calls.timed} calls after {choices.calls.warmup}; "
        f"relative errors up to {BOUNDS[choices.dtype]:g} pass"
    )


_WORDS = {"ffn": "feed-forward network d -> f -> d", "fc1": "fc1 alone, d -> f", "fc2": "fc2 alone, f -> d"}
# Two lines of titles and the width of every column, without the space before it.
_COLUMNS = (
    ("", "d", 5),
    ("", "tokens", 7),
    ("", "share", 6),
    ("forward", "ms", 8),
    ("fwd + bwd", "ms", 9),
    ("fwd + bwd", "TFLOP/s", 9),
    ("forward", "speed-up", 8),
    ("fwd + bwd", "speed-up", 9),
    ("", "bound", 6),
    ("share of", "bound", 8),
    ("relative", "error", 8),
)


def _titles() -> str:
    first = "".join(f" {title:>{width}}" for title, _, width in _COLUMNS)
    second = "".join(f" {title:>{width}}" for _, title, width in _COLUMNS)
    return f"  {'':<{NAME_WIDTH}}{first}\n  {'structure':<{NAME_WIDTH}}{second}"


def _row(row: Compared) -> str:
    measured, layer = row.measured, row.measured.layer
    cells = [str(layer.hidden_size), f"{measured.setting.tokens:,}", f"{layer.share:.1%}"]
    if not measured.problem:
        assert measured.forward and measured.forward_backward and measured.tflops
        cells += [f"{1e3 * measured.forward:.3f}", f"{1e3 * measured.forward_backward:.3f}", f"{measured.tflops:.3g}"]
        cells += [_or_dash(row.forward_speed_up, ".3f"), _or_dash(row.speed_up, ".3f"), f"{row.bound:.3f}"]
        cells += [_or_dash(row.share_of_bound, ".1%"), f"{measured.worst_error[1]:.1e}"]
    widths = [width for *_, width in _COLUMNS]
    aligned = "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=False))
    return f"  {layer.name:<{NAME_WIDTH}}{aligned}" + (f"  {measured.problem}" if measured.problem else "")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _end(found: Sequence[Compared]) -> None:
    wrong = [row.measured.layer.name for row in found if row.measured.is_wrong]
    if wrong:
        names = ", ".join(dict.fromkeys(wrong))
        print(f"error: {len(wrong)} of {len(found)} layers are wrong: {names}", file=sys.stderr, flush=True)
        raise SystemExit(1)


def _values(found: Sequence[Compared], choices: Choices) -> dict[str, Any]:
    """All numbers, as plain values."""
    dense = choices.dense_layers[0]
    return {
        "device": device_name(choices.device),
        "torch": torch.__version__,
        "layer": dense.part,
        "activation": dense.activation.name,
        "bias": choices.bias,
        "precision": choices.precision,
        "error_bound": BOUNDS[choices.dtype],
        "calls": choices.calls.timed,
        "warmup_calls": choices.calls.warmup,
        "rows": [_row_values(row) for row in found],
    }


def _row_values(row: Compared) -> dict[str, Any]:
    measured = row.measured
    return {
        **measured.layer.as_json(),
        "tokens": measured.setting.tokens,
        "compiled": measured.setting.compiled,
        "problem": measured.problem or None,
        "errors": {name: error if math.isfinite(error) else None for name, error in measured.errors.items()},
        "forward_flops": measured.forward_flops,
        "forward_backward_flops": measured.forward_backward_flops,
        "forward_ms": _milliseconds(measured.forward),
        "forward_backward_ms": _milliseconds(measured.forward_backward),
        "tflops": measured.tflops,
        "forward_speed_up": row.forward_speed_up,
        "speed_up": row.speed_up,
        "bound": row.bound,
        "share_of_bound": row.share_of_bound,
        "every_forward_ms": [1e3 * seconds for seconds in measured.forward_seconds],
        "every_forward_backward_ms": [1e3 * seconds for seconds in measured.forward_backward_seconds],
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
