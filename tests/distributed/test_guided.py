"""Self-guided training through real ranks: every layout trains as one process does, and the guides leave without a
trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bounds import within
from configs import tiny_config
from guided import first_losses, guided_config, interrupted_run, memory_of_the_end, whole_run
from marks import always, soak
from megastruct.checkpoint.store import checkpoint_folder, load_tensors
from megastruct.config.load import dump_config
from megastruct.errors import UserError
from megastruct.inference.load import load_model
from megastruct.parallel.topology import Topology
from megastruct.run.run_folder import RunFolder
from ranks import run_ranks

BOUNDS = {"fp32": 1e-5, "bf16": 3e-2}
ALONE = Topology(1, 1)
LAYOUTS = [(Topology(2, 1), 1), (Topology(1, 2), 0), (Topology(2, 2), 1), (Topology(1, 2), 2), (Topology(1, 2), 3)]
LAYOUTS += [(Topology(1, 1, 2), 1), (Topology(2, 1, 2), 1), (Topology(1, 2, 2), 2)]


def run(folder: Path, topology: Topology, zero: int = 1, keep_guides: bool = False, **sections: Any) -> Any:
    sections["run"] = {"folder": str(folder / f"{topology}{zero}{keep_guides}"), **sections.get("run", {})}
    results = run_ranks(
        topology.world_size, whole_run, guided_config(topology, zero, **sections), topology, keep_guides
    )
    assert all(result == results[0] for result in results), "ranks disagree"
    return results[0]


def furthest(results: Any, wanted: Any) -> float:
    return max(abs(loss - other) for (loss, _), (other, _) in zip(results, wanted, strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> Callable[[str], Any]:
    """What one process trains with a way to skip, made once for each."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda skip: run(folder / skip, ALONE, guided={"skip": skip}))


@pytest.mark.parametrize(
    ("topology", "zero"),
    always(LAYOUTS, [(Topology(2, 1, 2), 1)]),  # (1, 2) with ZeRO 3: test_a_guided_run_goes_on_in_another_layout
    ids=str,
)
def test_every_layout_trains_as_one_process_does(tmp_path: Path, alone: Any, topology: Topology, zero: int) -> None:
    assert within(furthest(run(tmp_path, topology, zero), alone("rows")), BOUNDS["fp32"], "loss")


@pytest.mark.parametrize(
    ("skip", "topology", "zero"),
    [
        ("coin", Topology(2, 2), 1),
        soak("none", Topology(1, 2), 3),
        soak("coin", Topology(1, 2), 3),
        soak("none", Topology(2, 2), 1),
    ],
    ids=str,
)
def test_every_way_to_skip(tmp_path: Path, alone: Any, skip: str, topology: Topology, zero: int) -> None:
    assert within(furthest(run(tmp_path, topology, zero, guided={"skip": skip}), alone(skip)), BOUNDS["fp32"], "loss")


@pytest.mark.parametrize("structure", [soak("blockdense"), soak("blockshuffle")])
def test_block_structures_over_tensor_ranks(tmp_path: Path, structure: str) -> None:
    wanted = run(tmp_path, ALONE, structure=structure)
    assert within(furthest(run(tmp_path, Topology(2, 1, 2), structure=structure), wanted), BOUNDS["fp32"], "loss")


@pytest.mark.parametrize(("topology", "zero"), [(Topology(2, 1, 2), 1), soak(Topology(1, 1, 2), 3)], ids=str)
@pytest.mark.parametrize("structure", ["lowrank", "blockdense", "blockshuffle"])
def test_at_the_start_alpha_changes_nothing(topology: Topology, zero: int, structure: str) -> None:
    without, some, all_of_it = run_ranks(
        topology.world_size, first_losses, guided_config(topology, zero, structure), topology
    )[0]
    assert some == pytest.approx(without, abs=1e-6) and all_of_it == pytest.approx(without, abs=1e-6)


@pytest.mark.parametrize("topology", [soak(Topology(2, 2)), soak(Topology(1, 1, 2))], ids=str)
def test_bf16(tmp_path: Path, topology: Topology) -> None:
    low = {"training": {"precision": "bf16"}}
    assert within(furthest(run(tmp_path, topology, **low), run(tmp_path, ALONE, **low)), BOUNDS["bf16"], "loss")


def test_the_guide_matters(tmp_path: Path, alone: Any) -> None:
    """The comparisons can fail: without a guide, or by another choice of rows, the losses are others."""
    off = run_ranks(1, whole_run, tiny_config(run={"folder": str(tmp_path)}, training={"global_batch_size": 8}), ALONE)
    assert furthest(off[0], alone("rows")) > 1e-2
    assert furthest(alone("coin"), alone("rows")) > 1e-3


NO_CLIPPING = {"optimizer": {"gradient_clipping": 0.0}}


AFTER = [(*layout, "fp32") for layout in [(ALONE, 1), *LAYOUTS[:6]]]
AFTER += [(*layout, "bf16") for *layout, _ in AFTER if layout[1]]  # bf16 with ZeRO 0 is refused
ALWAYS = [(Topology(1, 2), 2, "bf16")]


@pytest.mark.parametrize(("topology", "zero", "precision"), always(AFTER, ALWAYS), ids=str)
def test_after_the_border_the_run_is_that_of_a_guide_that_is_never_evaluated(
    tmp_path: Path, topology: Topology, zero: int, precision: str
) -> None:
    """Bit for bit. Clipping is off: the norm's last bit depends on where ZeRO cuts its partitions."""
    sections = {**NO_CLIPPING, "training": {"precision": precision}}
    left, kept = (run(tmp_path, topology, zero, keep, **sections) for keep in (False, True))
    assert [loss for loss, _ in left] == [loss for loss, _ in kept]
    assert all(abs(a - b) <= 1e-6 * b for (_, a), (_, b) in zip(left, kept, strict=True))


@pytest.mark.parametrize("last", always([9, 10, 11], [10]))
def test_resume_around_the_border_of_pipelines(tmp_path: Path, last: int) -> None:
    interrupted_is_undisturbed(tmp_path, Topology(2, 2), 1, last)


@pytest.mark.parametrize("last", always([9, 10, 11], [10]))
@pytest.mark.parametrize("zero", [soak(2), soak(3)])
def test_resume_around_the_border(tmp_path: Path, zero: int, last: int) -> None:
    interrupted_is_undisturbed(tmp_path, Topology(1, 2), zero, last)


def interrupted_is_undisturbed(tmp_path: Path, topology: Topology, zero: int, last: int) -> None:
    undisturbed = run(tmp_path / "whole", topology, zero)
    config = guided_config(topology, zero, run={"folder": str(tmp_path)})
    first = run_ranks(topology.world_size, interrupted_run, config, topology, last)[0]
    rest = run_ranks(topology.world_size, whole_run, config, topology)[0]
    assert first + rest == undisturbed


@pytest.mark.parametrize("last", always([18, 20, 23, 25, 27], [23]))
def test_resume_around_and_inside_the_repeated_part(tmp_path: Path, last: int) -> None:
    flop = {"guided": {"schedule": "fixedflop", "fraction": 0.4}}  # 8 guided steps, 20 base steps, 28 in all
    undisturbed = run(tmp_path / "whole", ALONE, **flop)
    assert len(undisturbed) == 28
    config = guided_config(ALONE, run={"folder": str(tmp_path)}, **flop)
    first = run_ranks(1, interrupted_run, config, ALONE, last)[0]
    assert first + run_ranks(1, whole_run, config, ALONE)[0] == undisturbed


@pytest.mark.parametrize(
    ("before", "after", "zero"),
    [soak(Topology(2, 2), Topology(1, 1, 2), 1), (Topology(1, 1, 2), Topology(1, 2), 3)],
    ids=str,
)
@pytest.mark.parametrize("last", [5, soak(10)])
def test_a_guided_run_goes_on_in_another_layout(
    tmp_path: Path, alone: Any, before: Topology, after: Topology, zero: int, last: int
) -> None:
    folder = {"run": {"folder": str(tmp_path)}}
    first = run_ranks(before.world_size, interrupted_run, guided_config(before, **folder), before, last)[0]
    rest = run_ranks(after.world_size, whole_run, guided_config(after, zero, **folder), after)[0]
    assert within(furthest(first + rest, alone("rows")), BOUNDS["fp32"], "loss")


WIDE = {"model": {"hidden_size": 128, "ffn_hidden_size": 512}, "training": {"num_steps": 4}}


@pytest.mark.parametrize(
    ("topology", "zero"), [soak(ALONE, 0), (ALONE, 1), soak(ALONE, 2), soak(ALONE, 3), (Topology(2, 2), 1)]
)
def test_the_end_frees_the_guides(tmp_path: Path, topology: Topology, zero: int) -> None:
    """The weight, and what ZeRO has put on this rank of the fp32 master (in ZeRO 0 the weight itself) and moments."""
    config = guided_config(topology, zero, run={"folder": str(tmp_path)}, **WIDE)
    ranks = run_ranks(topology.world_size, memory_of_the_end, config, topology)
    assert any(guides >= 2 * 128 * 512 for guides, *_ in ranks)
    for guides, before, after, report in ranks:
        bytes_per_guide = 4 + (12 if zero else 8) / topology.dp_size
        assert before - after >= bytes_per_guide * guides - 4096  # a stage of dense blocks has no guides
        assert report["step"] == 2 and len(report["ranks"]) == topology.world_size
        assert all(rank["before_bytes"] > 0 and rank["after_bytes"] > 0 for rank in report["ranks"])


def test_checkpoints_hold_guides_inside_the_phase_only_and_serving_asks(tmp_path: Path) -> None:
    config = guided_config(ALONE, run={"folder": str(tmp_path)})
    run_ranks(1, interrupted_run, config, ALONE, 9)
    (tmp_path / "tiny" / "config.yaml").write_text(dump_config(config))
    guide = {"master.blocks.1.mlp.fc1_guide.weight": torch.empty(48, 16)}
    load_tensors(checkpoint_folder(RunFolder(config).checkpoints, 9), guide)
    with pytest.raises(UserError, match=r"inside the guided phase \(step 9 of 10\)"):
        load_model(tmp_path / "tiny")
    model, _ = load_model(tmp_path / "tiny", "cpu", allow_guided=True)
    assert not any("guide" in name for name, _ in model.named_parameters())
    run_ranks(1, interrupted_run, config, ALONE, 10)
    with pytest.raises(UserError, match="missing"):
        load_tensors(checkpoint_folder(RunFolder(config).checkpoints, 10), guide)
    load_model(tmp_path / "tiny")
