"""tools/benchmark.py kernels: rows that agree with each other and with independent counts, and wrong layers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from marks import needs_gpu
from megastruct.benchmarks import exactness, kernels
from megastruct.benchmarks.exactness import relative_errors
from megastruct.benchmarks.ffn import FFN, Part, Variant, layers_to_compare
from megastruct.benchmarks.kernels import Calls, Setting, draw_inputs, seconds_of
from megastruct.commands import benchmark
from megastruct.config.activations import ACTIVATIONS
from megastruct.structures import DENSE, STRUCTURES
from megastruct.structures.lowrank import maths as lowrank

CPU = torch.device("cpu")
FEW = ("--device", "cpu", "--calls", "3", "--warmup-calls", "1")
TINY = ("--widths", "32", "--tokens", "40", "--precision", "fp32", *FEW)
STRUCTURED = [name for name in STRUCTURES if name != DENSE]
VARIANTS = [Variant(name) for name in STRUCTURED]


def dense(d: int = 32, f: int = 128, activation: str = "gelu", bias: bool = True, part: Part = "ffn") -> FFN:
    return FFN(DENSE, d, f, ACTIVATIONS[activation], bias, part)


def run(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows of the JSON file; a run that ends with another code than 0 has its rows in the file too."""
    benchmark.main(["kernels", *arguments, "--json", str(tmp_path / "kernels.json")])
    return rows_of(tmp_path)


def rows_of(tmp_path: Path) -> list[dict[str, Any]]:
    return json.loads((tmp_path / "kernels.json").read_text())["rows"]


def counted_flops(layer: FFN, tokens: int) -> int:
    """FLOPs of forward and backward, by PyTorch's own count of what the module calls."""
    module = layer.build(CPU, torch.float32)
    [pair, *_] = draw_inputs(layer, Setting(tokens, False, torch.float32, CPU))
    with FlopCounterMode(display=False) as counter:
        module(pair[0]).backward(pair[1])
    return counter.get_total_flops()


def test_rows_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, *TINY, "--widths", "32", "64", "--share", "0.32", "0.63")
    printed = capsys.readouterr().out
    assert len(rows) == 2 * 7
    for start in range(0, len(rows), 7):
        group, base = rows[start : start + 7], rows[start]
        assert [row["structure"] for row in group] == [DENSE, *(name for name in STRUCTURED for _ in (0.32, 0.63))]
        assert base["weights"] == 2 * base["hidden_size"] * base["ffn_hidden_size"]
        assert base["speed_up"] == base["forward_speed_up"] == base["bound"] == base["share_of_bound"] == 1.0
        layers = list(layers_to_compare(dense(base["hidden_size"], base["ffn_hidden_size"]), VARIANTS, (0.32, 0.63)))
        for layer, row in zip(layers, group, strict=True):
            assert (row["hidden_size"], row["tokens"]) == (base["hidden_size"], base["tokens"])
            assert row["forward_backward_flops"] == counted_flops(layer, row["tokens"]) == 3 * row["forward_flops"]
            assert row["forward_ms"] == median(row["every_forward_ms"]) > 0
            assert row["forward_backward_ms"] == median(row["every_forward_backward_ms"])
            assert len(row["every_forward_ms"]) == len(row["every_forward_backward_ms"]) == 3
            seconds = row["forward_backward_ms"] / 1e3
            assert row["tflops"] == pytest.approx(row["forward_backward_flops"] / seconds / 1e12)
            assert row["forward_speed_up"] == pytest.approx(base["forward_ms"] / row["forward_ms"])
            assert row["speed_up"] == pytest.approx(base["forward_backward_ms"] / row["forward_backward_ms"])
            assert row["bound"] == pytest.approx(base["forward_flops"] / row["forward_flops"])
            assert row["share_of_bound"] == pytest.approx(row["speed_up"] / row["bound"])
            assert row["share"] == pytest.approx(row["weights"] / base["weights"])
            assert row["share"] == pytest.approx(row["wanted_share"] or 1.0, abs=0.05)
            assert all(0 < error < 1e-5 for error in row["errors"].values()) and row["problem"] is None
            cells = [row["hidden_size"], row["tokens"], f"{row['share']:.1%}", f"{row['forward_ms']:.3f}"]
            cells += [f"{row['forward_backward_ms']:.3f}", f"{row['tflops']:.3g}", f"{row['forward_speed_up']:.3f}"]
            cells += [f"{row['speed_up']:.3f}", f"{row['bound']:.3f}", f"{row['share_of_bound']:.1%}"]
            cells += [f"{max(row['errors'].values()):.1e}"]
            assert re.search(rf"^  {layer.name} +{' +'.join(re.escape(str(cell)) for cell in cells)}$", printed, re.M)


def test_the_picture_has_the_numbers_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot
    from matplotlib.axes import Axes

    drawn: dict[str, Any] = {}
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: (drawn.update({k["label"]: a[:2]}), plot(self, *a, **k))[1])
    picture = tmp_path / "kernels.png"
    widths, options = ("--widths", "32", "48"), ("--structures", "blockshuffle", "--share", "0.63", "--layer", "fc1")
    rows = run(tmp_path, *TINY[2:], *widths, *options, "--plot", str(picture))
    shown = [row for row in rows if row["structure"] == "blockshuffle"]
    assert drawn["blockshuffle, 63%"][:1] == ((32, 48),)
    assert drawn["blockshuffle, 63%"][1] == tuple(row["speed_up"] for row in shown)
    assert drawn["_bound of blockshuffle, 63%"][1] == tuple(row["bound"] for row in shown)
    assert pyplot.imread(picture).shape[:2] == (750, 1200)


@pytest.mark.parametrize("part", ["ffn", "fc1", "fc2"])
@pytest.mark.parametrize("activation, bias", [("gelu", True), ("swiglu", False)])
def test_the_reference_is_the_layer(part: Part, activation: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 nothing is left of an error but the last bits, whatever the structure."""
    monkeypatch.setattr(exactness, "CHUNK_TOKENS", 24)  # the last of the chunks of 3 x 8 tokens is shorter
    setting = Setting(56, False, torch.float64, CPU)
    for layer in layers_to_compare(dense(24, 40, activation, bias, part), VARIANTS, (0.5,)):
        module = layer.build(CPU, torch.float64)
        errors = relative_errors(module, *draw_inputs(layer, setting)[0])
        names = {f"gradient of {name}" for name, _ in module.named_parameters()}
        assert set(errors) == {"output", "gradient of the input"} | names
        assert len(names) == (2 if part == "ffn" else 1) * ((1 if layer.is_dense else 2) + bias)
        assert max(errors.values()) < 1e-13, layer.name


def test_an_error_has_its_size() -> None:
    layer = dense()
    module = layer.build(CPU, torch.float64)
    module.fc2.register_forward_hook(lambda *arguments: arguments[-1] * 1.001)
    errors = relative_errors(module, *draw_inputs(layer, Setting(64, False, torch.float64, CPU))[0])
    assert list(errors.values()) == pytest.approx([0.001] * len(errors), rel=1e-6)


APPLY = lowrank.apply


def scaled(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    return APPLY(x, v, u, bias) * 1.001


def without_a_gradient(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    return APPLY(x, v, u.detach(), bias)


def without_a_number(x: Tensor, v: Tensor, u: Tensor, bias: Tensor | None = None) -> Tensor:
    return APPLY(x, v, u, bias) * math.nan


@pytest.mark.parametrize(
    "wrong, found",
    [
        (scaled, r"(output|gradient of [\w. ]+) is off by 0\.00\d+ > 0\.0001"),
        (without_a_gradient, r"gradient of fc[12]\.u is off by 1 > 0\.0001"),
        (without_a_number, "output is off by nan > 0.0001"),
    ],
)
def test_a_wrong_layer_has_no_times(
    wrong: Callable[..., Tensor],
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lowrank, "apply", wrong)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *TINY, "--share", "0.5", "--structures", "lowrank", "blockdense")
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert re.search(rf"^  lowrank rank=\d+ +32 +40 +[\d.]+%  wrong, not timed: {found}$", printed.out, re.M)
    assert re.fullmatch(r"error: 1 of 3 layers are wrong: lowrank rank=\d+\n", printed.err)
    rows = rows_of(tmp_path)
    assert [row["speed_up"] is None for row in rows] == [False, True, False]
    assert rows[1]["forward_ms"] is None and rows[1]["every_forward_ms"] == [] and rows[1]["problem"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("as on a GPU"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_layer_without_memory(error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_memory(*_: Any, **__: Any) -> Tensor:
        raise error

    monkeypatch.setattr(lowrank, "apply", without_memory)
    rows = run(tmp_path, *TINY, "--share", "0.5", "--structures", "lowrank", "blockdense")
    assert [row["problem"] for row in rows] == [None, "does not fit into memory", None]


def test_what_does_not_fit_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, *TINY[2:], "--widths", "32", "--tokens", "2000000000", "40", "--structures", "lowrank")
    assert [row["problem"] for row in rows] == ["does not fit into memory"] * 3 + [None] * 3
    assert rows[1]["bound"] == rows[4]["bound"] and rows[1]["speed_up"] is None and rows[4]["speed_up"]
    assert len(re.findall(r"2,000,000,000 +[\d.]+%  does not fit into memory$", capsys.readouterr().out, re.M)) == 3
    # What no address space holds, so that the allocator of the CPU refuses it itself.
    monkeypatch.setattr(kernels, "memory_there_bytes", lambda device_type: 2**62)
    layer = FFN(DENSE, 2**16, 1, ACTIVATIONS["gelu"])
    assert kernels.measure(layer, Setting(2**31, False, torch.float32, CPU), Calls(1, 1)).problem


def test_given_sizes(tmp_path: Path) -> None:
    structures = ("blockdense:nblocks=2,rank=8", "blockdense:rank=8,nblocks=2", "blockdense")
    rows = run(tmp_path, *TINY, "--share", "0.5", "--structures", *structures)
    assert [row["wanted_share"] for row in rows] == [None, None, 0.5]
    assert rows[1]["sizes"] == {"rank": 8, "nblocks": 2} != rows[2]["sizes"]
    assert rows[1]["weights"] == 8 * (32 // 2 + 128) + 8 * (128 // 2 + 32)


@pytest.mark.parametrize("size", ["s", "m", "l", "xl"])
@pytest.mark.parametrize("share", [32, 63])
def test_sizes_are_those_of_the_configs(size: str, share: int) -> None:
    """BlockDense has other numbers of blocks or other ranks in the paper, and is given its sizes."""
    folder = Path(__file__).resolve().parents[2] / "configs"
    widths = yaml.safe_load((folder / "model" / f"{size}.yaml").read_text())["model"]
    base = dense(widths["hidden_size"], widths["ffn_hidden_size"])
    for structure in STRUCTURED:
        config = yaml.safe_load((folder / "ffn" / f"{size}_{structure}_{share}.yaml").read_text())["ffn"]
        sizes = {key: value for key, value in config.items() if key != "structure"}
        given = tuple(sizes.items()) if structure == "blockdense" else ()
        [_, layer] = layers_to_compare(base, [Variant(structure, given)], [share / 100])
        assert layer.sizes == sizes
        assert layer.share == pytest.approx(share / 100, abs=0.05)


def test_shares_with_the_same_sizes_are_one_layer() -> None:
    layers = list(layers_to_compare(dense(), [Variant("blockshuffle"), Variant(DENSE)], (0.6, 0.63)))
    assert [layer.name for layer in layers] == ["dense", "blockshuffle nblocks=2"]


def test_inputs_take_turns_and_warmup_has_no_times() -> None:
    setting = Setting(96, False, torch.float32, CPU)
    inputs = draw_inputs(dense(), setting)
    assert len(inputs) == kernels.MOST_INPUTS
    assert len(draw_inputs(dense(4096, 1), setting._replace(tokens=3072))) == kernels.FEWEST_INPUTS
    assert all(x.shape == gradient.shape == (12, 8, 32) and x.requires_grad for x, gradient in inputs)
    assert len({float(x.detach().sum()) for x, _ in inputs}) == len(inputs)
    called: list[int] = []
    assert len(seconds_of(called.append, Calls(2, 3), CPU)) == 3
    assert called == [0, 1, 2, 3, 4]


def test_all_mistakes_are_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "--structures": ("low", "'low' is not one of dense, lowrank, blockdense, blockshuffle"),
        "--widths": ("0", "'0' is not a whole number from 1 to 2,147,483,647"),
        "--tokens": ("1e3", "'1e3' is not a whole number"),
        "--share": ("63%", "'63%' is not between 0 and 1"),
        "--layer": ("fc3", "'fc3' is not one of ffn, fc1, fc2"),
        "--ffn-ratio": ("nan", "'nan' is not a number above 0"),
        "--activation": ("silu", "'silu' is not one of gelu, swiglu"),
        "--precision": ("fp16", "'fp16' is not one of bf16, fp32"),
        "--compile": ("maybe", "'maybe' is not one of no, yes, both"),
        "--device": ("meta", "meta cannot be used"),
        "--calls": ("-1", "'-1' is not a whole number"),
        "--warmup-calls": ("many", "'many' is not a whole number"),
        "--json": ("no/folder/x.json", "there is no folder"),
        "--plot": ("kernels", "kernels has no suffix"),
    }
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["kernels", *(word for option, (value, _) in wrong.items() for word in (option, value))])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and message.count("try: ") == len(wrong)
    for option, (_, found) in wrong.items():
        assert f"{option}: {found}" in message


@pytest.mark.parametrize(
    "arguments, found",
    [
        (("--plot", "kernels.tokens"), "--plot: kernels.tokens: .tokens is none of the formats"),
        (("--json", "."), "--json: . is a folder"),
        (("--device", "xpu"), "--device: xpu cannot be used"),
        (("--structures", "lowrank:nblocks=4"), "'lowrank:nblocks=4': the sizes of lowrank are rank, each once"),
        (("--structures", "lowrank:rank=4,rank=8"), "'lowrank:rank=4,rank=8': the sizes of lowrank are rank, each"),
        (("--structures", "dense:rank=4"), "'dense:rank=4': the sizes of dense are none"),
        (("--structures", "blockdense:rank=9,nblocks=2", "--widths", "64"), "blockdense, d = 64, rank: 9 is not a"),
    ],
)
def test_a_mistake(arguments: tuple[str, ...], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["kernels", *arguments])
    assert stopped.value.code == 2
    assert found in capsys.readouterr().err


@pytest.mark.parametrize(
    "word",
    ["lowrank:", "lowrank:rank=99", "blockdense:rank=8", "blockdense:rank=9,nblocks=3", "blockshuffle:nblocks=3"],
)
def test_suggested_structures_work(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, *TINY, "--structures", word)
    suggestions = set(re.findall(r"try: --structures (\S+)$", capsys.readouterr().err, re.M))
    assert len(suggestions) == 1
    assert all(row["problem"] is None for row in run(tmp_path, *TINY, "--structures", *suggestions))


def test_a_folder_is_one_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, *TINY, "--plot", str(tmp_path))
    message = capsys.readouterr().err
    assert message.count("try: ") == 1 and f"--plot: {tmp_path} is a folder" in message


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_and_not(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--compile", "both", "--activation", "swiglu", "--no-bias", "--share", "0.5")
    rows = run(tmp_path, "--widths", "32", "--tokens", "40", "--precision", precision, *FEW, *options)
    assert [row["compiled"] for row in rows] == [False] * 4 + [True] * 4
    assert all(row["problem"] is None for row in rows)
    assert rows[5]["speed_up"] == pytest.approx(rows[4]["forward_backward_ms"] / rows[5]["forward_backward_ms"])
    assert capsys.readouterr().out.count("compiled\n") == 2


@needs_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_on_a_gpu(device: str, tmp_path: Path) -> None:
    """Events of the stream give the times: forward and backward take longer than the forward."""
    rows = run(tmp_path, "--widths", "512", "--tokens", "8192", "--device", device, "--compile", "both")
    assert len(rows) == 14 and all(row["problem"] is None for row in rows)
    assert all(row["forward_backward_ms"] > row["forward_ms"] > 0 for row in rows)
