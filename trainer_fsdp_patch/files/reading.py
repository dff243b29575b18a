"""Reads adapter files and Trainer checkpoints from disk without running what a pickle may hold."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.names import canonical, file_key

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import Metadata

SAFE, PICKLED, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
FSDP_FULL, FSDP_SHARDED, FSDP_OPTIMIZER = "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0", "optimizer_0"
STATE = "trainer_state.json"

Json = dict[str, object]
"""A JSON object."""

_METADATA = {
    "pathlib": {"PosixPath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed._shard.metadata": {"ShardMetadata"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""All that the index of a torch distributed checkpoint is made of, dtypes aside."""


class _Index(pickle.Unpickler):
    """Reads the index of a distributed checkpoint; torch's own reader would run any pickle."""

    def find_class(self, module: str, name: str) -> object:
        import torch

        # Python 3.13 alone writes paths so, and other releases have no such module.
        module = "pathlib" if module == "pathlib._local" else module
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def adapter_file(folder: Path) -> Path | None:
    """The file that holds an adapter's tensors, or None."""
    return next((folder / name for name in (SAFE, PICKLED) if (folder / name).is_file()), None)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that a Trainer has written into its folder, the newest first."""
    steps = {item: re.fullmatch(r"checkpoint-(\d+)", item.name) for item in folder.iterdir() if item.is_dir()}
    return sorted((item for item in steps if steps[item]), key=lambda item: int(item.name[11:]), reverse=True)


def adapter_folders(folder: Path) -> list[Path]:
    """The folder and those below it that hold an adapter: peft gives every adapter but the default one its own."""
    runs = checkpoints(folder)
    below = sorted(item for item in folder.iterdir() if item.is_dir() and item not in runs)
    return [item for item in (folder, *below) if adapter_file(item) or (item / CONFIG).is_file()]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of an adapter file or of a pickled state dict, on the CPU.

    Args:
        path: of a safetensors file, or of a pickle, which is read with weights_only.

    Raises:
        AdapterError: it is truncated, foreign, or holds something else than tensors.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise unreadable(path, error) from error
    if not isinstance(loaded, dict) or not all(isinstance(item, torch.Tensor) for item in loaded.values()):
        raise unreadable(path, TypeError("it is no dictionary of tensors"))
    return loaded


def fsdp_part(folder: Path) -> dict[str, torch.Tensor]:
    """The model part of a resume checkpoint, from full or sharded files; {} where there is none.

    Args:
        folder: of the checkpoint.

    Raises:
        AdapterError: it is truncated, foreign, or holds something else than tensors.
    """
    if (folder / FSDP_FULL).is_file():
        return read_tensors(folder / FSDP_FULL)
    if not (folder / FSDP_SHARDED).is_dir():
        return {}
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        return _sharded(folder / FSDP_SHARDED)
    # This one is no Exception: a damaged shard would get past all who take those. It holds what each rank raised.
    except CheckpointException as error:
        [(cause, _), *_] = error.failures.values()
        raise unreadable(folder / FSDP_SHARDED, cause) from error
    except Exception as error:
        raise unreadable(folder / FSDP_SHARDED, error) from error


def index(folder: Path) -> Metadata:
    """What a distributed checkpoint says that it has.

    Args:
        folder: of the checkpoint.

    Raises:
        pickle.UnpicklingError: it names what no such checkpoint does.
    """
    with (folder / ".metadata").open("rb") as file:
        known: Metadata = _Index(file).load()
    return known


def _sharded(folder: Path) -> dict[str, torch.Tensor]:
    import warnings

    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load, load_state_dict

    known = index(folder)

    class Reader(FileSystemReader):
        def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
            return known

    entries = known.state_dict_metadata.items()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(), _weights_only():
        # It says that no process group exists, which is so.
        warnings.simplefilter("ignore")
        # until torch 2.3: `load` asks for a process group
        if versions.at_least("torch", "2.3.0"):
            load(tensors, storage_reader=Reader(folder))
        else:
            load_state_dict(tensors, Reader(folder), no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Have torch read shards as tensors and nothing else.

    torch 2.2 reads each shard of a distributed checkpoint by a plain `torch.load`, which runs what the pickle names.
    Its reader takes no argument for that; the variable reaches every `torch.load` of the process, for as long.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def text(path: Path) -> Json:
    """A JSON file.

    Args:
        path: of the file.

    Raises:
        AdapterError: it is absent, truncated, or no object.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError("it is no JSON object")
    except (OSError, ValueError, TypeError) as error:
        raise unreadable(path, error) from error
    return content


def unreadable(path: Path, error: BaseException) -> AdapterError:
    """Error that says what is wrong with a file.

    Args:
        path: of the file.
        error: what its reader raised.
    """
    why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return AdapterError(
        str(path),
        f"cannot be read: {why}",
        "Nothing was loaded from it",
        "Take the file of another save; `python -m trainer_fsdp_patch verify` tells which are complete",
    )


def adapter_only(folder: Path, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The adapter's part of what a run resumes from, by the keys of an adapter file.

    Args:
        folder: of the checkpoint.
        adapter: name of the adapter. The keys of a model's state dict have it, and those of a file have not.

    Returns:
        Tensors on the CPU; {} where there is no such part or where it cannot be read.
    """
    try:
        tensors = {canonical(key): tensor for key, tensor in fsdp_part(folder).items()}
    except AdapterError:
        return {}
    live = {key: tensor for key, tensor in tensors.items() if adapter in key.split(".")}
    tensors = {file_key(key, adapter): tensor for key, tensor in live.items()} if live else tensors
    # What all layers share stands in a model's state dict once for each layer, and in a file once.
    shared = {key.removeprefix("base_model.") for key in tensors if key.count(".") == 1}
    return {
        key: tensor for key, tensor in tensors.items() if key.count(".") == 1 or key.rpartition(".")[2] not in shared
    }
