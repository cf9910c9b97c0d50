"""Estimate what a config costs: megastruct-plan configs/run/xl_lowrank_32.yaml parallel.pp=2."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from megastruct.config import load_config
from megastruct.console import command
from megastruct.errors import user_errors_exit
from megastruct.planning.memory import PARTS
from megastruct.planning.plan import make_plan, suggest
from megastruct.planning.steps import equal_flops_steps
from megastruct.planning.words import count


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Print parameters, FLOPs, memory and traffic of a config. A user's mistake exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file, for example configs/run/xl_lowrank_32.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--num-gpus", type=int, metavar="N", help="number of devices in all (default: one replica, or parallel.dp)"
    )
    parser.add_argument(
        "--ffn-share", type=float, metavar="SHARE", help="suggest sizes with this share of the dense FFN's weights"
    )
    parser.add_argument("--dense", metavar="CONFIG", help="config whose training FLOPs a self-guided run is to match")
    parser.add_argument(
        "--match-flops", metavar="CONFIG", help="say which training.num_steps costs the training FLOPs of this config"
    )
    parser.add_argument("--json", action="store_true", help="print all numbers, unrounded, as JSON")
    args = parser.parse_intermixed_args(argv)
    with user_errors_exit():
        config = load_config(args.config, args.overrides)
        plan = make_plan(config, args.num_gpus, load_config(args.dense) if args.dense else None)
        if args.ffn_share is not None:
            plan["suggestions"] = suggest(config, args.ffn_share)
        if args.match_flops is not None:
            other = load_config(args.match_flops)
            plan["match_flops"] = {"name": other.run.name, "num_steps": equal_flops_steps(config, other)}
    print(json.dumps(plan, indent=2) if args.json else report(plan))


def report(plan: dict[str, Any]) -> str:
    """The dict of `make_plan` as aligned tables: memory in GiB, traffic in GB."""
    layout = plan["layout"]
    sections = [
        _table(
            [
                ("model", plan["name"]),
                ("parameters", count(plan["parameters"])),
                (
                    "in the FFN",
                    f"{count(plan['ffn_parameters'])}, {plan['ffn']['share']:.1%} of dense",
                ),
                ("structure", " ".join(f"{k} {v}" for k, v in plan["ffn"].items() if k != "share")),
                ("tokens", count(plan["tokens"])),
                ("steps", _steps(**plan["steps"])),
                ("training FLOPs", f"{plan['training_flops']:.3g}"),
                *_optimizer_row(plan),
                *_matched_row(plan),
                ("forward FLOPs", ", ".join(f"{_words(k)} {v:.1%}" for k, v in plan["flops_share"].items())),
                ("guided fraction", f"{plan['guided_fraction']:.3f} (FLOP-matched self-guided run)"),
                ("layout", " x ".join(f"{k} {v}" for k, v in layout.items() if k != "devices")),
                ("micro-batches", f"{plan['micro_batches_per_step']} per step and replica"),
            ]
        ),
        "Memory per device, GiB\n" + _memory_table(plan["stages"]),
        "Sent per device and step, GB\n" + _traffic_table(plan["stages"]),
    ]
    if layout["tp"] > 1:
        sections.append("Sent per device and token by the forward pass of one linear, bytes\n" + _linear_table(plan))
    if "suggestions" in plan:
        rows = [
            [f"{row['share']:.1%}", " ".join(f"ffn.{key}={value}" for key, value in row.items() if key != "share")]
            for row in plan["suggestions"]
        ]
        sections.append("Nearest to the requested share of the FFN\n" + _table(rows))
    if plan["warnings"]:
        sections.append("\n".join(f"warning: {text}" for text in plan["warnings"]))
    return "\n\n".join(sections)


def _matched_row(plan: dict[str, Any]) -> list[tuple[str, str]]:
    matched = plan.get("match_flops")
    return [("equal FLOPs", f"training.num_steps={matched['num_steps']}, as {matched['name']}")] if matched else []


def _optimizer_row(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The matrix products of the optimizer's steps, which are no model FLOPs; nothing if it has none."""
    per_step, stages = plan["optimizer_flops_per_step"], plan["stages"]
    if not per_step:
        return []
    most = max(stage["optimizer_flops"]["busiest_device"] for stage in stages)
    share = per_step * plan["steps"]["total"] / plan["training_flops"]
    return [("optimizer FLOPs", f"{per_step:.3g} per step ({share:.2%}), {most:.3g} on the busiest device")]


def _memory_table(stages: list[dict[str, Any]]) -> str:
    rows = [["stage", "layers", "parameters", "per device", "FLOPs", *PARTS, "total"]]
    for stage in stages:
        memory = [*(stage["memory_bytes"][part] for part in PARTS), stage["total_memory_bytes"]]
        first, last = stage["layers"]
        rows.append(
            [
                str(stage["stage"]),
                f"{first} - {last}",
                count(stage["parameters"]),
                count(stage["parameters_per_device"]),
                f"{stage['flops_share']:.1%}",
                *(f"{value / 2**30:.2f}" for value in memory),
            ]
        )
    return _table(rows)


def _traffic_table(stages: list[dict[str, Any]]) -> str:
    """One row per kind and purpose for which at least one stage sends something."""
    kinds = [(kind, purpose) for kind, purposes in stages[0]["traffic_bytes_per_step"].items() for purpose in purposes]
    rows = [["", *(f"stage {stage['stage']}" for stage in stages)]]
    for kind, purpose in kinds:
        sent = [stage["traffic_bytes_per_step"][kind][purpose] for stage in stages]
        if any(sent):
            rows.append([f"{_words(kind)}: {_words(purpose)}", *(f"{value / 1e9:.2f}" for value in sent)])
    return _table(rows) if len(rows) > 1 else "nothing"


def _linear_table(plan: dict[str, Any]) -> str:
    rows = [["", "fc1", "fc2"]]
    found = {plan["ffn"]["structure"]: "ffn_linear_bytes_per_token", "dense": "dense_linear_bytes_per_token"}
    rows += [[name, *(f"{plan[key][linear]:g}" for linear in ("fc1", "fc2"))] for name, key in found.items()]
    return _table(rows)


def _table(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _steps(total: int, guided: int) -> str:
    return f"{total:,}" if not guided else f"the first {guided:,} of {total:,} guided"


def _words(name: str) -> str:
    return name.replace("_", " ")
