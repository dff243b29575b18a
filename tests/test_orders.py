"""Importing and patching cost little, in every order, and import no target."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

TARGETS = ("torch", "transformers", "peft", "accelerate", "rich")


def test_import_and_patch_load_no_target(python: Callable[..., str]) -> None:
    code = f"""
import sys, trainer_fsdp_patch
assert "wrapt" not in sys.modules
states = trainer_fsdp_patch.patch()
assert {{s.state for s in states if "is outside" not in s.reason}} == {{"waiting"}}, states
print([name for name in {TARGETS} if name in sys.modules])
"""
    assert python(code) == "[]"


ORDERS = sorted(set(itertools.permutations(["import", "patch", "patch", "unpatch", "unpatch", "patch"])))
assert len(ORDERS) == 60


def run_order(order: tuple[str, ...]) -> str:
    steps = {
        "import": "import peft, accelerate, transformers.trainer as trainer; imported = True",
        "patch": "trainer_fsdp_patch.patch(); patched = True",
        "unpatch": "trainer_fsdp_patch.unpatch(); patched = False",
    }
    body = "\n        ".join(f"{steps[step]}\n        check(patched, imported)" for step in order)
    return f"""
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
def check(patched, imported):
    if not imported:
        return
    import accelerate.accelerator, transformers.trainer, peft
    for cls, name in ((transformers.trainer.Trainer, "_wrap_model"), (accelerate.Accelerator, "backward"),
                      (peft.peft_model, "get_peft_model_state_dict")):
        kind = type(vars(cls)[name]).__name__
        assert (kind == "PatchWrapper") == patched, (kind, patched)
        if patched:
            assert trainer_fsdp_patch.patching.wrapping.depth(vars(cls)[name]) == 1
import trainer_fsdp_patch, trainer_fsdp_patch.patching.wrapping
def order():
        patched = imported = False
        {body}
"""


SOME = [order for place, order in enumerate(ORDERS) if place % 7 == 3]


@pytest.mark.parametrize("orders", [SOME, pytest.param(ORDERS, marks=pytest.mark.long)], ids=["some", "all"])
def test_orders(python: Callable[..., str], orders: list[tuple[str, ...]]) -> None:
    """They run in one interpreter, each in a fork that has not imported the targets."""
    assert {order[0] for order in orders} == {order[-1] for order in orders} == {"import", "patch", "unpatch"}
    programs = [run_order(order) + "\norder()\n" for order in orders]
    code = f"""
import os
programs = {programs!r}
import torch, wrapt
failed = []
while programs:
    running = {{}}
    for program in programs[:2]:
        child = os.fork()
        if child == 0:
            try:
                exec(program, {{}})
            except BaseException as error:
                print(program, repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        running[child] = program
    failed += [program for child, program in running.items() if os.waitpid(child, 0)[1]]
    del programs[:2]
print(failed)
"""
    assert python(code).splitlines()[-1] == "[]"
