"""Reading with DCP (torch.distributed.checkpoint), without the two ways in which it could execute code.

DCP's metadata is a pickle. It is read by an unpickler that knows only the records of a checkpoint of tensors. And if
the metadata name a value that is not a tensor, DCP would unpickle it; here that is refused. DCP reads the tensors
themselves with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

_DCP = "torch.distributed.checkpoint"
_NAMES = {
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),  # DCP notes where it wrote; the path is never used
    ("pathlib._local", "PosixPath"),
}


class SafeFileSystemReader(dcp.FileSystemReader):
    """DCP's reader with an unpickler for `.metadata` that builds only the records of tensors.

    `read_metadata` raises pickle.UnpicklingError for anything else.
    """

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = _MetadataUnpickler(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{type(metadata).__name__} is not checkpoint metadata")
        storage = getattr(metadata, "storage_meta", None) or StorageMeta()
        storage.load_id = self.load_id
        metadata.storage_meta = storage
        return metadata


class TensorLoadPlanner(dcp.DefaultLoadPlanner):
    """DCP's planner, for tensors only."""

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in checkpoint metadata")
