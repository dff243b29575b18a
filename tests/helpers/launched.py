"""A quantized base as a program has it that `accelerate launch` has started, where one rank of a machine loads."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import quantizers
import written
from cells import Setup
from faults import where
from ranks import on_ranks
from test_benchmarks import load as load_benchmark

import trainer_fsdp_patch
from trainer_fsdp_patch.inspecting.leaves import leaves, span
from trainer_fsdp_patch.loading import moving

ALLOCATIONS = load_benchmark("allocations")

LAUNCHED: dict[str, str] = load_benchmark("loading").LAUNCHED


def load(folder: str, setup: Setup) -> Any:
    """A base as a launched program loads it. On a CPU accelerate refuses this loading for FSDP1, so it is not told."""
    from transformers import AutoModelForCausalLM

    before = {name: os.environ.get(name) for name in LAUNCHED}
    if setup.fsdp:
        os.environ.update(LAUNCHED)
    if setup.quantizer.startswith("written"):
        model = written.load(folder, setup)
    else:
        model = quantizers.load(folder, setup, AutoModelForCausalLM)
    for name, value in before.items():
        if setup.fsdp == 1:
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return model


KINDS: dict[str, dict[str, Any]] = {
    "4bit": {"storage": "uint8"},
    "4bit-double": {"storage": "uint8", "kind": "nf4 double"},
    "4bit-bf16": {"storage": "bfloat16"},
    "8bit": {"storage": "8bit"},
    "torchao": {"quantizer": "torchao-int8"},
    "quanto": {"quantizer": "quanto-int8"},
}
LOADS = {
    # Before, transformers makes an 8-bit weight in a way that today's bitsandbytes refuses.
    "8bit": where("transformers>=4.50"),
    "torchao": where("transformers>=4.53", "torchao"),
    "quanto": where("transformers>=4.53", "optimum-quanto"),
    "aqlm": where("transformers>=5.9", "aqlm"),
    "fp8": where("transformers>=5.22"),
    "own": where("transformers>=5.0"),
}
"""With what today's release of a quantizer is loaded; FP8, what is trained."""
TRAINS = {**LOADS, "torchao": where("transformers>=5.4", "torchao")}


def marked(kind: str, needs: dict[str, pytest.MarkDecorator], *before: Any, long: bool = False) -> Any:
    """A kind as a test's parameter, after others, with the releases that it needs."""
    marks = [pytest.mark.long] if long else []
    return pytest.param(*before, kind, marks=[*marks, *([needs[kind]] if kind in needs else [])])


READ: dict[str, dict[str, Any]] = {name: {"quantizer": f"written-{name}"} for name in ("aqlm", "fp8", "own")}
"""Bases that are quantized already; the last by a quantizer of a program, with its weights in buffers."""


def ranks_load(base: str, setup: Setup, patched: bool, then: Callable[[Any, int], Any]) -> list[Any]:
    """What a function gives of a base that each of two ranks has loaded."""

    def child(rank: int) -> Any:
        if patched:
            trainer_fsdp_patch.patch(strict=True)
        with ALLOCATIONS.Allocations() as meter:
            model = load(base, setup)
        result = then(model, rank)
        return {"peak": meter.peak, "live": meter.live, **result}

    return on_ranks(child, 2)


def quantized_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if moving.is_quantized(module)]


def quantized_bytes(model: Any) -> int:
    """Of memory that is there, each once."""
    here = {span(leaf.tensor) for layer in quantized_layers(model) for leaf in leaves(layer) if not leaf.tensor.is_meta}
    return sum(end - start for _, start, end in here)
