"""What `--fsdp` says: FSDP's version, or a file of accelerate or of the Trainer, and what contradicts in it."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from trainer_fsdp_patch import versions
from trainer_fsdp_patch.errors import PlanError

_ALIASES = {"version": "fsdp_version", "transformer_layer_cls_to_wrap": "transformer_cls_names_to_wrap"}
_ALIASES |= {"offload_params": "cpu_offload"}
_OTHERS = {"xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt", "xla_fsdp_settings"}
_OWN = {"fsdp_version", "transformer_cls_names_to_wrap", "activation_checkpointing"}
"""Settings of the Trainer that no old accelerate has in its plugin."""
_ONCE = ("GRAD_OP", "ZERO2", "2", "5")
"""Of sharding strategies, those with which a layer stays gathered until its backward pass, and their numbers."""
_NO_SHARD = ("NO_SHARD", "3")
_HYBRID = ("HYBRID", "4", "5")


@dataclass(frozen=True)
class Fsdp:
    """FSDP's settings, as far as a plan depends on them.

    Attributes:
        version: 1 or 2.
        gathers: how often a step gathers a layer.
        shards: whether ranks share the base at all.
        units: class names of the modules that become units; None is the model's own, and none is units by size.
        use_orig_params: FSDP1's flag, or None.
        prefetched: whether FSDP1 gathers the next unit ahead.
        checkpointing: whether layers are recomputed.
        mixed_precision: "no", "bf16" or "fp16", or None where the file does not say.
        ranks: number of processes, or None where the file does not say.
    """

    version: int = 2
    gathers: int = 2
    shards: bool = True
    units: tuple[str, ...] | None = None
    use_orig_params: bool | None = None
    prefetched: bool = False
    checkpointing: bool = False
    mixed_precision: str | None = None
    ranks: int | None = None


def newest() -> int:
    """The newest version of FSDP that the Trainer has in the installed releases."""
    # until transformers 4.51
    # until accelerate 1.6
    return 2 if versions.at_least("transformers", "4.51.0") and versions.at_least("accelerate", "1.6.0") else 1


def read(text: str | None) -> Fsdp:
    """FSDP's settings.

    Args:
        text: 1 or 2, for the Trainer's defaults, or a path: the YAML that `accelerate config` writes, or the Trainer's
            fsdp_config as JSON. None is the newest version.

    Raises:
        PlanError: it is none of these, or its settings contradict each other.
    """
    if text is None or text in ("1", "2"):
        return Fsdp(_installed(int(text or newest())))
    path = Path(text)
    if not path.is_file():
        _refuse("--fsdp", f"no file {text}", "Give 1, 2, a YAML of `accelerate config` or a JSON of fsdp_config")
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml  # type: ignore[import-untyped, unused-ignore]

            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        else:
            found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _refuse(text, f"it cannot be read: {' '.join(str(error).split())}", "Write it afresh")
    except Exception as error:
        # yaml's errors are no ValueErrors.
        _refuse(text, f"it is no YAML: {' '.join(str(error).split())}", "Run `accelerate config` again")
    if not isinstance(found, dict):
        _refuse(text, "it holds no settings", "Run `accelerate config` again")
    if "fsdp_config" in found or "distributed_type" in found:
        return _accelerate(found)
    # until transformers 5.10
    return _of(found, 2 if versions.at_least("transformers", "5.10.0") else 1)


def _installed(version: int) -> int:
    if version > newest():
        found = f"{version}, which the installed transformers and accelerate do not have"
        _refuse("fsdp_version", found, "Use 1, or install releases that have it")
    return version


def _accelerate(found: dict[str, Any]) -> Fsdp:
    kind = str(found.get("distributed_type", "FSDP"))
    if kind != "FSDP":
        _refuse("distributed_type", f"{kind} instead of FSDP", "Choose FSDP in `accelerate config`")
    inner = found.get("fsdp_config") or {}
    if not isinstance(inner, dict):
        _refuse("fsdp_config", f"{inner!r} is no table", "Run `accelerate config` again")
    made = _of(inner, 1)
    processes = found.get("num_processes")
    precision = str(found.get("mixed_precision") or "no")
    return dataclasses.replace(made, ranks=None if processes is None else int(processes), mixed_precision=precision)


def _of(given: dict[str, Any], version: int) -> Fsdp:
    """Settings of either file; names may begin with fsdp_.

    Args:
        given: by name.
        version: that is meant where none is given.
    """
    values = {}
    for key, value in given.items():
        name = key.removeprefix("fsdp_")
        values[_ALIASES.get(name, name)] = value
    values["fsdp_version"] = values.pop("fsdp_version", version)
    _known(values)
    made = values["fsdp_version"]
    if str(made) not in ("1", "2"):
        _refuse("fsdp_version", repr(made), "Use 1 or 2")
    version = _installed(int(made))
    if _flag(values, "cpu_offload"):
        _refuse("cpu_offload", "shards in main memory are not estimated", "Leave it out, and look at what is missing")
    strategy = _strategy(values, version)
    if version == 2 and _flag(values, "forward_prefetch"):
        _refuse("forward_prefetch", "true with fsdp_version 2, which has none", "Leave it out, or use fsdp_version 1")
    after = str(strategy).upper()
    prefetch = str(values.get("backward_prefetch") or "").upper()
    once = after == "FALSE" if version == 2 else any(word in after for word in _ONCE)
    return Fsdp(
        version,
        1 if once else 2,
        version == 2 or not any(word in after for word in _NO_SHARD),
        _units(values),
        _flag(values, "use_orig_params", default=True) if version == 1 else None,
        version == 1 and (prefetch not in ("", "NO_PREFETCH", "NONE") or _flag(values, "forward_prefetch")),
        _flag(values, "activation_checkpointing"),
    )


def _known(values: dict[str, Any]) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    known = {item.name for item in dataclasses.fields(FullyShardedDataParallelPlugin)} | _OTHERS | _OWN
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1)
            _refuse(f"fsdp_{name}", "accelerate has no such setting", f"Use {near[0]}" if near else "Leave it out")


def _strategy(values: dict[str, Any], version: int) -> Any:
    """How a unit is kept after its forward pass; accelerate has two names for it."""
    first, second = values.get("sharding_strategy"), values.get("reshard_after_forward")
    flag = str(second).lower() in ("true", "false")
    if version == 2 and second is not None and not flag:
        _refuse("reshard_after_forward", f"{second} with fsdp_version 2", "Use true or false, or fsdp_version 1")
    if version == 1 and flag and isinstance(second, bool):
        _refuse("reshard_after_forward", f"{second} with fsdp_version 1", "Use FULL_SHARD, or fsdp_version 2")
    if version == 1 and first is not None and second is not None and str(first).upper() != str(second).upper():
        _refuse("sharding_strategy", f"{first} next to reshard_after_forward {second}", "Leave one of them out")
    strategy = second if version == 2 else first if first is not None else second
    if any(word in str(strategy).upper() for word in _HYBRID):
        _refuse("sharding_strategy", f"{strategy}: groups of ranks are not estimated", "Give --ranks of one group")
    return strategy


def _units(values: dict[str, Any]) -> tuple[str, ...] | None:
    policy = str(values.get("auto_wrap_policy") or "").upper()
    if "SIZE_BASED" in policy or "NO_WRAP" in policy:
        return ()
    names = values.get("transformer_cls_names_to_wrap")
    if not names:
        return None
    return tuple(name.strip() for name in (names.split(",") if isinstance(names, str) else names))


def _flag(values: dict[str, Any], name: str, *, default: bool = False) -> bool:
    value = values.get(name)
    if value is None:
        return default
    text = str(value).lower()
    if text not in ("true", "false", "1", "0", "yes", "no"):
        _refuse(name, repr(value), "Use true or false")
    return text in ("true", "1", "yes")


def _refuse(subject: str, found: str, remedy: str) -> NoReturn:
    raise PlanError(subject, found, "No plan was made", remedy, setting=subject)
