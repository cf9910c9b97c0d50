"""What the engine uses of DeepSpeed's internals exists in the installed release, and nothing else is used anywhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.launcher.runner import parse_args

from configs import tiny_config
from megastruct.engine import internals
from megastruct.engine.config import deepspeed_config
from megastruct.engine.internals import INTERNALS, Internal, attribute_of, check_internals, missing_internals
from megastruct.errors import UserError
from megastruct.launch.deepspeed import LaunchOptions, deepspeed_command

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


@pytest.mark.parametrize(
    "options",
    [
        LaunchOptions(num_gpus=2, master_port=12345),
        LaunchOptions(hostfile="hosts", num_nodes=2, node_rank=1, master_addr="node1"),
        LaunchOptions(hostfile="hosts", num_gpus=4),
    ],
)
def test_its_launcher_takes_our_command_line(options: LaunchOptions) -> None:
    command = deepspeed_command(options, ["config.yaml", "model.num_layers=2"])
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    parsed = parse_args(command[3:])
    assert (parsed.user_script, parsed.module, parsed.no_local_rank) == ("megastruct.train", True, True)
    assert parsed.hostfile == (options.hostfile or "") and parsed.node_rank == (options.node_rank or -1)
    assert parsed.no_ssh == (options.node_rank is not None) and parsed.log_level == "error"
    assert len(parsed.user_args) == (1 if options.by_ssh else 2)


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
