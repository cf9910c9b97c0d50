"""A folder that is whole or absent: it is written beside its place and renamed when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from megastruct.errors import Problem, UserError
from megastruct.files import sync_folder

MAX_SHARD_SIZE = "5GB"  # of one weight file, as transformers writes them


def check_output(output: Path) -> None:
    """Raises UserError if something is at `output` already; an empty folder may be, but not the current one."""
    if output.resolve() == Path.cwd():
        raise UserError(Problem(str(output), "is the current folder, which cannot be replaced", "exported"))
    if not output.exists():
        return
    if not output.is_dir() or any(output.iterdir()):
        found = "is not empty" if output.is_dir() else "is a file"
        raise UserError(Problem(str(output), f"{found}, and an export does not overwrite", f"{output}-2"))


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that becomes `output` at the end; after an error it is removed.

    All files get the permissions that the umask gives to new files. Raises UserError if the disk refuses anything.
    """
    output = output.resolve()  # what a link points to, and not the link, is replaced
    aside = output.with_name(f".{output.name}.writing")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        aside.mkdir()
        mode = aside.stat().st_mode & 0o666  # safetensors makes its files for their owner only
        yield aside
        for file in sorted(path for path in aside.iterdir() if path.is_file()):
            file.chmod(mode)
            _sync(file)
        sync_folder(aside)
        os.replace(aside, output)
        sync_folder(output.parent)
    except OSError as error:
        found = f"could not be written: {error.strerror or error}"
        raise UserError(Problem(str(output), found, "free some space, or give another folder")) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write CPU tensors as model.safetensors, or as numbered files and their index if they are large.

    Raises OSError if a file cannot be written, and UserError if the libraries are not installed.
    """
    try:
        from huggingface_hub import save_torch_state_dict
        from safetensors import SafetensorError
    except ModuleNotFoundError as error:
        raise UserError(Problem(f"{error.name}", "not installed", "pip install 'megastruct[huggingface]'")) from None
    try:
        save_torch_state_dict(dict(tensors), folder, max_shard_size=MAX_SHARD_SIZE, metadata={"format": "pt"})
    except SafetensorError as error:  # what the system refused is in its text only
        raise OSError(str(error)) from None


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
