"""Says whether an adapter file or a Trainer checkpoint is alive: `python -m trainer_fsdp_patch verify PATH`."""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_fsdp_patch.errors import AdapterError
from trainer_fsdp_patch.files import reading
from trainer_fsdp_patch.names import canonical, file_key

if TYPE_CHECKING:
    import torch

_PROJECTIONS = {"VERA": ("vera_A", "vera_B"), "PVERA": ("pvera_A", "pvera_B")}
"""Frozen tensors that peft draws in fp32 and that are part of the file, by `peft_type`."""


_PICKLES = (
    "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", reading.FSDP_FULL,
    reading.PICKLED,
)  # fmt: skip
"""What torch writes into a checkpoint, as a zip archive; other files there are the user's own."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    Attributes:
        file: where; tensor: key of the first tensor concerned, or "".
        fault: a word for scripts, such as "wrapper-names", "empty" or "one-rank".
        text: what was found.
        repairable: whether `repair` mends it.
        note: whether nobody can tell from the file that it is a fault; the file is alive with it.
    """

    file: str
    tensor: str
    fault: str
    text: str
    repairable: bool = False
    note: bool = False


def verify_path(where: Path) -> list[Finding]:
    """Faults of an adapter file, an adapter's folder or a Trainer checkpoint; [] where it is alive.

    Args:
        where: a file or folder.

    Raises:
        AdapterError: there is nothing of that kind at this place.
    """
    if where.is_file():
        return list(_file(where, _config(where.parent)))
    folders = reading.adapter_folders(where) if where.is_dir() else []
    checkpoint = is_checkpoint(where)
    runs = reading.checkpoints(where) if where.is_dir() else []
    if not folders and not checkpoint and not runs:
        nothing = "no adapter and no checkpoint in it" if where.is_dir() else "does not exist"
        remedy = "Give an adapter file, the folder of one, or a checkpoint of a Trainer"
        raise AdapterError(str(where), nothing, "There is nothing to verify", remedy)
    findings = [item for folder in folders for item in _folder(folder)]
    findings += [item for run in runs for item in verify_path(run)]
    return findings + (list(_checkpoint(where, adapter=bool(folders))) if checkpoint else [])


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is, or was to become, a resume checkpoint of a Trainer under FSDP."""
    named = re.fullmatch(r"checkpoint-\d+", folder.name) is not None
    return named or (folder / reading.STATE).exists() or is_ours(folder)


def is_ours(folder: Path) -> bool:
    """Whether a folder holds, or was to hold, the FSDP part of a checkpoint."""
    return any((folder / name).exists() for name in (reading.FSDP_FULL, reading.FSDP_SHARDED))


def _config(folder: Path) -> reading.Json:
    return reading.text(folder / reading.CONFIG) if (folder / reading.CONFIG).is_file() else {}


def _folder(folder: Path) -> Iterator[Finding]:
    config: reading.Json = {}
    try:
        config = _config(folder)
        if not config:
            yield Finding(str(folder), "", "no-config", f"there is no {reading.CONFIG}, and no adapter loads without")
    except AdapterError as error:
        yield Finding(str(folder / reading.CONFIG), "", "unreadable", str(error))
    file = reading.adapter_file(folder)
    if file is None:
        yield Finding(str(folder), "", "missing", f"there is no {reading.SAFE}", _elsewhere(folder))
    else:
        yield from _file(file, config)


def _file(file: Path, config: reading.Json) -> Iterator[Finding]:
    try:
        tensors = reading.read_tensors(file)
    except AdapterError as error:
        yield Finding(str(file), "", "unreadable", str(error))
        return
    if not tensors:
        yield Finding(str(file), "", "empty", "it holds no tensor", _elsewhere(file.parent))
    for check in (_names, _partial, _values, one_rank):
        for key, fault, text in check(tensors):
            yield Finding(str(file), key, fault, text, fault == "wrapper-names")
    kind = str(config.get("peft_type", ""))
    for key, fault, text in _untrained(tensors, kind):
        yield Finding(str(file), key, fault, text)
    for key, fault, text in _rounded(tensors, kind):
        yield Finding(str(file), key, fault, text, note=True)


Fault = tuple[str, str, str]


def _names(tensors: dict[str, torch.Tensor]) -> Iterator[Fault]:
    """Names that wrappers put in: peft loads no such key, and says so in a warning only."""
    wrapped = [key for key in tensors if canonical(key) != key]
    if wrapped:
        yield wrapped[0], "wrapper-names", f"{len(wrapped)} of {len(tensors)} keys have the names of wrappers in them"


def _partial(tensors: dict[str, torch.Tensor]) -> Iterator[Fault]:
    """Layers that lack what other layers of the same kind have."""
    layers: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for key in tensors:
        module, _, _ = canonical(key).partition(".lora_") if ".lora_" in key else canonical(key).rpartition(".")
        rest = canonical(key).removeprefix(module)
        layers[re.sub(r"\.\d+(?=\.|$)", ".*", module)][rest].add(module)
    for pattern, suffixes in layers.items():
        everywhere = set().union(*suffixes.values())
        for suffix, modules in suffixes.items():
            lacking = sorted(everywhere - modules)
            if lacking:
                key = lacking[0] + suffix
                yield key, "partial", f"{len(lacking)} of {len(everywhere)} layers {pattern} lack {suffix.strip('.')}"


def _untrained(tensors: dict[str, torch.Tensor], kind: str) -> Iterator[Fault]:
    """A file that has what the adapter does not train, such as projections, and nothing that it does."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    prefix = getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "prefix", "")
    if prefix and tensors and not any(prefix in key for key in tensors):
        yield "", "partial", f"none of its {len(tensors)} tensors is one that {kind} trains, such as {prefix}*"


def _elsewhere(folder: Path) -> bool:
    """Whether what a run resumes from has tensors that an adapter trains."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    prefixes = {getattr(tuner, "prefix", "") for tuner in PEFT_TYPE_TO_TUNER_MAPPING.values()} - {""}
    return any(prefix in key for key in reading.adapter_only(folder) for prefix in prefixes)


def _values(tensors: dict[str, torch.Tensor]) -> Iterator[Fault]:
    """Tensors without an element, with values that are not finite, and kinds of tensors that are zero everywhere."""
    import torch

    kinds: dict[str, list[str]] = defaultdict(list)
    zero: set[str] = set()
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            yield key, "no-element", f"its shape is {list(tensor.shape)}: a rank wrote its empty shard"
        elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            yield key, "not-finite", f"{count} of {tensor.numel()} values are not finite"
        else:
            kinds[re.sub(r"\.\d+(?=\.)", ".*", canonical(key))].append(key)
            if not bool(tensor.any()):
                zero.add(key)
    for kind, keys in kinds.items():
        dead = [key for key in keys if key in zero]
        if dead:
            yield dead[0], "zero", f"{len(dead)} of {len(keys)} tensors {kind} are zero: never trained, or lost"


def one_rank(tensors: dict[str, torch.Tensor]) -> Iterator[Fault]:
    """Matrices that have values in the rows of one rank, and zeros in all others."""
    shards = {key: shard for key, tensor in tensors.items() if (shard := _shard(tensor))}
    if shards:
        key, (rank, ranks) = next(iter(shards.items()))
        yield key, "one-rank", f"{len(shards)} tensors hold the rows of rank {rank} of {ranks} only, the rest is zero"


def _shard(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Rank and number of ranks, where just the rows that FSDP gives that rank are not zero."""
    if tensor.dim() < 2 or tensor.shape[0] < 2 or not tensor.is_floating_point():
        return None
    rows = tensor.shape[0]
    used = tensor.reshape(rows, -1).any(dim=1).nonzero().flatten().tolist()
    if not used or len(used) == rows or used != list(range(used[0], used[-1] + 1)):
        return None
    for ranks in range(2, rows + 1):
        # Rounded up, as FSDP2 cuts rows: the last ranks get fewer.
        size = -(-rows // ranks)
        if used[0] % size == 0 and len(used) == min(size, rows - used[0]):
            return used[0] // size, ranks
    return None


def _rounded(tensors: dict[str, torch.Tensor], kind: str) -> Iterator[Fault]:
    """Projections whose values are all those of bf16: peft makes such next to a base in bf16.

    Mixed precision makes the same of others in place, so that the file alone does not tell.
    """
    import torch

    for key, tensor in tensors.items():
        if canonical(key).rpartition(".")[2] not in _PROJECTIONS.get(kind, ()) or not tensor.is_floating_point():
            continue
        if torch.equal(tensor, tensor.to(torch.bfloat16).to(tensor.dtype)):
            yield key, "rounded", "every value of the projection is one of bf16: so is the base, or mixed precision"


def _checkpoint(folder: Path, *, adapter: bool) -> Iterator[Finding]:
    """What a run that resumes from a folder would miss."""
    for lack in incomplete(folder):
        yield Finding(str(folder), "", "incomplete", lack)
    if not adapter:
        yield Finding(str(folder), "", "missing", f"there is no {reading.SAFE}", _elsewhere(folder))
    try:
        model = reading.fsdp_part(folder)
    except AdapterError as error:
        yield Finding(str(folder), "", "unreadable", str(error))
        return
    file = reading.adapter_file(folder) if adapter else None
    if model and file:
        yield from _left_out(folder, file, model)


def _left_out(folder: Path, file: Path, model: dict[str, torch.Tensor]) -> Iterator[Finding]:
    """Tensors of the adapter file that the part which is resumed from lacks."""
    try:
        known = {file_key(key) for key in model}
        lost = [key for key in reading.read_tensors(file) if file_key(key) not in known]
    except AdapterError:
        return
    if lost:
        text = f"the part of the checkpoint that is resumed from lacks {len(lost)} tensors of the adapter file"
        yield Finding(str(folder), lost[0], "incomplete", text)


def incomplete(folder: Path) -> list[str]:
    """What a Trainer's checkpoint lacks of what its writer leaves; cheap, tensors are not read."""
    return [*unfinished(folder), *_removed(folder)]


def unfinished(folder: Path) -> list[str]:
    """Signs that a checkpoint's writer was killed, or that a file was cut.

    A Trainer writes its state last. Where that is complete, what is absent next to it was removed by somebody who needs
    the space. Upstream resumes without it.
    """
    lacks = []
    try:
        state = reading.text(folder / reading.STATE)
        if "global_step" not in state:
            lacks.append(f"{reading.STATE} has no global_step")
    except AdapterError as error:
        lacks.append(str(error) if (folder / reading.STATE).exists() else f"there is no {reading.STATE}")
    pickles = [*folder.glob("rng_state*.pth"), *(folder / name for name in _PICKLES if (folder / name).is_file())]
    lacks += [f"{item.name} is truncated" for item in sorted(pickles) if not zipfile.is_zipfile(item)]
    for item in sorted(folder.glob(f"**/{reading.SAFE}")):
        try:
            _opened(item)
        except AdapterError as error:
            lacks.append(str(error))
    model, others = _fsdp_parts(folder)
    if others and not model:
        lacks.append("it has no part to resume the model from")
    return lacks


def _fsdp_parts(folder: Path) -> tuple[bool, bool]:
    """Whether a checkpoint has a complete model part of FSDP, and whether it has parts that come with one."""
    model = (folder / reading.FSDP_FULL).is_file() or (folder / reading.FSDP_SHARDED / ".metadata").is_file()
    return model, any(
        (folder / name).exists() for name in (reading.FSDP_SHARDED, reading.FSDP_OPTIMIZER, "optimizer.bin")
    )


def _removed(folder: Path) -> list[str]:
    """What upstream resumes without."""
    lacks = []
    ranks = {int(item.stem.rpartition("_")[2]) for item in folder.glob("rng_state_*.pth")}
    lacks += [f"there is no rng_state_{rank}.pth" for rank in range(max(ranks, default=0)) if rank not in ranks]
    kinds = ("optimizer.bin", "optimizer.pt", f"{reading.FSDP_OPTIMIZER}/.metadata")
    if ranks or any(_fsdp_parts(folder)):
        if not any((folder / name).is_file() for name in kinds):
            lacks.append("it has no optimizer")
        if not (folder / "scheduler.pt").is_file():
            lacks.append("there is no scheduler.pt")
        if not ranks:
            lacks.append("there is no rng_state of any rank")
    return lacks


def _opened(file: Path) -> None:
    from safetensors import safe_open

    try:
        with safe_open(file, "pt"):
            pass
    except Exception as error:
        raise reading.unreadable(file, error) from error
