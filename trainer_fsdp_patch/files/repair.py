"""Mends what can be mended of an adapter file or checkpoint: `python -m trainer_fsdp_patch repair PATH --out DIR`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch import bits
from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.files import reading, verify
from trainer_fsdp_patch.names import canonical

if TYPE_CHECKING:
    import torch

REASONS = {
    "unreadable": "bytes that are gone cannot be brought back",
    "missing": "the tensors are nowhere in this folder",
    "empty": "the tensors are nowhere in this folder",
    "partial": "the missing layers are nowhere in this folder",
    "no-element": "each rank held a part, and that of one rank was written",
    "one-rank": "each rank held a part, and that of one rank was written",
    "not-finite": "the values were lost in training",
    "zero": "a tensor that was never trained looks like one that was lost",
    "no-config": "give the configuration with --config FILE",
    "rounded": "the adapter was trained with the rounded projections, other ones would change what it does",
    "incomplete": "a run cannot resume from it; its adapter may still be complete",
}
"""Why a fault is not mended."""


def repair_path(where: Path, out: Path, config: Path | None = None) -> tuple[list[str], list[verify.Finding]]:
    """Write a mended copy of every adapter of a folder.

    Args:
        where: an adapter file, the folder of one, or a checkpoint.
        out: folder for the copies; it has no adapter yet.
        config: adapter_config.json for adapters that have none, or None.

    Returns:
        What was done, and what is still wrong with the copies.

    Raises:
        AdapterError: there is nothing to repair at this place, or `out` would be overwritten.
    """
    if out.exists() and reading.adapter_folders(out):
        raise AdapterError(
            str(out), "holds an adapter", "Nothing was written: it would be replaced", "Give another --out"
        )
    verify.verify_path(where)
    if config:
        reading.text(config)
    folders = [where.parent] if where.is_file() else reading.adapter_folders(where) or [where]
    source = where.parent if where.is_file() else where
    done, left = [], []
    for folder in folders:
        target = out / folder.relative_to(source)
        adapter = "default" if folder == source else folder.name
        done += _adapter(folder, source, target, adapter)
        if config and target.is_dir() and not (target / reading.CONFIG).exists():
            shutil.copy2(config, target / reading.CONFIG)
        if reading.adapter_file(target):
            left += verify.verify_path(target)
        else:
            left += [item for item in verify.verify_path(folder) if not item.repairable]
    return done, left


def _adapter(folder: Path, source: Path, target: Path, adapter: str) -> list[str]:
    """Copy one adapter, its keys without the names of wrappers or its tensors from what a run resumes from."""
    from safetensors.torch import save_file

    file = reading.adapter_file(folder)
    tensors: dict[str, torch.Tensor] = {}
    done = []
    if file:
        try:
            tensors = reading.read_tensors(file)
        except AdapterError as error:
            done.append(str(error))
        tensors, renamed = _renamed(tensors)
        if renamed:
            done.append(f"{file}: {renamed} keys have lost the names of wrappers")
    if not tensors:
        tensors = reading.adapter_only(source, adapter)
        if not tensors:
            return done
        done.append(f"{folder}: {len(tensors)} tensors were taken from what a run resumes from")
    target.mkdir(parents=True, exist_ok=True)
    for name in (reading.CONFIG, "README.md"):
        if (folder / name).is_file():
            shutil.copy2(folder / name, target / name)
    owned = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    save_file(owned, target / reading.SAFE, metadata={"format": "pt"})
    return [*done, f"{target / reading.SAFE}: written, {len(owned)} tensors"]


def _renamed(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """The same tensors by canonical keys, and how many keys changed.

    Raises:
        AdapterError: two keys would become one, and have other values.
    """
    result: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = canonical(key)
        if name in result and not bits.same_bits(result[name], tensor):
            raise AdapterError(
                name,
                "two keys of the file name this tensor, with other values",
                "Nothing was written: one of them is wrong, and which one cannot be told",
                "Take the file of another save",
                tensor=name,
            )
        result[name] = tensor
    return result, sum(canonical(key) != key for key in tensors)
