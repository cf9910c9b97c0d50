"""A rank's part of a global tensor, in the form that torch.distributed.checkpoint writes and reads.

DCP asks a tensor for its pieces by a protocol of three methods (torch/distributed/_checkpointable.py; DTensor has them
too). Here the pieces are the cuboids of a `ShardSpec`, so that also what a DTensor cannot express has its global form:
a dimension in several parts, cuts in two dimensions, rows that are padding on the last rank and in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megastruct.parallel.shards import Box


class ShardedTensor(torch.Tensor):
    """A local tensor that knows the global tensor's shape and the cuboids (`Box`) that it holds of it."""

    global_shape: torch.Size
    boxes: list[Box]

    @classmethod
    def of(cls, local: Tensor, global_shape: Sequence[int], boxes: list[Box]) -> ShardedTensor:
        """A view of `local`; what is in no box (padding) is neither written nor read."""
        sharded = local.detach().as_subclass(cls)
        sharded.global_shape = torch.Size(global_shape)
        sharded.boxes = [box for box in boxes if all(box.sizes)]
        return sharded

    def size(self, dim: int | None = None) -> Any:
        """The global size, which DCP compares with the stored one."""
        return self.global_shape if dim is None else self.global_shape[dim]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.as_subclass(torch.Tensor))
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.global_shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.global_offsets), torch.Size(box.sizes)) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        box = next(box for box in self.boxes if torch.Size(box.global_offsets) == index.offset)
        piece = self.as_subclass(torch.Tensor)
        for dim, (offset, size) in enumerate(zip(box.local_offsets, box.sizes, strict=True)):
            piece = piece.narrow(dim, offset, size)
        return piece


def global_shape(tensor: Tensor) -> torch.Size:
    """The shape under which a checkpoint knows the tensor."""
    return tensor.global_shape if isinstance(tensor, ShardedTensor) else tensor.shape
