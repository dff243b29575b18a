"""Adapter files are written next to the old ones, read back, and only then put in their place."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from trainer_fsdp_patch import bits
from trainer_fsdp_patch.errors import AdapterError, warn
from trainer_fsdp_patch.planning.prepared import any_prepared, prepared_by
from trainer_fsdp_patch.ranks import agreement, collectives

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

Result = TypeVar("Result")


def write_tensors(
    upstream: Callable[..., object],
    values: dict[str, torch.Tensor],
    filename: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a safetensors file in full, or leave the one that was there.

    Args:
        upstream: safetensors' `save_file`.
        values: tensors by key.
        filename: where the file belongs.
        metadata: of the file.

    Raises:
        AdapterError: it could not be written, or what was written is not what was to be. On the main process also where
            there is no tensor to write; the others leave such a file out.
    """
    if not any_prepared() or not os.path.basename(filename).startswith("adapter_model"):
        upstream(values, filename, metadata=metadata)
        return
    if not values:
        _refuse_empty(filename)
        return
    # A link into another folder stays one.
    target = Path(os.path.realpath(filename))
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        upstream(values, str(partial), metadata=metadata)
        equal(partial, values)
        _settle(partial, target)
    except AdapterError:
        raise
    except Exception as error:
        raise _lost(target, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _refuse_empty(filename: str | os.PathLike[str]) -> None:
    said = (
        str(filename),
        "there is no tensor to write",
        "The file of an earlier save is untouched",
        "Give accelerator.get_state_dict(model), which the main process alone has, or leave state_dict out",
    )
    if collectives.is_main():
        raise AdapterError(*said)
    warn(*said)


def write_folder(upstream: Callable[..., Result], save_directory: str | os.PathLike[str], **kwargs: object) -> Result:
    """Let a function that writes small files into a folder write them in full, or leave those that were there.

    Args:
        upstream: takes the folder and keyword arguments.
        save_directory: where the files belong; it exists.
        **kwargs: for `upstream`.

    Raises:
        AdapterError: they could not be written.
    """
    if not any_prepared() or not os.path.isdir(save_directory):
        return upstream(save_directory, **kwargs)
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=save_directory) as partial:
            result = upstream(partial, **kwargs)
            for item in sorted(Path(partial).iterdir()):
                _settle(item, Path(os.path.realpath(Path(save_directory) / item.name)))
    except OSError as error:
        raise _lost(Path(save_directory), error) from error
    return result


def _settle(partial: Path, target: Path) -> None:
    """Have the bytes on the disk before the name says so."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)


def equal(path: Path, values: dict[str, torch.Tensor]) -> None:
    """Read a file back and hold it against what was to be written.

    Args:
        path: of a safetensors file.
        values: tensors by key, on any device.

    Raises:
        AdapterError: naming the first key that is missing or has other bits.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        wrong = sorted(set(file.keys()) ^ set(values))
        for key in () if wrong else values:
            if not bits.same_bits(file.get_tensor(key), values[key].detach().cpu()):
                wrong.append(key)
    if wrong:
        raise AdapterError(
            wrong[0],
            f"the file that was read back differs from the adapter in it and in {len(wrong) - 1} more tensors",
            "The file of an earlier save is untouched",
            "Check the disk that the adapter is saved on, and save again",
            tensor=wrong[0],
        )


def _lost(target: Path, error: Exception) -> AdapterError:
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    return AdapterError(
        str(target),
        f"could not be written: {why}",
        "The file of an earlier save is untouched",
        "Free space or choose an output_dir that can be written to, and resume from the last checkpoint",
    )


@contextlib.contextmanager
def together(trainer: Trainer) -> Iterator[None]:
    """Around a save that one rank makes and all wait for: where it fails, every rank raises.

    Args:
        trainer: whose model is saved; nothing happens where no plan was applied to it.

    Raises:
        AdapterError: on the other ranks, with what the first one that failed has said.
    """
    if prepared_by(trainer) is None:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except OSError as error:
        failure = _lost(Path(error.filename or trainer.args.output_dir), error)
        failure.__cause__ = error
    except Exception as error:
        failure = error
    _agree(failure, trainer.accelerator.device)


def _agree(failure: Exception | None, device: torch.device) -> None:
    """One all-reduce where nobody has failed."""
    said = "" if failure is None else str(failure) or type(failure).__name__
    try:
        failed = agreement.first_failure(said, device, "save of the adapter")
    finally:
        # The first error wins. A rank that failed must not end with that of a collective that others have left.
        if failure is not None:
            raise failure
    if failed is not None:
        rank, text = failed
        consequence, remedy = "This rank stops with it", "See the log of that rank"
        raise AdapterError(f"save on rank {rank}", text.rstrip("."), consequence, remedy)
