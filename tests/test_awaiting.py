"""Importing and patching cost little, in every order, and import no target."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from trainer_fsdp_patch.patching import awaiting, registry

TARGETS = ("torch", "transformers", "peft", "accelerate", "rich")


LATE = ("wrapt", "packaging", "inspect", "dataclasses", "importlib.metadata", "trainer_fsdp_patch.patching.registry")


def test_import_and_patch_load_no_target(python: Callable[..., str]) -> None:
    code = f"""
import sys
before = set(sys.modules)
import trainer_fsdp_patch
states = trainer_fsdp_patch.patch()
assert trainer_fsdp_patch.patch() is not states
print([name for name in {(*TARGETS, *LATE)} if name in set(sys.modules) - before])
assert {{s.state for s in states if "is outside" not in s.reason}} == {{"waiting"}}, states
assert states == trainer_fsdp_patch.status() and len(states) == len(trainer_fsdp_patch.status())
print([name for name in {TARGETS} if name in sys.modules])
"""
    assert python(code).splitlines() == ["[]", "[]"]


STATES = "print([(s.name, s.state, s.reason) for s in trainer_fsdp_patch.status()])"
IMPORTED = "import torch.distributed.fsdp, peft, accelerate.accelerator, transformers.trainer"


@pytest.fixture(scope="module")
def at_once(python: Callable[..., str]) -> str:
    """States where `patch()` comes after all imports."""
    return python(f"{IMPORTED}\nimport trainer_fsdp_patch\ntrainer_fsdp_patch.patch()\n{STATES}")


OTHERS = ("accelerate.utils.dataclasses", "peft.tuners.vera")


@pytest.mark.parametrize("first", ["transformers", *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_the_first_import_of_a_target_has_all_patched(python: Callable[..., str], at_once: str, first: str) -> None:
    """Modules that import torch themselves are half imported when torch comes, and are hooked by then."""
    code = f"import trainer_fsdp_patch\ntrainer_fsdp_patch.patch()\nimport {first}\n{IMPORTED}\n{STATES}"
    states = python(code)
    assert states == at_once
    assert "'applied'" in states


def test_all_targets_are_waited_for() -> None:
    assert {patch.target.partition(".")[0] for patch in registry.discover().values()} == set(awaiting.ROOTS)


PROBE = """
import importlib.util, os, sys, trainer_fsdp_patch
from trainer_fsdp_patch.patching import awaiting
def hooked():
    return "trainer_fsdp_patch.patching.registry" in sys.modules
def probe():
    assert importlib.util.find_spec("torch").origin.endswith("__init__.py")
"""


@pytest.mark.parametrize(
    "code",
    [
        "trainer_fsdp_patch.patch(); probe(); assert hooked()",
        "trainer_fsdp_patch.patch(); trainer_fsdp_patch.unpatch(); probe(); assert not hooked()",
        "trainer_fsdp_patch.patch(); import json.tool, importlib.util; assert not hooked()",
        "trainer_fsdp_patch.patch('torch_v2_2_frozen_units'); assert hooked()",
        "trainer_fsdp_patch.patch(strict=True); assert hooked()",
        "trainer_fsdp_patch.patch(adapter_placement='shard'); assert hooked()",
        "trainer_fsdp_patch.patch(); trainer_fsdp_patch.status(); assert hooked() and not awaiting._ARMED",
        "before = list(sys.meta_path); trainer_fsdp_patch.patch(); trainer_fsdp_patch.patch()\n"
        "assert len(sys.meta_path) == len(before) + 1; trainer_fsdp_patch.unpatch(); assert sys.meta_path == before",
    ],
)
def test_what_is_put_off_and_what_is_not(python: Callable[..., str], code: str) -> None:
    python(f"{PROBE}\n{code}")


def test_what_is_switched_off_is_asked_for_when_patch_is_called(python: Callable[..., str]) -> None:
    code = f"""{PROBE}
os.environ[awaiting.DISABLE] = "torch_v2_2_frozen_units"
trainer_fsdp_patch.patch()
del os.environ[awaiting.DISABLE]
probe()
print([s.name for s in trainer_fsdp_patch.status() if "switched off" in s.reason])
"""
    assert python(code) == "['torch_v2_2_frozen_units']"


NO_REGISTRY = f"""{PROBE}
import logging, warnings
from trainer_fsdp_patch.patching import registry
def fails(**settings):
    raise RuntimeError("no registry today")
registry.patch = fails
awaiting.arm()
"""
FAILED = "patch() failed when torch was imported, and the run continues without it: no registry today"


def test_an_import_does_not_fail_with_the_patches(python: Callable[..., str]) -> None:
    code = f"""{NO_REGISTRY}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    probe()
print(caught[0].message)
"""
    assert python(code) == FAILED


def test_nor_does_it_where_warnings_are_errors(python: Callable[..., str]) -> None:
    code = f"""{NO_REGISTRY}
logging.basicConfig(stream=sys.stdout, format="%(message)s")
with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    probe()
"""
    assert python(code) == FAILED


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
