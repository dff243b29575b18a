"""Without the patch threads fill a rank faster than layers leave it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantizers
import torch
from cells import Bench, Setup
from faults import packed
from launched import load, quantized_bytes, ranks_load
from ranks import on_ranks

from trainer_fsdp_patch.loading import restoring, streaming

pytestmark = packed


@pytest.fixture
def quantized(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Folder of a checkpoint in 4 bits, whose quantization `load` takes from it."""
    setup = Setup("one", fsdp=0, dtype="bfloat16", storage="uint8", kind="nf4 double")
    on_ranks(lambda rank: rank or load(bench.base, setup).save_pretrained(tmp_path / "quantized"), 2)
    monkeypatch.setattr(quantizers, "load", lambda folder, setup, kind: kind.from_pretrained(folder))
    return str(tmp_path / "quantized")


PLAIN = Setup("f2", ram_efficient=True, dtype="bfloat16")


def absmax(model: Any) -> dict[str, list[float]]:
    return {key: value.flatten()[:99].tolist() for key, value in model.state_dict().items() if "absmax" in key}


def test_a_checkpoint_that_is_quantized_already(quantized: str) -> None:
    """Rank 0's bytes are the file's, and the other rank gets them when it asks."""

    def bytes_of(model: Any, rank: int) -> dict[str, Any]:
        before = quantized_bytes(model)
        restoring.restore(streaming.loaded(model), torch.device("cpu"))
        return {
            "before": before,
            "after": quantized_bytes(model),
            "state": absmax(model),
            "left": streaming.loaded(model),
        }

    stock = ranks_load(
        quantized, PLAIN, False, lambda model, rank: {"state": absmax(model), "is": quantized_bytes(model)}
    )
    first, second = ranks_load(quantized, PLAIN, True, bytes_of)
    assert stock[0]["is"] == stock[1]["is"]
    assert second["before"] < first["before"]
    assert second["after"] == first["after"] == first["before"]
    assert second["state"] == first["state"] == stock[0]["state"]
    assert second["left"] == []


@pytest.mark.parametrize("patched", [False, True])
def test_one_tensor_is_read_after_the_other(quantized: str, patched: bool) -> None:
    import transformers.core_model_loading as reading

    pools: list[object] = []
    upstream = reading.ThreadPoolExecutor

    def pool(*args: Any, **kwargs: Any) -> Any:
        pools.append(args)
        return upstream(*args, **kwargs)

    reading.ThreadPoolExecutor = pool  # type: ignore[misc, assignment]
    try:
        results = ranks_load(quantized, PLAIN, patched, lambda model, rank: {"pools": len(pools)})
    finally:
        reading.ThreadPoolExecutor = upstream  # type: ignore[misc]
    assert [result["pools"] for result in results] == [0 if patched else 1] * 2
