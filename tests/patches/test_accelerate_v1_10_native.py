"""A base that transformers shards itself is put into DDP, which takes no sharded parameters."""

import checkpoints
from cells import METHODS, Bench, Setup
from faults import canary, scene_fault, where


def test_canary() -> None:
    canary("accelerate_v1_10_native")


@where("transformers>=5.15.dev0", "transformers<5.19.dev0")
def test_sharded_by_transformers(bench: Bench) -> None:
    """https://github.com/huggingface/transformers/pull/48792"""
    scene_fault(bench, checkpoints.natively(METHODS["vera"]), Setup("native", fsdp=0), "mixed torch.Tensor and DTensor")


@where("transformers>=5.20.dev0", "transformers<5.21.dev0")
def test_projections_are_not_in_what_is_saved(bench: Bench) -> None:
    """Its save gives peft the trainable parameters alone."""
    scene_fault(bench, checkpoints.natively(METHODS["vera"]), Setup("native", fsdp=0), "to not save vera_A and vera_B")


@where("transformers>=5.19.dev0")
def test_sharded_by_transformers_patched(bench: Bench) -> None:
    scene = checkpoints.Scene(bench)
    setup = Setup("native", fsdp=0)
    for method in ("lora", "vera"):
        assert checkpoints.cell(checkpoints.natively(METHODS[method]), scene, setup, patched=True) == ""
