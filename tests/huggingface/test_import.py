"""First weights from folders of transformers: round trips, projections, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from exports import BOUND, STRUCTURES, drawn, error, exported_config, llama_tokenizer
from megastruct.checkpoint.store import load_state, load_tensors
from megastruct.commands import export as export_command
from megastruct.commands import import_model
from megastruct.config.load import dump_config
from megastruct.config.schema import Config
from megastruct.errors import UserError
from megastruct.huggingface.export import export
from megastruct.huggingface.first_weights import FirstWeights, check_source, first_weights
from megastruct.huggingface.source import open_source
from megastruct.inference.load import load_model
from megastruct.models.gpt import GPT
from megastruct.run.origin import origin
from megastruct.structures import STRUCTURES as REGISTRY
from trained import redraw

SWIGLU, RMS, NO_BIAS = {"activation": "swiglu"}, {"norm": "rmsnorm"}, {"bias": False}
UNTIED = {"tie_embeddings": False}
ODD_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
MODELS = {
    "starcoder2": {"num_key_value_heads": 2},
    "starcoder2-nobias": NO_BIAS | UNTIED,
    "llama": RMS | SWIGLU | NO_BIAS | UNTIED,
    "llama-bias-wide-scaled": RMS | SWIGLU | {"head_dim": 6, "base_width": 4},
    "granite": RMS | SWIGLU | ODD_HEADS,
    "arcee": RMS | {"rope_base": 500.0, "norm_eps": 0.01},
    "stablelm": SWIGLU | NO_BIAS,
    "qwen3": {"qk_norm": True} | RMS | SWIGLU | NO_BIAS | ODD_HEADS,
    "qwen3-scaled": {"qk_norm": True, "base_width": 4, "norm_eps": 0.01} | RMS | SWIGLU | NO_BIAS | UNTIED,
}

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> Path:
    return llama_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 330, (2, 40), generator=torch.Generator().manual_seed(1))


def loaded(config: Config, weights: FirstWeights) -> GPT:
    model = GPT(config).eval()
    model.load_state_dict(weights.tensors)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_dense_model_comes_back(name: str, tokenizer: Path, ids: Any, tmp_path: Path) -> None:
    trained = drawn(tmp_path, tokenizer, exported_config("dense", MODELS[name]))
    export(trained, tmp_path / "out")
    source = open_source(tmp_path / "out")
    assert source.stock.model_type == name.partition("-")[0]
    check_source(source, trained.config, trained.tokenizer)
    weights = first_weights(source, trained.config)
    assert not weights.projections
    with torch.no_grad():
        assert error(loaded(trained.config, weights)(ids), trained.model(ids)) < BOUND
    for parameter, tensor in trained.model.named_parameters():
        if not parameter.startswith("final_norm"):  # scaled, where there is a base width
            assert torch.equal(weights.tensors[parameter], tensor), parameter


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name != "dense"])
@pytest.mark.parametrize("model", [{}, RMS | SWIGLU], ids=["gelu", "swiglu"])
def test_representable_weights_come_back(structure: str, model: Any, tokenizer: Path, ids: Any, tmp_path: Path) -> None:
    trained = drawn(tmp_path, tokenizer, exported_config(structure, model))
    export(trained, tmp_path / "out")
    weights = first_weights(open_source(tmp_path / "out"), trained.config)
    assert [one.name for one in weights.projections] == [f"blocks.{i}.mlp.fc{k}" for i in (0, 1) for k in (1, 2)]
    assert weights.overall().relative_error < 1e-6
    with torch.no_grad():
        assert error(loaded(trained.config, weights)(ids), trained.model(ids)) < BOUND


def best_error(structure: str, weight: np.ndarray, sizes: dict[str, int]) -> float:
    """The squared error of the best approximation, from NumPy's singular values of each independent submatrix."""
    tail = lambda matrix, rank: float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())  # noqa: E731
    if structure == "lowrank":
        return tail(weight, sizes["rank"])
    blocks = sizes["nblocks"]
    if structure == "blockdense":
        return sum(tail(part, sizes["rank"] // blocks) for part in np.split(weight, blocks, axis=1))
    k = min(weight.shape)
    features = [(j % blocks, j // (k // blocks)) for j in range(k)]  # (block of u, block of v) of each hidden feature
    columns = np.split(weight, blocks, axis=1)
    return sum(tail(columns[v][u::blocks], features.count((u, v))) for u in range(blocks) for v in range(blocks))


@pytest.mark.parametrize(
    ("structure", "sizes", "shape"),
    [
        ("lowrank", {"rank": 3}, (12, 20)),
        ("lowrank", {"rank": 5}, (20, 12)),
        ("blockdense", {"rank": 6, "nblocks": 3}, (20, 12)),
        ("blockdense", {"rank": 8, "nblocks": 2}, (12, 20)),
        ("blockshuffle", {"nblocks": 2}, (24, 16)),
        ("blockshuffle", {"nblocks": 4}, (24, 12)),  # more blocks than features per block
        ("blockshuffle", {"nblocks": 3}, (15, 30)),  # submatrices of different rank
    ],
)
def test_a_projection_is_the_best_there_is(structure: str, sizes: dict[str, int], shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    maths = REGISTRY[structure].layers.maths
    factors = maths.project(weight, **sizes)
    shapes = REGISTRY[structure].numbers.factor_shapes(shape[1], shape[0], sizes)
    assert [tuple(factor.shape) for factor in factors] == list(shapes.values())
    squared = float((maths.to_dense(*factors) - weight).square().sum())
    assert squared == pytest.approx(best_error(structure, weight.numpy(), sizes), rel=1e-9)
    nothing = maths.project(torch.zeros_like(weight), **sizes)
    assert not maths.to_dense(*nothing).any() and all(torch.isfinite(factor).all() for factor in nothing)


def test_the_reported_errors_are_those_of_the_projections(tokenizer: Path, tmp_path: Path) -> None:
    export(drawn(tmp_path, tokenizer, exported_config("dense", RMS | SWIGLU)), tmp_path / "out")
    config = exported_config("blockdense", RMS | SWIGLU, ffn={"dense_first_block": True})
    dense = redraw(GPT(exported_config("dense", RMS | SWIGLU), init=False).eval())
    weights = first_weights(open_source(tmp_path / "out"), config)
    squared_error = squared_norm = 0.0
    assert [one.name for one in weights.projections] == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    for one in weights.projections:
        weight = dense.get_submodule(one.name).to_dense().double().numpy()
        best = best_error("blockdense", weight, config.ffn.sizes)
        assert one.relative_error == pytest.approx((best / (weight**2).sum()) ** 0.5, rel=1e-5)
        squared_error, squared_norm = squared_error + best, squared_norm + (weight**2).sum()
    assert weights.overall().relative_error == pytest.approx((squared_error / squared_norm) ** 0.5, rel=1e-5)


def test_everything_that_does_not_fit_is_in_one_message(tokenizer: Path, tmp_path: Path) -> None:
    trained = drawn(tmp_path, tokenizer, exported_config("dense", RMS | SWIGLU | UNTIED))
    export(trained, tmp_path / "out")
    keys = {"hidden_size": 32, "vocab_size": 400, "num_key_value_heads": 2, "norm_eps": 0.1, "qk_norm": True}
    other = exported_config("dense", keys)
    with pytest.raises(UserError) as caught:
        check_source(open_source(tmp_path / "out"), other, trained.tokenizer)
    suggestions = {problem.where: problem.suggestion for problem in caught.value.problems}
    assert suggestions == {
        "model.hidden_size": "model.hidden_size=16",
        "model.vocab_size": "model.vocab_size=330",
        "model.num_key_value_heads": "model.num_key_value_heads=4",
        "model.head_dim": "model.head_dim=4",
        "model.norm_eps": "model.norm_eps=1e-05",
        "model.qk_norm": "model.qk_norm=false",
        "model.norm": "model.norm=rmsnorm",
        "model.activation": "model.activation=swiglu",
        "model.tie_embeddings": "model.tie_embeddings=false",
    }


def test_biases_and_another_tokenizer_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    trained = drawn(tmp_path, tokenizer, exported_config("dense"))
    export(trained, tmp_path / "out")
    path = tmp_path / "out/tokenizer.json"
    values = json.loads(path.read_text())
    swapped = {"a": values["model"]["vocab"]["e"], "e": values["model"]["vocab"]["a"]}
    values["model"]["vocab"] |= swapped
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        check_source(open_source(tmp_path / "out"), exported_config("dense", NO_BIAS), trained.tokenizer)
    found = {problem.where: problem.found for problem in caught.value.problems}
    assert found.keys() == {"model.bias", "data.tokenizer"}
    assert "2 of its 330 pieces" in found["data.tokenizer"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "gpt2", "model_type is 'gpt2'"),
        ("model_type", "mistrall", "another type, such as mistral"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "the weights are quantised"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("sliding_window", 16, "sliding_window is 16"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, "rope_type is 'linear'"),
    ],
)
def test_what_our_models_lack_is_refused(key: str, value: Any, message: str, tokenizer: Path, tmp_path: Path) -> None:
    export(drawn(tmp_path, tokenizer, exported_config("dense")), tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "out")


def test_a_damaged_folder_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    config = exported_config("dense")
    export(drawn(tmp_path, tokenizer, config), tmp_path / "out")
    with pytest.raises(UserError, match=r"no readable config\.json"):
        open_source(tmp_path)
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"no readable model\.safetensors"):
        open_source(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lm_head.weight", torch.ones(5, 5), r"lm_head\.weight has shape \[5, 5\]"),
        ("model.layers.0.mlp.c_fc.weight", torch.ones(48, 16, dtype=torch.int8), "stored as int8"),
        ("model.layers.0.mlp.c_fc.weight", torch.full((48, 16), torch.nan), "not finite"),
    ],
)
def test_weights_that_cannot_be_taken_are_refused(name, value, message, tokenizer: Path, tmp_path: Path) -> None:
    config = exported_config("lowrank", UNTIED)
    export(drawn(tmp_path, tokenizer, exported_config("dense", UNTIED)), tmp_path / "out")
    path = tmp_path / "out/model.safetensors"
    save_file(load_file(path) | {name: value}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        first_weights(open_source(tmp_path / "out"), config)


@pytest.mark.parametrize("config", ["[]", '{"model_type": "llama", "num_attention_heads": "four"}'])
def test_a_config_that_transformers_refuses(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"config\.json"):
        open_source(tmp_path)


def written_config(folder: Path, config: Config, tokenizer: Path) -> Path:
    data = {"kind": "text", "path": str(folder), "tokenizer": str(tokenizer)}
    values = config.model_copy(update={"data": config.data.model_copy(update=data)})
    (folder / "config.yaml").write_text(dump_config(values))
    return folder / "config.yaml"


@pytest.mark.parametrize("guided", ["off", "fixedstep"])
def test_the_command_writes_a_checkpoint_of_step_0(guided: str, tokenizer: Path, tmp_path: Path, capsys: Any) -> None:
    """It holds everything that training loads: masters, the optimizer's state, and the guides if there are any."""
    source = drawn(tmp_path, tokenizer, exported_config("dense"))
    export(source, tmp_path / "out")
    config = exported_config("lowrank", run={"folder": str(tmp_path / "runs")}, guided={"schedule": guided})
    arguments = [str(tmp_path / "out"), str(written_config(tmp_path, config, tokenizer))]
    import_model.main(arguments)
    printed = capsys.readouterr().out
    assert "blocks.1.mlp.fc2: relative error 0." in printed and "all projected linears" in printed
    run = tmp_path / "runs/tiny"
    checkpoint = run / "checkpoints/step_00000000"
    assert load_state(checkpoint)["step"] == 0
    assert origin(run) == {"kind": "huggingface", "folder": str((tmp_path / "out").absolute())}
    expected = first_weights(open_source(tmp_path / "out"), config).tensors
    guides = [name for name in expected if "guide" in name]
    assert len(guides) == (4 if guided == "fixedstep" else 0)
    found = {f"{kind}.{name}": torch.ones_like(t) for name, t in expected.items() for kind in ("master", "exp_avg_sq")}
    load_tensors(checkpoint, found)
    for name, tensor in expected.items():
        assert torch.equal(found[f"master.{name}"], tensor) and not found[f"exp_avg_sq.{name}"].any()
    for name in guides:
        dense = source.model.get_submodule(name.removesuffix("_guide.weight")).weight
        assert torch.equal(expected[name], dense)
    export_command.main([str(run), str(tmp_path / "again"), "--allow-guided"])
    assert f"trained from the weights of `{tmp_path / 'out'}`" in (tmp_path / "again/README.md").read_text()
    model, _ = load_model(run, "cpu", allow_guided=True)
    assert torch.equal(model.get_submodule("blocks.0.mlp.fc1").u, expected["blocks.0.mlp.fc1.u"])

    with pytest.raises(SystemExit) as exit_:
        import_model.main(arguments)
    assert exit_.value.code == 2
    assert "run.name=tiny-2" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny"]
