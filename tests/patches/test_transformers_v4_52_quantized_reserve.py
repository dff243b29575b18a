"""Without the patch the whole base's bytes are reserved on each rank's accelerator."""

from __future__ import annotations

import os
from typing import Any

import launched
import pytest
import torch
from cells import Bench, Setup
from faults import packed
from launched import ranks_load

pytestmark = packed


@pytest.mark.parametrize("patched", [False, True])
def test_no_memory_is_reserved_for_all_of_it(bench: Bench, patched: bool) -> None:
    """Stock asks the accelerator for its free memory first, and there is none here."""

    def reserve(model: Any, rank: int) -> dict[str, str]:
        from transformers import modeling_utils

        os.environ.update(launched.LAUNCHED)
        try:
            where_to = {name: torch.device("cuda") for name, _ in model.named_parameters()}
            modeling_utils.caching_allocator_warmup(model, where_to, model.hf_quantizer)
        except (AssertionError, RuntimeError) as error:
            return {"said": type(error).__name__}
        return {"said": ""}

    setup = Setup("f2", ram_efficient=True, dtype="bfloat16", storage="uint8")
    said = {result["said"] for result in ranks_load(bench.base, setup, patched, reserve)}
    assert (said == {""}) is patched
