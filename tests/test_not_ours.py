"""A run that is not ours is not touched: every wrapper of every patch, stock beside patched, bit for bit.

What is meant by "not ours" is DDP, DeepSpeed, one process, whatever is compiled, FSDP without an adapter, an adapter
without FSDP, a program without peft, and a Mock in place of a model.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import json
import operator
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import strangers
import walk
from cells import Bench, has
from conftest import ROOT
from faults import FLAVOURS
from strangers import WITHOUT_BEST, alone, compiled, ddp, deepspeed, fsdp
from walk import Scenario

import trainer_fsdp_patch
from trainer_fsdp_patch import versions
from trainer_fsdp_patch.patching import registry, wrapping
from trainer_fsdp_patch.planning import prepared
from trainer_fsdp_patch.testing import releases

BEFORE: dict[int, tuple[str, ...]] = {1: (), 2: ("before",)}
"""What upstream refuses of FSDP, by its version: an evaluation before train(). FSDP1 cannot train after one."""
ALONE = "resumed from the model alone"

FOLDERS = [Path(__file__).parent / name for name in ("", "helpers", "matrix", "programs")]
"""Where tests find each other's modules, as setup.cfg has them."""

SCENARIOS = [
    Scenario("one process, LoRA", alone("lora")),
    Scenario("one process, LoRA and modules_to_save", alone("lora_head")),
    Scenario("one process, VeRA, bf16", alone("vera", bf16=True)),
    Scenario("one process, AdaLora", alone("adalora_schedule", **WITHOUT_BEST), refused=("resumed", ALONE)),
    Scenario("one process, AdaLora, final ranks", strangers.masked),
    Scenario("one process, LoRA, merged", strangers.merged),
    Scenario("one process, full", alone()),
    Scenario("one process, compiled, LoRA", alone("lora", torch_compile=True, torch_compile_backend="eager")),
    Scenario("one process, LoRA, beside a planned model", strangers.beside(alone("lora_head"))),
    Scenario("DDP, LoRA", ddp("lora"), 2),
    Scenario("DDP, LoRA, beside a planned model", strangers.beside(ddp("lora")), 2),
    Scenario("DDP, full", ddp(), 2),
    Scenario("compiled as a whole", compiled("lora_head", strangers.as_a_whole), refused=("unwrapped",)),
    Scenario("compiled in regions", compiled("lora", strangers.in_regions)),
    Scenario("compiled in regions, modules_to_save", compiled("lora_head", strangers.in_regions)),
    Scenario("compiled below peft", compiled("lora_head", strangers.below)),
    Scenario("compiled before peft", compiled("", strangers.before)),
    Scenario("compiled in regions, full", compiled("", strangers.in_regions)),
]
for _version in FLAVOURS:
    for _kind in ("", "sharded_checkpoint", "activation_checkpointing"):
        _run = fsdp(_version, **({_kind: True} if _kind else {}))
        SCENARIOS.append(Scenario(f"FSDP{_version}, full, {_kind or 'plain'}", _run, 2, BEFORE[_version]))
    SCENARIOS.append(
        Scenario(f"FSDP{_version}, full, beside a planned model", strangers.beside(fsdp(_version)), 2, BEFORE[_version])
    )
    # Before, a Trainer refuses to look for one under FSDP.
    if versions.at_least("transformers", "4.45.0"):
        SCENARIOS.append(Scenario(f"FSDP{_version}, full, looking for a batch size", strangers.looking(_version), 2))
if versions.installed("deepspeed"):
    SCENARIOS += [
        Scenario("ZeRO-2, LoRA", deepspeed(2), 2, (ALONE,)),
        Scenario("ZeRO-2, full", deepspeed(2, ""), 2, (ALONE,)),
        Scenario("ZeRO-3, LoRA", deepspeed(3), 2, (ALONE,)),
    ]
if versions.at_least("peft", "0.17.0"):
    SCENARIOS += [Scenario("one process, LoRA of parameters", strangers.of_parameters)]
if releases.has_bitsandbytes() and has("shira"):
    _packed = {"dtype": "bfloat16", "storage": "uint8"}
    SCENARIOS += [
        Scenario("one process, SHiRA on 4 bits", alone("shira", model=_packed, bf16=True), refused=("load_state",))
    ]
if versions.at_least("transformers", "5.19.0"):
    SCENARIOS += [Scenario("sharded by transformers, full", strangers.native, 2)]
PLUGIN = Scenario("FSDP plugin", strangers.plugins)
SEAMS = dict(walk.seams())


def build_deepspeed() -> None:
    """Have DeepSpeed compile its collectives of CPU ranks, which it does at their first use.

    That takes a slow machine longer than ranks are waited for, and one that is killed meanwhile leaves a lock on which
    all later ones wait.
    """
    code = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=600, check=False)


@pytest.fixture(scope="session")
def walked(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs a scenario, stock or patched, once."""
    folder = tmp_path_factory.mktemp("walk")
    if importlib.util.find_spec("deepspeed"):
        build_deepspeed()

    @functools.cache
    def run(name: str, *, patched: bool) -> Any:
        scenario = next(item for item in (*SCENARIOS, PLUGIN) if item.name == name)
        return walk.run(scenario, bench.base, folder / f"{name} {patched}", patched=patched)

    return run


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda item: item.name)
def test_nothing_changes(walked: Callable[..., Any], scenario: Scenario) -> None:
    stock, patched = (walked(scenario.name, patched=patched) for patched in (False, True))
    for saw in stock["ranks"]:
        assert {name for name, value in saw.items() if walk.refused(value)} == set(scenario.refused)
    assert walk.differences(stock, patched) == []


@pytest.mark.parametrize("name", SEAMS)
def test_every_wrapper_is_walked(walked: Callable[..., Any], name: str) -> None:
    """A new wrapper needs a scenario that calls it, or the walk says nothing about it."""
    reached = set().union(*(walked(scenario.name, patched=True)["seams"] for scenario in SCENARIOS))
    assert name in reached, "add a scenario to SCENARIOS that calls it"


def upstream(name: str) -> tuple[Any, Any, Any]:
    """The function under a seam, the class that has it or None, and the module."""
    patch = registry.discover()[name.partition(":")[0]]
    module = importlib.import_module(patch.target)
    parent, _, original = wrapping.resolve(module, SEAMS[name].path)
    return getattr(original, "__func__", original), parent if isinstance(parent, type) else None, module


def bare(owner: type) -> Any:
    """An object without its `__init__`; torch's modules cannot even be asked for an attribute then."""
    from torch import nn

    return mock.Mock() if issubclass(owner, nn.Module) else object.__new__(owner)


WRITERS = ("adapter_config", "adapter_file")
"""Patches that have a file written under another name, of whatever adapter, where a process has a planned model."""
KINDS: dict[str, tuple[Callable[[type], Any], Callable[[], Any]]] = {
    "Mock": (lambda owner: mock.Mock(), mock.Mock),
    "MagicMock": (lambda owner: mock.MagicMock(), mock.MagicMock),
    "SimpleNamespace": (lambda owner: SimpleNamespace(model=None, args=None), SimpleNamespace),
    "__new__": (bare, object),
}
"""What tests of other packages hand over: in place of `self`, and of any other argument."""


@pytest.mark.parametrize("beside", [False, True], ids=["", "beside a planned model"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SEAMS)
def test_arguments_go_upstream_untouched(name: str, kind: str, beside: bool, bench: Bench, tmp_path: Path) -> None:
    """Upstream gets the same objects in the same places, once, and its answer is what the caller gets.

    Only what is required is handed over, so that an argument that a wrapper adds is seen.
    """
    if beside and name.partition(":")[0].endswith(WRITERS):
        pytest.skip("the same bytes under the same name, which the walk beside a planned model shows")
    other = strangers.planned(bench.base) if beside else None
    hand_over(name, kind, tmp_path)
    assert (prepared.prepared_for(other) is not None) == beside


def hand_over(name: str, kind: str, tmp_path: Path) -> None:
    function, owner, _ = upstream(name)
    parameters = list(inspect.signature(function).parameters.values())
    bound = owner is not None and parameters[0].name == "self"
    instance = KINDS[kind][0](owner) if bound else None
    paths = {"filename": tmp_path / "adapter_model.safetensors", "save_directory": tmp_path, "folder": tmp_path}
    required = {
        item.name: str(paths[item.name]) if item.name in paths else KINDS[kind][1]()
        for item in parameters[bound:]
        if item.default is item.empty and item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)
    }
    for args, kwargs in ((tuple(required.values()), {}), ((), required)):
        answer, calls = object(), []

        def wrapped(*given: Any, _calls: list[Any] = calls, _answer: object = answer, **named: Any) -> Any:
            _calls.append((given, named))
            return _answer

        assert SEAMS[name].call(wrapped, instance, args, dict(kwargs)) is answer
        [(given, named)] = calls
        assert list(map(id, given)) == list(map(id, args))
        assert {key: id(value) for key, value in named.items()} == {key: id(value) for key, value in kwargs.items()}


def live(name: str) -> tuple[Any, Any]:
    """What a program finds under a seam's name, stock and patched."""
    _, _, module = upstream(name)
    get = operator.attrgetter(SEAMS[name].path)
    stock = get(module)
    trainer_fsdp_patch.patch()
    return stock, get(module)


@pytest.mark.parametrize("name", SEAMS)
def test_wrapped_functions_are_copied_as_functions_are(name: str) -> None:
    """copy and deepcopy give the function itself, as they do of every function."""
    _, patched = live(name)
    assert copy.copy(patched) is patched
    assert copy.deepcopy(patched) is patched
    assert copy.deepcopy({"hook": patched})["hook"] is patched


@pytest.mark.parametrize("pickler", ["pickle", "dill"])
@pytest.mark.parametrize("name", SEAMS)
def test_wrapped_functions_are_pickled_by_name(name: str, pickler: str) -> None:
    """Ray and spawn send them, also to programs that do not have this package; datasets hashes what dill gives."""
    tool = pytest.importorskip(pickler)
    stock, patched = live(name)
    sent = tool.dumps(patched)
    assert b"trainer_fsdp_patch" not in sent
    assert sent == tool.dumps(patched)
    assert inspect.unwrap(tool.loads(sent)) is inspect.unwrap(stock)


@pytest.mark.parametrize("name", SEAMS)
def test_subclasses_inherit_the_function_itself(name: str) -> None:
    """TRL and others ask `type(self).method is Base.method` to see whether a method is overridden."""
    _, patched = live(name)
    _, owner, module = upstream(name)
    assert operator.attrgetter(SEAMS[name].path)(module) is patched
    if owner is None:
        return
    attribute = SEAMS[name].path.rpartition(".")[2]
    inheriting = type("Sub", (owner,), {})
    overriding = type("Sub", (owner,), {attribute: lambda *args, **kwargs: None})
    assert getattr(inheriting, attribute) is getattr(owner, attribute)
    assert getattr(overriding, attribute) is not getattr(owner, attribute)


SPAWN = """
import importlib, multiprocessing, operator
import trainer_fsdp_patch
from trainer_fsdp_patch.patching import registry

trainer_fsdp_patch.patch()
functions = [
    operator.attrgetter(seam.path)(importlib.import_module(patch.target))
    for patch in registry.discover().values() if patch.concerns() for seam in patch.seams
]
with multiprocessing.get_context("spawn").Pool(1) as pool:
    names = pool.map(operator.attrgetter("__qualname__"), functions)
print(names == [item.__qualname__ for item in functions])
"""


def test_wrapped_functions_are_spawned(python: Callable[..., str]) -> None:
    """A process that is spawned gets every wrapped function as an argument."""
    assert python(SPAWN).splitlines()[-1] == "True"


@pytest.mark.parametrize("kind", strangers.IGNORED)
def test_the_plugin_keeps_what_it_is_given(walked: Callable[..., Any], kind: str) -> None:
    """Without an adapter nobody looks at `ignored_modules` before FSDP does."""
    [stock], [patched] = (walked(PLUGIN.name, patched=side)["ranks"] for side in (False, True))
    assert patched[kind] == stock[kind]


ABSENT = """
import json, multiprocessing, sys
from pathlib import Path
# Before the forks, so that it is done once.
import torch, accelerate
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer
from trainer_fsdp_patch.testing import trial

folder = Path(sys.argv[1])
base = multiprocessing.get_context("fork").Process(target=trial.tiny_base, args=(folder / "base",))
base.start()
base.join()
import strangers, walk

found = {}
for name, (function, ranks) in strangers.WITHOUT_ADAPTER.items():
    scenario = walk.Scenario(name, function, ranks)
    stock, patched = (
        walk.run(scenario, str(folder / "base"), folder / f"{name} {side}", patched=side) for side in (False, True)
    )
    found[name] = walk.differences(stock, patched)
assert not [name for name in sys.modules if name.partition(".")[0] == "peft"]
print(json.dumps(found))
"""


def test_a_program_without_peft(tmp_path: Path) -> None:
    """peft is not installed: one process, DDP and FSDP train, save and resume as they do stock."""
    site = tmp_path / "site"
    site.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if not entry.name.startswith(("peft", "__editable__")):
                (site / entry.name).symlink_to(entry)
    finished = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", "-c", ABSENT, str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *FOLDERS, site))),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found == {name: [] for name in found}


ONLY_ACCELERATE = """
import os, sys, tempfile
import torch
from accelerate import Accelerator

os.chdir(tempfile.mkdtemp())
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(2, 2)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
accelerator.backward(model(torch.ones(1, 2)).sum())
optimizer.step()
accelerator.get_state_dict(model)
accelerator.save_state("state")
accelerator.load_state("state")
accelerator.save_model(model, "model")
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_a_save_without_adapters_imports_nothing(python: Callable[..., str]) -> None:
    """accelerate alone: its first save must not bring peft, transformers and bitsandbytes with it."""
    stock, patched = (
        set(python(line + ONLY_ACCELERATE).splitlines()[-1].split())
        for line in ("", "import trainer_fsdp_patch; trainer_fsdp_patch.patch()")
    )
    assert patched - stock <= {"trainer_fsdp_patch", "wrapt", "packaging", "rich"}
