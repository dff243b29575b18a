"""What `plan` says of a rank's memory, next to what real runs take: counts, states, activations, and what fits."""

from __future__ import annotations

import dataclasses
import functools
import html.parser
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import estimates
import pytest
import yaml
from cells import Bench, Setup
from conftest import ROOT

from trainer_fsdp_patch import cli, support, versions
from trainer_fsdp_patch.estimating import activations, building, estimate, settings
from trainer_fsdp_patch.measuring import memory
from trainer_fsdp_patch.planning.plan import make_plan
from trainer_fsdp_patch.reporting import fitting, folding, making
from trainer_fsdp_patch.reporting.making import Maker
from trainer_fsdp_patch.reporting.options import NOTHING_FITS, Asked
from trainer_fsdp_patch.testing import case, forks, releases, trial

BATCH = activations.Batch(estimates.ROWS, estimates.LENGTH)
_EACH = [
    ("Llama", "lora", "no", False),
    ("Mistral", "vera", "bf16", False),
    ("GPT-2", "lora", "bf16", True),
    ("T5", "lora", "no", False),
    ("BERT", "vera", "no", True),
    ("Qwen3-MoE", "lora", "bf16", False),
]
ONE_OF_EACH = [given for given in _EACH if given[0] in estimates.configurations()]
RECORDED = all(getattr(versions.installed(name), "public", "") == version for name, version in support.PINNED.items())
HAS_FSDP2 = settings.newest() == 2
FSDP2 = pytest.mark.skipif(not HAS_FSDP2, reason="the installed releases have no FSDP2")


def _skip_without_bitsandbytes() -> None:
    if not releases.has_bitsandbytes():
        pytest.skip("the installed releases load no packed weights here")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny base that `check` trains."""
    return trial.tiny_base(tmp_path_factory.mktemp("base"))


def forked(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a process of its own: this one computes nothing."""

    def child(rank: int) -> case.Outcome:
        outcome = case.Outcome()
        outcome.extra["found"] = function(*args)
        return outcome

    [outcome] = forks.launch(child, ranks=1)
    assert not outcome.error, outcome.extra
    return outcome.extra["found"]


def check_margin(found: Any, checkpointing: bool) -> None:
    """The margins that docs/plan.md states."""
    measured = estimates.Measured(*found)
    assert abs(measured.margin) < 0.05, measured
    # What is alive when the forward ends is what autograd keeps, and a few small tensors that models hold.
    over = measured.kept - measured.real_kept
    assert 0 <= over <= (0.25 if checkpointing else 0.001) * measured.real_kept, measured


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: f"{case[0]} {case[1]}")
def test_activations_are_those_of_a_real_pass(case: tuple[str, str, str, bool]) -> None:
    check_margin(forked(estimates.measure, *case), case[3])


@pytest.mark.long
def test_activations_of_every_architecture_and_set_up() -> None:
    for name, method, amp, checkpointing in estimates.cases():
        check_margin(forked(estimates.measure, name, method, amp, checkpointing), checkpointing)


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.parametrize("name", estimates.configurations())
def test_layers_that_are_folded_take_what_all_of_them_take(name: str, checkpointing: bool) -> None:
    with making.quiet():
        model = estimates.built(name, "lora")
        plan = make_plan(model, ranks=2)
        folded, full = (
            activations.measure(model, plan, BATCH, checkpointing=checkpointing, fold=fold) for fold in (True, False)
        )
    assert folded == full
    assert all(parameter.is_meta for parameter in model.parameters())


def test_passes_rise_by_themselves() -> None:
    """Autocast's copies of what trains end with the forward pass, which is the higher one from some layer on."""
    config = estimates.configurations()["Llama"]
    config.num_hidden_layers = 12
    with making.quiet():
        model = building.adapted(building.base(config, "fp32"), building.adapter("lora"))
        plan = make_plan(model, ranks=2, mixed_precision="bf16")
        sizes = [activations.measure(model, plan, BATCH, checkpointing=True, fold=fold) for fold in (True, False)]
    folded, full = sizes
    assert folded == full
    assert full.forward > full.backward


def test_no_guard_of_a_device_that_is_not_there_is_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds for CUDA would start threads for it in the next backward pass. Ranks that are forked then run none."""
    import torch

    asked: list[bool] = []
    monkeypatch.setattr(torch._C, "_ensureCUDADeviceGuardSet", lambda: asked.append(True), raising=False)
    config = estimates.configurations()["Llama"]
    with making.quiet():
        model = building.adapted(building.base(config, "fp32"), building.adapter("lora"))
        plan = make_plan(model, ranks=2)
        activations.measure(model, plan, BATCH, checkpointing=False)
        estimate.optimizer_bytes(plan, "adamw_torch")
    assert asked == []


@pytest.mark.skipif(not versions.at_least("transformers", "5.0.0"), reason="layers read what this takes from them")
def test_layers_that_differ_are_not_folded_into_each_other() -> None:
    """The last five layers attend to 16 tokens only, by a list of the configuration that no layer has."""
    config = estimates.configurations()["Qwen2"]
    config.num_hidden_layers = 10
    config.layer_types = ["full_attention"] * 5 + ["sliding_attention"] * 5
    config.use_sliding_window, config.sliding_window = True, 16
    model: Any = building.adapted(building.base(config, "fp32"), building.adapter("lora"))
    for layer in model.base_model.model.model.layers:
        layer.self_attn.sliding_window = None
        for name in ("attention_type", "layer_type"):
            vars(layer).pop(name, None)
            vars(layer.self_attn).pop(name, None)
    plan = make_plan(model, ranks=2)
    sizes = [activations.measure(model, plan, BATCH, checkpointing=False, fold=fold) for fold in (True, False)]
    assert sizes[0] == sizes[1]
    assert len(set(activations._makes(model, plan).values())) == 2


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
@pytest.mark.parametrize("fsdp", [1, pytest.param(2, marks=FSDP2)])
def test_the_plan_of_a_configuration_is_that_of_the_loaded_model(model: str, fsdp: int, quantize: str | None) -> None:
    _skip_without_bitsandbytes() if quantize else None
    storage = {None: "", "4bit": "uint8", "8bit": "8bit"}[quantize]
    built, _ = building.model(building.configuration(model), "fp32", quantize, "lora")
    found = forked(loaded_plan, model, storage, fsdp)
    assert make_plan(built, fsdp_version=fsdp, ranks=2) == found


def loaded_plan(base: str, storage: str, fsdp: int) -> Any:
    from peft import get_peft_model

    real = get_peft_model(trial.load_base(base, Setup("", storage=storage)), building.adapter("lora"))
    return make_plan(real, fsdp_version=fsdp, ranks=2)


class Configured:
    """A method as `plan` builds it, and callbacks that count what a rank holds in a step."""

    def __init__(self, method: str, held: dict[str, int]) -> None:
        self.method, self.held = method, held

    def __call__(self, model: Any) -> Any:
        from peft import get_peft_model

        return get_peft_model(model, building.adapter(self.method))

    def callbacks(self) -> list[Any]:
        from transformers import TrainerCallback

        held = self.held

        class Counts(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
                parameters = [item for group in optimizer.param_groups for item in group["params"]]
                held["gradients"] = sum(local_bytes(item.grad) for item in parameters if item.grad is not None)

            def on_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
                states = [item for state in optimizer.state.values() for item in state.values()]
                held["optimizer"] = sum(local_bytes(item) for item in states if hasattr(item, "numel"))

        return [Counts()]


def local_bytes(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())


def trained(setup: Setup, method: str, base: str, folder: str, rank: int) -> Any:
    held: dict[str, int] = {}
    outcome = trial.train(setup, Configured(method, held), base, folder, 2, True, rank)
    outcome.extra |= held
    return outcome


SHORT = [
    (Setup("plain", fsdp=1), "lora"),
    (Setup("mixed", fsdp=2, amp="bf16"), "vera"),
    (Setup("full", fsdp=2, storage="uint8", budget="100%"), "lora"),
]
LONG = [
    (Setup("sharded adapter", fsdp=2, placement="shard"), "lora"),
    (Setup("mixed", fsdp=1, amp="bf16"), "vera"),
    (Setup("packed", fsdp=2, storage="uint8"), "lora"),
    (Setup("packed", fsdp=1, storage="uint8"), "lora"),
    (Setup("8bit", fsdp=2, storage="8bit", budget="100%"), "lora"),
]


@pytest.mark.parametrize(
    ("setup", "method"),
    [*SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)],
    ids=lambda value: getattr(value, "name", value),
)
def test_two_ranks_hold_what_the_estimate_says(bench: Bench, tmp_path: Path, setup: Setup, method: str) -> None:
    import trainer_fsdp_patch

    if setup.fsdp == 2 and not releases.has_fsdp2():
        pytest.skip("the installed releases train no FSDP2 on a CPU")
    _skip_without_bitsandbytes() if setup.storage else None
    quantize = {"": None, "uint8": "4bit", "8bit": "8bit"}[setup.storage]
    trainer_fsdp_patch.patch(adapter_placement=setup.placement)
    asked = Asked(bench.base, method, str(setup.fsdp), 2, quantize=quantize, dtype="fp32", length=trial.LENGTH)
    maker = Maker(dataclasses.replace(asked, mixed_precision=setup.amp, base_budget=setup.budget or None))
    plan = maker.plan()
    parts = maker.estimate(plan, 2, checkpointing=False).parts
    trainer_fsdp_patch.unpatch()
    outcomes = forks.launch(trained, setup, method, bench.base, str(tmp_path), ranks=2)
    buffers = sum(item.tensor.nbytes for item in plan.placements if item.tensor.kind == "buffer")
    for outcome in outcomes:
        assert not outcome.error, outcome.extra
        held = sum(parts[name] for name in ("base", "quantized", "projections", "adapter")) - buffers
        assert held == outcome.footprint.rest + outcome.footprint.statistics
        assert parts["gathered"] >= outcome.footprint.gathered
        assert parts["gradients"] == outcome.extra["gradients"]
        assert parts["optimizer"] == outcome.extra["optimizer"]


def plan_command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(["plan", *argv])
    said = capsys.readouterr()
    return code, said.out, said.err


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    code, out, err = plan_command(capsys, *argv, "--json")
    assert err == ""
    return code, json.loads(out)


def test_what_fits_is_found_and_what_does_not_lacks_so_much(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = (model, "--ranks", "2", "--batch", "8", "--length", "48", "--dtype", "fp32")
    code, free = as_json(capsys, *given)
    assert code == 0
    plain, again = (item["peak"] for item in free["estimates"])
    assert again < plain

    def memory_for(size: int) -> str:
        return str(-(-size * memory.MARGIN // (memory.MARGIN - 1)))

    _, fits = as_json(capsys, *given, "--memory", memory_for(plain))
    assert (fits["memory"]["estimate"]["batch"], fits["memory"]["estimate"]["checkpointing"]) == (8, False)
    _, fits = as_json(capsys, *given, "--memory", memory_for(plain - 1000))
    assert (fits["memory"]["estimate"]["batch"], fits["memory"]["estimate"]["checkpointing"]) == (8, True)
    _, fits = as_json(capsys, *given, "--memory", memory_for(again - 1000))
    assert fits["memory"]["estimate"]["batch"] < 8
    assert fits["memory"]["estimate"]["peak"] <= fits["memory"]["usable"]
    taken = fits["memory"]["training_arguments"]
    assert taken["per_device_train_batch_size"] * taken["gradient_accumulation_steps"] == 8
    code, none = as_json(capsys, *given, "--memory", "100KiB")
    assert code == NOTHING_FITS
    assert none["memory"]["lacking"] == none["memory"]["estimate"]["peak"] - none["memory"]["usable"]
    assert none["memory"]["estimate"]["batch"] == 1
    assert none["memory"]["fits_on_ranks"] is None, "what is full on each rank is more than that"


def test_ranks_that_it_would_fit_on_are_said(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fsdp.json"
    file.write_text('{"version": 1}')
    given = (model, "--length", "8", "--dtype", "fp32", "--peft", "vera", "--fsdp", str(file))
    [two, four] = (as_json(capsys, *given, "--ranks", ranks)[1]["estimates"][1]["peak"] for ranks in ("2", "4"))
    assert four < two
    size = str(-(-four * memory.MARGIN // (memory.MARGIN - 1)))
    code, answer = as_json(capsys, *given, "--ranks", "2", "--memory", size)
    assert (code, answer["memory"]["fits_on_ranks"]) == (NOTHING_FITS, 4)
    assert "It fits on 4 ranks." in plan_command(capsys, *given, "--ranks", "2", "--memory", size)[1]


def test_reasons_that_name_a_unit_keep_none_apart(model: str) -> None:
    maker = Maker(Asked(model, "lora", "1", 2, length=8, dtype="bf16"))
    for name, parameter in maker.model.named_parameters():
        if name.endswith("input_layernorm.weight"):
            parameter.data = parameter.data.float()
    groups = folding.groups(maker.plan())
    [layers] = [group for group in groups if "layers" in group.name]
    assert layers.times == 2
    reasons = [row.reason for row in layers.rows]
    assert "float32 in the bfloat16 unit; FSDP1 takes one dtype" in reasons


def test_room_that_is_left_keeps_units_full(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, answer = as_json(capsys, model, "--ranks", "2", "--length", "48", "--memory", "1GiB")
    assert any(unit["resident"] for unit in answer["units"])
    assert answer["traffic"]["gathers"] == 0
    budget = answer["memory"]["base_budget"]
    _, out, _ = plan_command(capsys, model, "--ranks", "2", "--length", "48", "--memory", "1GiB")
    assert f'patch(base_budget="{budget}")' in out


@pytest.mark.parametrize("fsdp", ["1", "2"])
def test_the_lines_are_taken_by_trainer_and_accelerate(model: str, tmp_path: Path, fsdp: str) -> None:
    maker = Maker(Asked(model, "lora", fsdp, 2, 2**24, 8, 48, mixed_precision="bf16"))
    found = fitting.fit(maker)
    assert found.fits
    [version, checkpointing, size] = forked(arguments_of, fitting.script(maker, found.estimate, found.accumulation))
    assert (version, checkpointing) == (found.estimate.plan.fsdp_version, found.estimate.checkpointing)
    assert size == found.estimate.rows
    path = tmp_path / "accelerate.yaml"
    path.write_text(fitting.yaml(maker, found.estimate))
    read = settings.read(str(path))
    assert (read.version, read.checkpointing) == (version, checkpointing)
    assert (read.ranks, read.mixed_precision) == (2, "bf16")
    from accelerate.commands.config.config_args import ClusterConfig

    loaded = ClusterConfig.from_yaml_file(path)
    assert loaded.fsdp_config == yaml.safe_load(path.read_text())["fsdp_config"]


def arguments_of(script: str) -> list[Any]:
    import warnings

    from transformers import TrainingArguments

    os.environ |= {"ACCELERATE_USE_CPU": "1"}
    names: dict[str, Any] = {"TrainingArguments": functools.partial(TrainingArguments, use_cpu=True)}
    with warnings.catch_warnings():
        # transformers warns of FSDP1.
        warnings.simplefilter("ignore")
        exec(f"import trainer_fsdp_patch\n{script}", names)
    arguments = names["arguments"]
    version = arguments.fsdp_config.get("version") or arguments.fsdp_config.get("fsdp_version")
    again = bool(arguments.fsdp_config.get("activation_checkpointing"))
    return [version, again, arguments.per_device_train_batch_size]


def bad_inputs(model: str, folder: Path) -> Iterator[tuple[list[str], str]]:
    """Command lines, and what their line says."""

    def file(name: str, text: str) -> str:
        (folder / name).write_text(text)
        return str(folder / name)

    known = json.loads((Path(model) / "config.json").read_text())
    yield ["./nowhere"], "no file"
    yield [file("config.json", json.dumps(known | {"model_type": "llama9"}))], "llama9"
    yield [file("broken.json", "{")], "cannot be read as JSON"
    yield [file("other.json", "{}")], "no model_type"
    yield ["somebody/some-model"], "Offline"
    yield [file("gptq.json", json.dumps(known | {"quantization_config": {"quant_method": "gptq"}}))], "gptq"
    yield [model, "--peft", "nothing"], "no file nothing"
    yield [model, "--peft", file("newer.json", '{"peft_type": "LORA9"}')], "LORA9"
    yield [model, "--peft", file("odd.json", '{"peft_type": "LORA", "target_modules": ["nowhere"]}')], "does not fit"
    yield [model, "--fsdp", "3"], "no file 3"
    yield [model, "--fsdp", file("a.yaml", "distributed_type: MULTI_GPU\nfsdp_config: {}")], "MULTI_GPU"
    yield [model, "--fsdp", file("b.yaml", "fsdp_config: [1")], "no YAML"
    both = "fsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: FULL_SHARD}"
    yield [model, "--fsdp", file("c.yaml", both)], "FULL_SHARD with fsdp_version 2"
    yield [model, "--fsdp", file("d.json", '{"version": 2, "forward_prefetch": true}')], "forward_prefetch"
    yield [model, "--fsdp", file("e.json", '{"versoin": 2}')], "no such setting"
    yield [model, "--fsdp", file("f.json", '{"version": 1, "reshard_after_forward": true}')], "True with fsdp_version 1"
    yield [model, "--fsdp", file("g.yaml", "fsdp_config: {}\nnum_processes: 4"), "--ranks", "2"], "num_processes 4"
    yield [model, "--fsdp", file("h.json", '{"cpu_offload": true}')], "not estimated"
    yield [model, "--ranks", "0"], "'0' is no number"
    yield [model, "--batch", "-1"], "is no number"
    yield [model, "--memory", "much"], "'much' is no size"
    yield [model, "--memory", "50%"], "'50%' is no size"
    yield [model, "--memory", "0"], "'0' is no size"
    yield [model, "--quantize", "3bit"], "Use one of 4bit, 8bit"
    yield [model, "--optim", "adamm"], "adamm"
    yield [model, "--base-budget", "auto"], "--memory"
    yield [model, "--base-budget", "lots"], "'lots'"
    yield [model, "--html", str(folder)], "is a folder"
    yield [model, "--html", str(folder / "gone" / "plan.html")], "no folder"


def test_bad_input_is_one_line_and_exit_code_2(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {path.name for path in tmp_path.iterdir()}
    for argv, said in bad_inputs(model, tmp_path):
        code, out, err = plan_command(capsys, *argv)
        assert (code, out, err.count("\n")) == (2, "", 1), (argv, err)
        assert said in err, (argv, err)
        assert "--debug" not in err, "nobody expected it"
    assert not {path.name for path in tmp_path.rglob("*.html")} - before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    code, _, err = plan_command(capsys, model, "--html", str(tmp_path / "plan.html"))
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot be written to" in err


def test_a_page_that_cannot_be_finished_leaves_what_was_there(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "plan.html"
    page.write_text("before")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = plan_command(capsys, model, "--html", str(page))
    assert (code, err.count("\n")) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]
    assert page.read_text() == "before"


class Page(html.parser.HTMLParser):
    """Counts what is open, and collects what refers elsewhere and what pictures say."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.labels: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.outside += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "svg":
            assert given["role"] == "img"
            self.labels.append(given["aria-label"] or "")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """What is closed where it is opened; none of these refers to anything."""
        assert tag in ("rect", "line")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file_and_says_what_it_shows(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.html"
    code, out, _ = plan_command(capsys, model, "--memory", "1MiB", "--batch", "2", "--html", str(path))
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert code in (0, NOTHING_FITS)
    assert page.open == []
    assert page.outside == []
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.labels) >= 2
    assert all(re.search(r"estimated: base \d", label) for label in page.labels)
    for word in ('lang="en"', "width=device-width", "prefers-color-scheme: dark", "<title>"):
        assert word in text
    # Text and page say the same.
    verdict = re.search(r'class="verdict">(.*?)</p>', text)
    assert verdict is not None
    assert verdict[1] in out


def test_names_from_files_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    folder = tmp_path / "<i>&"
    folder.mkdir()
    (folder / "config.json").write_text((Path(model) / "config.json").read_text())
    assert plan_command(capsys, str(folder), "--html", str(tmp_path / "plan.html"))[0] == 0
    text = (tmp_path / "plan.html").read_text()
    assert "<i>" not in text
    assert text.count("&lt;i&gt;&amp;") == 2, "title and heading"


def test_the_text_folds_layers_and_gives_reasons(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = plan_command(capsys, model, "--ranks", "2", "--peft", "vera", "--mixed-precision", "bf16")
    assert code == 0
    for said in ("layers.0-1 x2", "frozen and owned by the adapter", "param_dtype = bfloat16", "a step gathers units"):
        assert said in out
    assert "activations" in out


def test_quantized_bases_are_sharded_as_patched_runs_shard_them(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    _skip_without_bitsandbytes()
    given = (model, "--ranks", "2", "--dtype", "bf16", "--length", "48")
    [plain, packed] = (as_json(capsys, *given, *more)[1] for more in ((), ("--quantize", "4bit")))
    layers = [unit for unit in packed["units"] if "layers" in unit["name"]]
    rows = [row for unit in layers for row in unit["rows"] if row["role"] == "quantized"]
    assert {row["placement"] for row in rows} == {"shard"}
    sizes = [answer["estimates"][0]["bytes"] for answer in (plain, packed)]
    assert sizes[1]["quantized"] + sizes[1]["base"] < sizes[0]["base"] / 2
    # While a layer computes, it is unpacked to 16 bits.
    known = json.loads((Path(model) / "config.json").read_text())
    assert sizes[1]["activations"] - sizes[0]["activations"] == 2 * known["hidden_size"] * known["intermediate_size"]


def test_a_model_that_needs_data_is_planned_without_activations(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("it reads values")

    monkeypatch.setattr(activations, "measure", reads)
    code, answer = as_json(capsys, model, "--ranks", "2")
    assert code == 0
    assert "it reads values" in answer["estimates"][0]["activations_unknown"]
    assert answer["estimates"][0]["bytes"]["activations"] == 0
    assert as_json(capsys, model, "--ranks", "2", "--memory", "1GiB")[0] == NOTHING_FITS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"version": 2, "reshard_after_forward": false}', settings.Fsdp(2, gathers=1)),
        ('{"version": 2, "activation_checkpointing": true}', settings.Fsdp(2, checkpointing=True)),
        (
            '{"version": 1, "use_orig_params": "false", "backward_prefetch": "backward_pre"}',
            settings.Fsdp(1, use_orig_params=False, prefetched=True),
        ),
        (
            '{"fsdp_version": 1, "fsdp_sharding_strategy": "NO_SHARD"}',
            settings.Fsdp(1, shards=False, use_orig_params=True),
        ),
        (
            '{"transformer_layer_cls_to_wrap": "LlamaDecoderLayer", "version": 2}',
            settings.Fsdp(2, units=("LlamaDecoderLayer",)),
        ),
    ],
)
def test_files_are_read(tmp_path: Path, text: str, expected: settings.Fsdp) -> None:
    path = tmp_path / "fsdp.json"
    path.write_text(text)
    assert settings.read(str(path)) == expected


def test_optimizers_are_counted_by_a_step(model: str) -> None:
    plan = Maker(Asked(model, "lora", "2", 2, length=8)).plan()
    trained = [item.tensor for item in plan.placements if item.tensor.trainable]
    elements = sum(item.nbytes // 4 for item in trained)
    assert estimate.optimizer_bytes(plan, "adamw_torch") == 8 * elements + 4 * len(trained)
    assert estimate.optimizer_bytes(plan, "sgd") == 0
    assert 0 < estimate.optimizer_bytes(plan, "adafactor") < 8 * elements


def test_numbers_that_follow_each_other_are_one_range() -> None:
    assert folding._together(["h.0.a.1", "h.1.a.1", "h.2.a.1", "h.5.a.1"]) == "h.0-2,5.a.1"
    assert folding._together(["h.3", "h.4"]) == "h.3-4"
    assert folding._together([f"h.{place}" for place in (0, 2, 3, 7, 9)]) == "h.0..9"


@pytest.mark.parametrize("case", ONE_OF_EACH[:3], ids=lambda case: f"{case[0]} {case[1]}")
def test_the_page_has_what_the_program_prints(case: tuple[str, str, str, bool]) -> None:
    if not RECORDED:
        pytest.skip("the record is that of the pinned releases")
    row = "| " + " | ".join(estimates.row(*case, estimates.Measured(*forked(estimates.measure, *case)))) + " |"
    assert row in (ROOT / "docs" / "plan.md").read_text()


@pytest.mark.skipif(not RECORDED, reason="older releases have fewer models")
def test_the_page_has_every_case() -> None:
    text = (ROOT / "docs" / "plan.md").read_text()
    margins = [float(found) for found in re.findall(r"([+-]\d+\.\d)% \|$", text, re.MULTILINE)]
    assert len(margins) == len(list(estimates.cases()))
    assert f"off by {min(margins):.1f} to +{max(margins):.1f} %" in text
