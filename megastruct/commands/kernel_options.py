"""The options of the benchmark `kernels`, checked all at once."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

import torch

from megastruct.benchmarks.ffn import FFN, Part, Variant
from megastruct.benchmarks.kernels import Calls
from megastruct.commands.output_files import file_problems
from megastruct.config.activations import ACTIVATIONS
from megastruct.errors import Problem, Problems, UserError
from megastruct.inference.load import available_device
from megastruct.metrics.curves import check_output
from megastruct.structures import DENSE, STRUCTURES
from megastruct.structures.numbers import Widths

PARTS: tuple[Part, ...] = get_args(Part)
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
COMPILED = {"no": (False,), "yes": (True,), "both": (False, True)}
LARGEST_COUNT = 2**31 - 1

T = TypeVar("T")


@dataclass(frozen=True)
class Choices:
    """What is to be measured. `dense_layers`: one for every width; `compiled`: False, True or both."""

    dense_layers: Sequence[FFN]
    variants: Sequence[Variant]
    shares: Sequence[float]
    tokens: Sequence[int]
    compiled: Sequence[bool]
    precision: str
    ffn_ratio: float
    bias: bool
    device: torch.device
    calls: Calls
    json: Path | None
    plot: Path | None

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, values and gradients."""
        return PRECISIONS[self.precision]


def checked(arguments: argparse.Namespace) -> Choices:
    """The options as values. Raises UserError with the problems of all options."""
    problems = Problems()
    variants = _each(problems, arguments.structures, _variant)
    widths = _each(problems, arguments.widths, lambda word: _count("--widths", word, 2048))
    tokens = _each(problems, arguments.tokens, lambda word: _count("--tokens", word, 30720))
    shares = _each(problems, arguments.share, _share)
    ratio = problems.collect(lambda: _ratio(arguments.ffn_ratio))
    part = problems.collect(lambda: _name("--layer", arguments.layer, PARTS))
    activation = problems.collect(lambda: _name("--activation", arguments.activation, ACTIVATIONS))
    precision = problems.collect(lambda: _name("--precision", arguments.precision, PRECISIONS))
    compiled = problems.collect(lambda: _name("--compile", arguments.compile, COMPILED))
    timed = problems.collect(lambda: _count("--calls", arguments.calls, 20))
    warmup = problems.collect(lambda: _count("--warmup-calls", arguments.warmup_calls, 5))
    device = problems.collect(lambda: _device(arguments.device))
    problems += file_problems("--json", arguments.json, "kernels.json")
    problems += file_problems("--plot", arguments.plot, "kernels.png")
    if arguments.plot and not arguments.plot.is_dir():
        problems.collect(lambda: check_output(arguments.plot, "--plot"))
    networks = [(width, max(1, round(width * ratio))) for width in widths] if ratio else []
    problems += [problem for d, f in networks for variant in variants for problem in _size_problems(variant, d, f)]
    problems.raise_if_any()
    assert ratio and part and activation and precision and compiled and timed and warmup and device
    bias = not arguments.no_bias
    return Choices(
        dense_layers=[FFN(DENSE, d, f, ACTIVATIONS[activation], bias, part) for d, f in networks],
        variants=variants,
        shares=shares,
        tokens=tokens,
        compiled=COMPILED[compiled],
        precision=precision,
        ffn_ratio=ratio,
        bias=bias,
        device=device,
        calls=Calls(warmup, timed),
        json=arguments.json,
        plot=arguments.plot,
    )


def _variant(word: str) -> Variant:
    """`blockdense`, of which --share gives the sizes, or `blockdense:rank=512,nblocks=4`."""
    name, colon, text = word.partition(":")
    structure = _name("--structures", name, STRUCTURES)
    known = STRUCTURES[structure].numbers.sizes
    pairs = [(key, value) for key, _, value in (size.partition("=") for size in text.split(",") if size)]
    right = sorted(key for key, _ in pairs) == sorted(known)
    if colon and not (right and all(value.isdecimal() and len(value) <= 12 for _, value in pairs)):
        example = ",".join(f"{key}={4 if key == 'nblocks' else 512}" for key in known)
        form = f", each once, as in {structure}:{example}" if known else ""
        found = f"{word!r}: the sizes of {structure} are {', '.join(known) or 'none'}{form}"
        raise UserError(Problem("--structures", found, f"--structures {structure}"))  # it has sizes for every width
    sizes = dict(pairs)
    return Variant(structure, tuple((key, int(sizes[key])) for key in known) if colon else ())


def _size_problems(variant: Variant, d: int, f: int) -> Iterator[Problem]:
    if variant.sizes:
        widths = Widths(d, f, outer_name="d", inner_name="f")
        option = f"--structures {variant.structure}"
        problems = list(STRUCTURES[variant.structure].numbers.size_problems(widths, dict(variant.sizes)))
        better = dict(problem.suggestion.split("=") for problem in problems if problem.suggestion)
        fitting = ",".join(f"{key}={better.get(key, value)}" for key, value in variant.sizes)
        for problem in problems:
            yield Problem(f"{option}, d = {d}, {problem.where}", problem.found, f"{option}:{fitting}")


def _each(problems: Problems, words: Iterable[str], read: Callable[[str], T]) -> list[T]:
    """The values of an option that takes several, each once."""
    values = [problems.collect(lambda word=word: read(word)) for word in words]  # type: ignore[misc]
    return [value for value in dict.fromkeys(values) if value is not None]


def _name(option: str, word: str, known: Iterable[T]) -> T:
    names = [str(name) for name in known]
    for name in known:
        if word == name:
            return name
    nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.0)[0]
    raise UserError(Problem(option, f"{word!r} is not one of {', '.join(names)}", f"{option} {nearest}"))


def _count(option: str, word: str, example: int) -> int:
    if word.isdecimal() and len(word) <= 12 and 1 <= int(word) <= LARGEST_COUNT:
        return int(word)
    found = f"{word!r} is not a whole number from 1 to {LARGEST_COUNT:,}"
    raise UserError(Problem(option, found, f"{option} {example}"))


def _share(word: str) -> float:
    share = _number(word)
    if share is None or not 0.0 < share < 1.0:
        raise UserError(Problem("--share", f"{word!r} is not between 0 and 1", "--share 0.32"))
    return share


def _ratio(word: str) -> float:
    ratio = _number(word)
    if ratio is None or not 0.0 < ratio <= 1000.0:
        raise UserError(Problem("--ffn-ratio", f"{word!r} is not a number above 0 and up to 1000", "--ffn-ratio 4"))
    return ratio


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _device(wanted: str | None) -> torch.device:
    device = available_device(wanted)
    if device.type not in ("cpu", "cuda"):
        raise UserError(Problem("--device", f"{wanted} is neither a CPU nor a GPU of CUDA or ROCm", "--device cpu"))
    return device
