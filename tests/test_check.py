"""`check` as a person sees it: what it refuses, what it says meanwhile, its verdict, and that it leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from trainer_fsdp_patch import cli, versions
from trainer_fsdp_patch.checking import network, options, setups
from trainer_fsdp_patch.checking.errors import CheckError
from trainer_fsdp_patch.testing import forks
from trainer_fsdp_patch.testing.case import Outcome

CHECK = [sys.executable, "-m", "trainer_fsdp_patch", "check"]


def checked(*arguments: str, before: str = "", under: tuple[str, ...] = (), **environment: str) -> Any:
    """Run the command in a process of its own, after some lines of Python where there are any."""
    program = [sys.executable, "-c", f"import sys\n{before}\nfrom trainer_fsdp_patch import cli\nsys.exit(cli.main())"]
    command = [*under, *([*program, "check"] if before else CHECK), *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def refused(finished: Any) -> str:
    """The one line of a `check` that has printed nothing else on standard error."""
    assert finished.returncode == 2, finished.stdout + finished.stderr
    [line] = finished.stderr.splitlines()
    return str(line)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "FSDP3"], "check --only: no set-up has 'FSDP3' in its name. Nothing was trained. There are: FSDP1"),
        (["--method", "lor"], "check --method: 'lor' was given. Nothing was trained. Choose one of vera, lora"),
        (["--quantize", "2bit"], "Choose one of none, 4bit, 8bit."),
        (["--ranks", "1"], "check --ranks: '1' was given. Nothing was trained. Give a whole number, 2 or more."),
        (["--ranks", "2.5"], "'2.5' was given"),
        (["--ranks", "two"], "'two' was given"),
        (["--timeout", "0"], "Give a number of seconds above 0."),
        (["--timeout", "nan"], "'nan' was given"),
        (["--keep", ""], "check --keep: '' was given"),
        (["--keep", str(ROOT / "tests")], "in it. Nothing was trained. Name a new or an empty folder."),
        (["--keep", str(ROOT / "setup.cfg")], "nothing can be written there: File exists."),
    ],
)
def test_bad_input_gets_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(CheckError, match=r"^check --quantize: bitsandbytes is not installed\. Nothing was trained\."):
        setups.refuse_absent("vera", "4bit")
    setups.refuse_absent("vera", "none")


def test_a_method_that_the_installed_peft_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    setups.refuse_absent("randlora", "none")
    monkeypatch.delattr(peft, "RandLoraConfig")
    with pytest.raises(CheckError, match="has no RandLoraConfig"):
        setups.refuse_absent("randlora", "none")


def test_set_ups_are_chosen_by_parts_of_their_names() -> None:
    assert options.read(cli.parser().parse_args(["check"])).setups == setups.SETUPS
    found = options.read(cli.parser().parse_args(["check", "--only", "ram-eff", "--only", "FSDP1, fp32"])).setups
    assert [setup.name for setup in found] == ["FSDP1, fp32", "FSDP2, RAM-efficient loading"]


def test_each_rank_gets_rows_of_one_global_batch() -> None:
    for ranks, batch in ((2, 4), (3, 3), (4, 4), (8, 8)):
        assert {(item.ranks, item.batch) for item in setups.fitted(setups.SETUPS, ranks, "none")} == {(ranks, batch)}


def test_help_says_exit_codes_duration_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for part in ("exit codes:", "0    every patched cell is right", "130  interrupted", "duration:", "example:"):
        assert part in said
    example = next(line for line in said.splitlines() if line.strip().startswith("python -m trainer_fsdp_patch check"))
    assert options.read(cli.parser().parse_args(example.split()[3:])).method == "lora"


@contextlib.contextmanager
def mounted(folder: Path, choice: str) -> Iterator[Path]:
    """A tiny disk, where this machine lets one be mounted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", choice, "none", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k") as folder:
        line = refused(checked(TMPDIR=str(folder)))
    assert line.startswith(f"TMPDIR={folder}: its disk is full: 65536 bytes are free, and ")
    assert line.endswith("Nothing was trained. Make room, or set TMPDIR to another folder.")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert refused(checked(TMPDIR=str(file))).startswith(f"TMPDIR={file}: nothing can be written there: Not a dir")
    with mounted(tmp_path / "fixed", "ro") as folder:
        assert "nothing can be written there: Read-only file system. " in refused(checked(TMPDIR=str(folder)))
        assert f"check --keep {folder}/new: nothing" in refused(checked("--keep", f"{folder}/new"))


def test_an_error_before_any_training_is_itself(tmp_path: Path) -> None:
    """Here a disk that is filled after it was looked at; the cells would say "Repo id must use alphanumeric chars"."""
    before = "from trainer_fsdp_patch.checking import places\nplaces.ROOM = 0"
    with mounted(tmp_path / "small", "size=64k") as folder:
        line = refused(checked("--only", "FSDP2, fp32", before=before, TMPDIR=str(folder)))
    assert "No space left on device" in line
    assert "on rank 0, before any training. No set-up was trained. " in line


def test_a_loopback_that_is_down_is_named_in_a_second() -> None:
    alone = ("unshare", "--net")
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace can be made")
    start = time.monotonic()
    line = refused(checked(under=alone))
    assert time.monotonic() - start < 5
    assert line.startswith("check: 127.0.0.1 does not answer: Network is unreachable. Ranks could not meet")


def test_an_interface_that_does_not_exist_is_named() -> None:
    line = refused(checked(GLOO_SOCKET_IFNAME="nowhere0"))
    assert line.startswith("GLOO_SOCKET_IFNAME: there is no interface 'nowhere0'. Ranks could not meet. Name one of ")


def test_addresses_of_this_machine_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    network.refuse_deaf_loopback()
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    network.refuse_deaf_gloo()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    network.refuse_deaf_gloo()
    # A name that is an address of another machine is nothing that gloo would take.
    assert not network._is_here("192.0.2.1")
    # No byte reaches one that is not this machine's.
    with pytest.raises(CheckError, match=r"192\.0\.2\.1 does not answer"):
        network._refuse_deaf("192.0.2.1", "host", "Mend it")


def joined(rank: int) -> Outcome:
    """Meets the other rank, and says at which port."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return Outcome(extra={"total": float(total), "port": int(os.environ["MASTER_PORT"])})


def test_a_port_that_another_program_takes_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = forks.free_port
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        ports = iter([taken])
        monkeypatch.setattr(forks, "free_port", lambda: next(ports, 0) or real())
        outcomes = forks.launch(joined, ranks=2)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert [outcome.extra["total"] for outcome in outcomes] == [2.0, 2.0]
    assert taken not in [outcome.extra["port"] for outcome in outcomes]


def test_ports_are_tried_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []
    real = forks.free_port
    monkeypatch.setattr(forks, "free_port", lambda: tries.append(0) or real())  # type: ignore[func-returns-value]

    def never(rank: int) -> Outcome:
        raise OSError(98, "Address already in use")

    outcomes = forks.launch(never, ranks=2)
    assert "Address already in use" in outcomes[0].error
    assert len(tries) == forks.PORTS


def test_what_a_rank_wrote_is_kept() -> None:
    def says(rank: int) -> Outcome:
        os.write(1 + rank, f"rank {rank} was here\n".encode())
        os._exit(3)

    first, _ = forks.launch(says, ranks=2)
    assert first.error == "ended with 3"
    assert first.logs == ["rank 0 was here\n", "rank 1 was here\n"]


MISFIT = """
import dataclasses
from trainer_fsdp_patch import versions
from trainer_fsdp_patch.patching import registry
versions.NEWEST_TESTED["torch"] = "2.0.0"
patch = registry.discover()["{name}"]
patch.seams[0] = dataclasses.replace(patch.seams[0], parameters=("another",))
"""
GONE = """
from trainer_fsdp_patch import versions
from trainer_fsdp_patch.patching import registry
versions.NEWEST_TESTED["torch"] = "2.0.0"
registry.discover()["{name}"].target = "peft.gone"
"""


@pytest.mark.parametrize(
    ("before", "name", "only", "right"),
    [
        (MISFIT, "peft_v0_11_merge", "FSDP2, fp32", True),
        pytest.param(GONE, "peft_v0_11_merge", "FSDP2, fp32", True, marks=pytest.mark.long),
        pytest.param(MISFIT, "transformers_v4_40_wrap_model", "false", False, marks=pytest.mark.long),
    ],
)
def test_newer_releases_are_judged_by_the_cells(before: str, name: str, only: str, right: bool) -> None:
    finished = checked("--only", only, before=before.format(name=name))
    lines = finished.stdout.splitlines()
    assert finished.returncode == int(not right), finished.stdout + finished.stderr
    torch = versions.installed("torch")
    assert f"untested: torch {torch}, newest tested 2.0.0; the cells judge it" in lines
    assert [line for line in lines if line.startswith("stands aside: ")] == [
        next(line for line in lines if line.startswith(f"stands aside: {name}: "))
    ]
    assert lines[-1] == f"{int(right)} of 1 right on untested releases: torch {torch}"


def test_json_progress_and_what_is_kept(tmp_path: Path) -> None:
    """Standard output has JSON alone; the terminal has a bar that names the run, and a line for each cell."""
    screen, terminal = pty.openpty()
    keep = tmp_path / "kept"
    command = [*CHECK, "--json", "--only", "fsdp2, FP32", "--method", "lora", "--keep", str(keep)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=terminal) as running:
        os.close(terminal)
        seen = b""
        with contextlib.suppress(OSError):
            # Linux ends a terminal that nobody holds with an error.
            while part := os.read(screen, 65536):
                seen += part
        os.close(screen)
        assert running.stdout is not None
        found = json.loads(running.stdout.read())
    assert running.returncode == 0, seen
    for part in (b"2 ranks on the CPU", b"FSDP2, fp32: one", b"FSDP2, fp32: patched", b"FSDP2, fp32: right ("):
        assert part in seen
    assert found == json.loads((keep / "check.json").read_text())
    assert (found["method"], found["ranks"], found["verdict"], found["not run"]) == ("lora", 2, "1 of 1 right", [])
    assert found["installed"]["torch"] == str(versions.installed("torch"))
    assert (found["untested"], found["aside"], found["off"]) == ({}, {}, [])
    [cell] = found["cells"]
    assert cell["right"]
    assert cell["relative error"] < 1e-3
    assert cell["seconds"] > cell["patched"]["seconds"] > 0
    assert cell["stock"]["footprint"], cell["stock"]
    assert cell["patched"]["footprint"]["units"] <= cell["stock"]["footprint"]["units"]
    for side in ("one", "stock", "patched"):
        assert (keep / "FSDP2_fp32" / side / "adapter_model.safetensors").is_file()
        assert (keep / "FSDP2_fp32" / side / "rank0.log").is_file()
    assert sorted(path.name for path in keep.iterdir()) == ["FSDP2_fp32", "base", "check.json"]


HANGS = """
import time
from trainer_fsdp_patch.testing import trial
train = trial.train
def hangs(*args):
    return time.sleep(600) if args[-2] else train(*args)
trial.train = hangs
"""
"""A patched rank that never ends."""


def test_the_time_for_everything_is_kept(tmp_path: Path) -> None:
    start = time.monotonic()
    finished = checked("--only", "FSDP2, fp32", "--timeout", "10", before=HANGS, TMPDIR=str(tmp_path))
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert 10 <= time.monotonic() - start < 60
    assert finished.stdout.splitlines()[-1] == "0 of 1 right; not run within 10 s: FSDP2, fp32"
    assert list(tmp_path.iterdir()) == []


def marked(mark: str) -> list[int]:
    """Processes whose environment has a mark, but for those that have ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


KILLS = (signal.SIGTERM, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, *(pytest.param(kill, marks=pytest.mark.long) for kill in KILLS)])
def test_an_interrupted_check_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    mark = uuid.uuid4().hex
    # A shell has what it starts in the background ignore SIGINT, and so would this one's child.
    listens = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listens}\n{HANGS}\nfrom trainer_fsdp_patch import cli\nsys.exit(cli.main())"]
    with subprocess.Popen(
        [*command, "check", "--only", "FSDP2, fp32"],
        cwd=ROOT,
        env={**os.environ, "CHECK_MARK": mark, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        deadline = time.monotonic() + 120
        # The patched run, whose two ranks never end.
        while not list(tmp_path.glob("*/FSDP2_fp32/patched")) or len(marked(mark)) < 3:
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(number)
        _, said = running.communicate(timeout=30)
    if number == signal.SIGKILL:
        # The kernel ends the ranks, and nobody can wait for them.
        while marked(mark):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return
    assert running.returncode == 130
    assert said == "check: interrupted. No process is left, and no verdict is given. Run it again.\n"
    assert marked(mark) == []
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_patched_cell_fails_the_check() -> None:
    before = "from trainer_fsdp_patch.ranks import collectives\ncollectives.average_gradients = lambda *args: 0"
    finished = checked("--only", "FSDP2, fp32", before=before)
    assert finished.returncode == 1, finished.stderr
    assert "differ between ranks" in finished.stdout
    assert finished.stdout.splitlines()[-1] == "0 of 1 right"


def test_ranks_that_do_not_divide_the_batch() -> None:
    finished = checked("--only", "RAM", "--ranks", "3")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "VeRA on 3 ranks next to one process" in finished.stdout


@pytest.mark.long
def test_one_process_that_fails_is_said() -> None:
    before = """
from trainer_fsdp_patch.checking import setups
setups.METHODS = {"vera": setups.Method("VeRA", "VeraConfig", {"unheard": 1})}
"""
    finished = checked("--only", "FSDP2, fp32", before=before)
    assert finished.returncode == 1, finished.stderr
    assert "FSDP2, fp32: one process fails, and there is nothing to compare with: TypeError: " in finished.stdout


@pytest.mark.parametrize(
    ("method", "base", "only", "count"),
    [
        ("vera", "4bit", "FSDP1, fp32", 1),
        *[pytest.param(name, "none", "fp32", 2, marks=pytest.mark.long) for name in setups.METHODS if name != "vera"],
        pytest.param("lora", "8bit", "fp32", 2, marks=pytest.mark.long),
    ],
)
def test_other_methods_and_bases(method: str, base: str, only: str, count: int) -> None:
    finished = checked("--only", only, "--method", method, "--quantize", base)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1] == f"{count} of {count} right"
