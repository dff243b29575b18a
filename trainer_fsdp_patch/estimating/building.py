"""A model with its adapter from their configurations alone, on the meta device: nothing of it is allocated."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainer_fsdp_patch.errors import PlanError
from trainer_fsdp_patch.estimating import quantizing

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

METHODS = {"lora": "LoraConfig", "vera": "VeraConfig"}
"""Methods that need no file: peft's own defaults, on all linear layers but the head."""

DTYPES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


def configuration(name: str) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        name: of a folder with a config.json, of such a file, or of a model of the hub.

    Raises:
        PlanError: there is none, or transformers does not know its model_type.
    """
    from transformers import AutoConfig

    path = Path(name)
    local = path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count(os.sep) > 1
    if local:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            _refuse(name, f"no file {file}", "Give a folder with a config.json, or a name of the hub")
        kind = _json(file).get("model_type")
        if not kind:
            _refuse(name, f"{file} has no model_type", "Give the config.json of a transformers model")
        name = str(file)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        import transformers

        hint = "Is its model_type newer than this release?" if local else "Offline, give a folder with its config.json"
        found = f"transformers {transformers.__version__} cannot read it: {_sentence(error)}"
        _refuse(str(path), found, hint.rstrip("."))
    return config


def base(config: PretrainedConfig, dtype: str | None) -> nn.Module:
    """The model of a configuration, on meta.

    Args:
        config: of the model.
        dtype: name of the dtype that it is loaded in; None is the configuration's own, or fp32.

    Raises:
        PlanError: transformers has no model for it.
    """
    import torch

    kind = _class(config)
    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    wanted = getattr(torch, DTYPES[dtype]) if dtype else own
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted)
    with torch.device("meta"), _uninitialized(), _default(wanted or torch.float32):
        model: nn.Module = kind(config)
    # Trainers switch it off where layers are recomputed, and no step reads it.
    for part in (config, getattr(config, "get_text_config", lambda: config)()):
        part.use_cache = False
    return model


def _class(config: Any) -> Any:
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return _refuse("MODEL", f"transformers has no model for {type(config).__name__}", "Name a class in architectures")


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _uninitialized() -> contextlib.AbstractContextManager[None]:
    # until transformers 5.0
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    made: contextlib.AbstractContextManager[None] = no_init_weights()
    return made


def model(config: PretrainedConfig, dtype: str | None, quantize: str | None, peft: str) -> tuple[nn.Module, nn.Module]:
    """A model with its adapter, on meta, and the same with plain layers, which can run without data.

    Args:
        config: of the base.
        dtype: that the base is loaded in; None is the configuration's own.
        quantize: "4bit", "8bit" or None.
        peft: method or file of the adapter.

    Raises:
        PlanError: something does not fit.
    """
    # Files contradict before anything is built.
    wanted = adapter(peft)
    of_file = getattr(config, "quantization_config", None)
    if of_file is not None:
        quantize = _same(quantize, dict(of_file))
        del config.quantization_config
    plain = adapted(base(config, dtype), copy.deepcopy(wanted))
    if quantize is None:
        return plain, plain
    return adapted(quantizing.quantized(base(config, dtype), quantize), wanted), plain


def _same(asked: str | None, found: dict[str, Any]) -> str:
    """The kind of a base whose own configuration is quantized."""
    kinds = [kind for kind in ("4bit", "8bit") if found.get(f"load_in_{kind}") or found.get(f"_load_in_{kind}")]
    if not kinds:
        named = found.get("quant_method", "unknown")
        _refuse("quantization_config", f"{named} is not estimated", "Name the plain base, and --quantize")
    if asked not in (None, kinds[0]):
        _refuse("--quantize", f"{asked} next to {kinds[0]} of the configuration", "Leave it out")
    return kinds[0]


def adapter(name: str) -> Any:
    """The configuration of an adapter.

    Args:
        name: a key of `METHODS`, a folder with an adapter_config.json, or such a file.

    Raises:
        PlanError: there is none, or peft does not know its method.
    """
    import peft

    if name in METHODS:
        return getattr(peft, METHODS[name])(target_modules="all-linear")
    path = Path(name)
    file = path / "adapter_config.json" if path.is_dir() else path
    if not file.is_file():
        _refuse("--peft", f"no file {file}", f"Give a folder with an adapter_config.json, or {' or '.join(METHODS)}")
    kind = _json(file).get("peft_type")
    known = {str(getattr(item, "value", item)) for item in peft.PeftType}
    if kind not in known:
        found = f"peft {peft.__version__} knows no peft_type {kind!r} of {file}"
        _refuse("--peft", found, "Install the release of peft that wrote it")
    try:
        values = {key: value for key, value in _json(file).items() if key != "inference_mode"}
        return peft.PeftConfig.from_peft_type(**values)
    except (TypeError, ValueError) as error:
        return _refuse("--peft", f"peft {peft.__version__} cannot read {file}: {_sentence(error)}", "Is it newer?")


def adapted(model: nn.Module, config: Any) -> nn.Module:
    """A model with an adapter, on meta.

    Args:
        model: of `base`.
        config: of `adapter`.

    Raises:
        PlanError: the adapter does not fit the model.
    """
    import torch
    from peft import get_peft_model

    try:
        with torch.device("meta"):
            made: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type, unused-ignore]
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        found = f"{type(config).__name__} does not fit {type(model).__name__}: {_sentence(error)}"
        _refuse("--peft", found, "Name layers of this model in target_modules")
    return made


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _refuse(str(file), f"it cannot be read as JSON: {_sentence(error)}", "Write it afresh")
    if not isinstance(found, dict):
        _refuse(str(file), "it holds no settings", "Write it afresh")
    return dict(found)


def _sentence(error: BaseException) -> str:
    """The first sentence of an error, without its full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.partition(". ")[0].rstrip(".")


def _refuse(subject: str, found: str, remedy: str) -> NoReturn:
    raise PlanError(subject, found, "No plan was made", remedy.rstrip("."), setting=subject)
