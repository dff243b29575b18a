"""What a process that forks ranks imports first, for `check`, the tests and the benchmarks."""

from __future__ import annotations

import contextlib
import importlib
import warnings


def import_all() -> list[str]:
    """Import once what every forked rank needs; the parent computes nothing, so that it can be forked.

    Returns:
        Targets of patches that the installed releases do not have. Their patches wait, and `status` says so.
    """
    import torch

    from trainer_fsdp_patch.patching import registry

    targets = {item.target for item in registry.discover().values() if item.concerns()}
    missing = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("peft", "transformers.trainer", "transformers.models.llama.modeling_llama"):
            importlib.import_module(name)
        for name in sorted(targets):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                # One that a target itself lacks is an installation at fault.
                if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                    raise
                missing.append(name)
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        # A table of thousands of expressions, which each rank would compile as it loads its first model.
        get_checkpoint_conversion_mapping("llama")
    torch.set_num_threads(1)
    return missing
