"""What the engine uses of DeepSpeed's internals exists in the installed release, and nothing else is used anywhere."""

from __future__ import annotations

import ast
import base64
import json
import re
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.launcher import launch, runner

from configs import tiny_config
from megastruct.engine import internals
from megastruct.engine.config import deepspeed_config
from megastruct.engine.internals import INTERNALS, Internal, attribute_of, check_internals, missing_internals
from megastruct.errors import UserError
from megastruct.launch.deepspeed import LaunchOptions, decoded, deepspeed_command

PACKAGE = Path(internals.__file__).resolve().parents[1]
ENGINE = PACKAGE / "engine"


def test_the_installed_release_has_every_internal() -> None:
    assert missing_internals() == []


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: f"{internal.owner}: {internal.names[0]}")
def test_every_internal_in_the_table_is_used(internal: Internal) -> None:
    source = "\n".join(path.read_text() for path in ENGINE.glob("*.py") if path.name != "internals.py")
    for name in map(attribute_of, internal.names):
        assert re.search(rf"\b{re.escape(name)}\b", source), f"{name} is in the table and nowhere in engine/"


def test_a_release_without_one_is_named_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = Internal("deepspeed.runtime.bf16_optimizer:BF16_Optimizer", ("update_all_weights",), "write the weights")
    no_class = Internal("deepspeed.runtime.bf16_optimizer:BF17_Optimizer", ("step",), "step in bf17")
    monkeypatch.setattr(internals, "INTERNALS", (gone, no_class))
    check_internals.cache_clear()
    with pytest.raises(UserError) as raised:
        check_internals()
    check_internals.cache_clear()
    assert f"DeepSpeed {deepspeed.__version__} has no update_all_weights in" in str(raised.value)
    assert "used to write the weights" in str(raised.value) and "used to step in bf17" in str(raised.value)
    assert f"pip install '{internals.SUPPORTED}'" in str(raised.value)


@pytest.mark.parametrize(
    ("owner", "name", "renamed"),
    [
        ("deepspeed.runtime.pipe.module:PipelineModule", "_set_bounds(start, stop)", ("_set_bound", None)),
        ("deepspeed.runtime.pipe.engine:PipelineEngine", "eval_batch(num_micro_batches)", (None, "micro_batches")),
        (
            "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer",
            "averaged_gradients",
            ("averaged_grad", None),
        ),
        ("deepspeed.runtime.zero.partition_parameters", "ds_tensor", ("ds_tenso", None)),
        ("deepspeed.utils.tensor_fragment:tensor_fragment", "hp_fragment", ("hp_fragment_addres", None)),
    ],
)
def test_a_new_name_or_argument_is_noticed(
    monkeypatch: pytest.MonkeyPatch, owner: str, name: str, renamed: tuple[str | None, str | None]
) -> None:
    """A method, an argument, attributes that are set by code. The beginning of a name that exists is not the name."""
    attribute, argument = renamed
    after = name.replace(attribute_of(name), attribute) if attribute else name.replace("num_micro_batches", argument)
    monkeypatch.setattr(internals, "INTERNALS", (Internal(owner, (name,), "train"),))
    assert missing_internals() == []
    monkeypatch.setattr(internals, "INTERNALS", (Internal(owner, (after,), "train"),))
    [line] = missing_internals()
    assert (attribute or f"no argument {argument} of eval_batch") in line and "used to train" in line


def test_every_key_of_its_config_arrives() -> None:
    """DeepSpeed passes over keys that it does not know: a renamed one would change what is computed."""
    config = tiny_config(training={"precision": "bf16"}, optimizer={"gradient_clipping": 0.25})
    found = deepspeed.DeepSpeedConfig({**deepspeed_config(config, 2, 1000), "train_batch_size": 8})
    assert (found.train_micro_batch_size_per_gpu, found.gradient_accumulation_steps) == (2, 4)
    assert (found.zero_config.stage, found.zero_config.reduce_bucket_size) == (1, 1000)
    assert found.zero_allow_untested_optimizer and found.gradient_clipping == 0.25
    assert found.bfloat16_config.enabled and found.bfloat16_config.check_grad_overflow
    assert (found.grad_accum_dtype, found.communication_data_type) == ("fp32", torch.float32)
    assert not found.pipeline["pipe_partitioned"] and not found.pipeline["grad_partitioned"]
    assert found.steps_per_print == 2**62


def test_its_launcher_for_all_nodes_takes_our_command_line(tmp_path: Path) -> None:
    options = LaunchOptions(hostfile="hosts", num_gpus=4, master_port=12345)
    command = deepspeed_command(options, ["config.yaml", "model.num_layers=2"], tmp_path / "stop")
    assert command[2:4] == ["-m", "megastruct.launch.launcher"] and command[5] == str(tmp_path / "stop")
    assert command[6] == "deepspeed.launcher.runner"
    parsed = runner.parse_args(command[7:])
    assert (parsed.user_script, parsed.module, parsed.no_local_rank) == ("megastruct.train", True, True)
    assert (parsed.hostfile, parsed.num_gpus, parsed.master_port) == ("hosts", 4, 12345)
    assert decoded(parsed.user_args) == ["config.yaml", "model.num_layers=2"] and parsed.log_level == "critical"


UUID = "GPU-11111111-2222-3333-4444-555555555555"


@pytest.mark.parametrize(
    ("visible", "options", "devices"),
    [
        ("", LaunchOptions(num_gpus=2, master_port=12345), {"localhost": [0, 1]}),
        ("5, 6,7", LaunchOptions(num_gpus=2), {"localhost": [5, 6]}),
        (f"{UUID},MIG-1", LaunchOptions(num_gpus=2), {"localhost": [UUID, "MIG-1"]}),
        ("3", LaunchOptions(num_gpus=2), {"localhost": [0, 1]}),
        (UUID, LaunchOptions("hosts", node_rank=1, master_addr="a"), {"me@node1": [0, 1], "node2": [UUID]}),
        ("", LaunchOptions("hosts", 3, 1, 0, "a"), {"me@node1": [0, 1, 2]}),
    ],
)
def test_its_launcher_for_one_node_takes_our_command_line(
    visible: str,
    options: LaunchOptions,
    devices: dict[str, list[int | str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It gets the devices of this node by the names that the user gave them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    Path("hosts").write_text("me@node1 slots=2  # rack 3\nnode2 slots=1 max_slots=4\n")
    command = deepspeed_command(options, ["config.yaml", "model.num_layers=2"])
    assert command[5:7] == ["", "deepspeed.launcher.launch"]
    monkeypatch.setattr(sys, "argv", command[6:])
    parsed = launch.parse_args()
    assert (parsed.training_script, parsed.module, parsed.no_local_rank) == ("megastruct.train", True, True)
    assert json.loads(base64.urlsafe_b64decode(parsed.world_info)) == devices
    assert (parsed.node_rank, parsed.log_level) == (options.node_rank or 0, "critical")
    assert parsed.training_script_args == ["config.yaml", "model.num_layers=2"]


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def test_no_other_room_imports_deepspeed_or_touches_its_objects() -> None:
    """Elsewhere there is its launcher's command line, as words."""
    used = {attribute_of(name) for internal in INTERNALS for name in internal.names}
    names = {name for name in used if name.startswith(("_", "ds_", "fp16_", "fp32_", "hp_", "lp_"))}
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(ENGINE):
            continue
        assert "deepspeed" not in imports_of(path), path
        attributes = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not attributes & names, path


def test_private_names_of_deepspeed_stand_in_the_table() -> None:
    """Every underscore attribute that engine/ touches of an object that is not its own."""
    table = {attribute_of(name) for internal in INTERNALS for name in internal.names}
    for path in ENGINE.glob("*.py"):
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            is_own = isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in own
            of_torch = isinstance(node.value, ast.Attribute | ast.Name) and "torch" in ast.unparse(node.value)
            assert is_own or of_torch or node.attr in table, f"{path.name}:{node.lineno} {ast.unparse(node)}"
