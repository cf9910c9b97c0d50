"""`reliability.deterministic`: the same bits in every run on the same devices.

Random choices are hashes of names and counters anyway. What is left is the order in which devices add: by atomic
additions, in libraries that choose or split their work by what they measure, and in networks that sum.
"""

from __future__ import annotations

import os

import torch

# cuBLAS keeps one workspace per stream of these sizes (KiB, number); otherwise streams may share one in any order.
WORKSPACES = (":4096:8", ":16:8")
# An all-reduce sums in the order of its algorithm. NCCL chooses one for each size from a model of the machine, among
# them NVLS, which sums in the switch. Ring exists for every operation and machine and sums along the ring; Simple is
# the protocol that every kind of link has.
NCCL = {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}


def make_deterministic() -> None:
    """Have this process compute deterministically from now on. To be called before it uses a GPU or NCCL.

    An operation that has no deterministic form raises RuntimeError. Variables of the environment that choose NCCL's
    algorithm already keep it, for a choice of the user is as fixed as ours.
    """
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = WORKSPACES[0]
    for name, value in NCCL.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)  # Inductor then measures nothing to choose a kernel, either
    # It is for finding reads of uninitialised memory, which the tests do; it costs a write of all memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward has no deterministic form; the other kernels have one
