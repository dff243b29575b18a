"""What the pages promise: their code blocks run, their commands exist, and their links resolve.

A fenced block is `python`, which runs; `sh` or `console`, whose commands are held against what exists; or `text`, which
is what a command prints. An HTML comment on the line above a fence marks it:

    <!-- not run: needs a model hub -->
    <!-- printed by: python tests/matrix/cells.py; held by: tests/test_matrix.py -->

A `python` fence may have its mark in the fence too: ```{ .python .no-run reason="needs a GPU" }.
"""

from __future__ import annotations

import configparser
import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer_fsdp_patch import cli

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    ROOT / name
    for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/README.md")
]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
CODE = re.compile(r"^(?P<ticks>`{3,}|~{3,})(?P<info>[^\n]*)\n(?P<text>.*?)^(?P=ticks)[ \t]*$", re.MULTILINE | re.DOTALL)

RUN_BY = {
    "mkdocs": ".ci/run",
    "pytest": ".ci/run",
    "trainer_fsdp_patch check": "tests/test_check.py",
    "trainer_fsdp_patch plan": "tests/test_estimating.py",
    "trainer_fsdp_patch repair": "tests/test_verify.py",
    "trainer_fsdp_patch run": "tests/test_run.py",
    "trainer_fsdp_patch seams": "tests/test_seams.py",
    "benchmarks/adapter_step.py": "tests/test_benchmarks.py",
    "benchmarks/base_budget.py": "tests/test_benchmarks.py",
    "benchmarks/loading.py": "tests/test_loading.py",
    "benchmarks/planning.py": "tests/test_benchmarks.py",
    "benchmarks/quantized.py": "tests/test_packed_bases.py",
    "benchmarks/scale.py": "tests/test_benchmarks.py",
    "benchmarks/steps.py": "tests/test_benchmarks.py",
    "examples/quantized_sft.py": "tests/test_examples.py",
    "examples/vera_text_classification.py": "tests/test_example.py",
    "tests/matrix/cells.py": "tests/test_matrix.py",
    "tests/matrix/footprints.py": "tests/test_footprint.py",
    "tests/matrix/mixed.py": "tests/test_matrix.py",
    "tests/programs/cases.py": "tests/test_cases.py",
    "tests/programs/checkpoints.py": "tests/test_checkpoints.py",
    "tests/programs/estimates.py": "tests/test_estimating.py",
    "tests/programs/gpu.py": "tests/test_gpu.py",
    "tests/programs/stacks.py": "tests/test_stacks.py",
    "tests/programs/cover.py": "tests/test_newest.py",
    "tests/programs/triples.py": "tests/test_window.py",
    "tests/programs/window.py": "tests/test_window.py",
    "tests/programs/timeline.py": "tests/test_timeline.py",
    "tests/programs/upstream.py": "tests/test_upstream.py",
    "tests/programs/wheels.py": "tests/test_seams.py",
}
"""What runs a command that is too long for the test of the pages, or the parts of it."""
BY_HAND = (
    ".ci/run",
    "benchmarks/hot_path.py",
    "benchmarks/import_cost.py",
    "benchmarks/one_process.py",
    "benchmarks/save.py",
    "benchmarks/units.py",
    "benchmarks/vera.py",
    "tests/matrix/picture.py",
)
"""Commands that no test runs; only their arguments are held."""


@dataclass(frozen=True)
class Fence:
    """One fenced block of a page: where it is, its language, its text and its mark."""

    place: str
    language: str
    text: str
    mark: str


def fences(text: str, name: str) -> Iterator[Fence]:
    """Every fenced block of a page."""
    for match in CODE.finditer(text):
        above = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        comment = re.fullmatch(r"<!-- (.*) -->", above.strip())
        info = match["info"].strip()
        language = re.match(r"\{?\s*\.?(\w*)", info)
        reason = re.search(r'reason="([^"]*)"', info)
        mark = comment[1] if comment else f"not run: {reason[1] if reason else ''}" if ".no-run" in info else ""
        line = text.count("\n", 0, match.start()) + 1
        yield Fence(f"{name}:{line}", language[1] if language else "", match["text"], mark)


def fault(fence: Fence) -> str:
    """What is wrong with a block, or ""; Python blocks are run."""
    kind, _, reason = fence.mark.partition(": ")
    if kind == "not run":
        return "" if reason.strip() else "a block that is not run says why"
    if fence.language == "python":
        return _python_fault(fence.text)
    if fence.language in ("sh", "console", "bash"):
        return "; ".join(filter(None, map(command_fault, commands(fence.text))))
    if fence.language == "text":
        held = re.fullmatch(r"printed by: (.+); held by: (\S+)", fence.mark)
        if held is None:
            return "nothing says what prints it, and what holds it"
        return command_fault(held[1]) or ("" if (ROOT / held[2]).is_file() else f"no {held[2]}")
    return f"no check knows blocks of {fence.language or 'no language'}"


@functools.cache
def _python_fault(text: str) -> str:
    """How a block fails, or "". A translation has the same blocks as its page, and each is run once."""
    return run([sys.executable, "-c", text])


def run(command: list[str]) -> str:
    """Run in an empty folder; how it failed, or ""."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as empty:
        finished = subprocess.run(
            command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    if finished.returncode == 0:
        return ""
    return f"{shlex.join(command[:4])} ended with {finished.returncode}: {finished.stderr[-400:]}"


def commands(text: str) -> Iterator[str]:
    """The commands of a shell block: without prompts, comments and what a console prints."""
    lines = text.replace("\\\n", " ").splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    for line in prompted or lines:
        words = shlex.split(line, comments=True)
        start = 0
        for place, word in enumerate([*words, "&&"]):
            if word in ("&&", ";", "|"):
                if words[start:place]:
                    yield shlex.join(words[start:place])
                start = place + 1


@functools.cache
def command_fault(command: str) -> str:
    """What a command names that does not exist, or ""; cheap ones are run, once however many pages have them."""
    words = shlex.split(command)
    words = words[: words.index(">")] if ">" in words else words
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    name, *rest = words
    if name in ("python", "python3") and rest[:1] == ["-m"]:
        name, rest = rest[1], rest[2:]
    elif name in ("python", "python3", "torchrun"):
        name, rest = _script(rest)
    check = CHECKS.get(name.replace("-", "_"), _program if (ROOT / name).is_file() else None)
    if check is None:
        return f"no command {name}"
    return check(name, rest)


def _script(words: list[str]) -> tuple[str, list[str]]:
    """The script among a launcher's words, and its arguments."""
    place = next((place for place, word in enumerate(words) if word.endswith(".py")), 0)
    return words[place], words[place + 1 :]


def _known(name: str) -> str:
    if name in BY_HAND:
        return ""
    runner = RUN_BY.get(name)
    if runner is None:
        return f"nothing runs {name}"
    stem = name.split()[-1]
    stem = Path(stem).stem if stem.endswith(".py") else stem
    return "" if stem in (ROOT / runner).read_text() else f"{runner} does not run {name}"


def _program(name: str, words: list[str]) -> str:
    """A file of the repository: its options are declared in it."""
    text = (ROOT / name).read_text()
    options = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    lacking = [option for option in options if f'"{option}"' not in text]
    return f"{name} has no {lacking[0]}" if lacking else _known(name)


def _ours(name: str, words: list[str]) -> str:
    """Our command: the real parser takes it, and what is cheap is run."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            cli.parse(words)
        except SystemExit as ended:
            if ended.code != 0:
                return said.getvalue().strip().splitlines()[-1]
    if not words or words[0] in ("status", "verify", "--version") or "--help" in words:
        with tempfile.TemporaryDirectory() as folder:
            # A path in capitals stands for the reader's own.
            given = [folder if word.isupper() else word for word in words]
            made = run([sys.executable, "-c", ADAPTER, folder]) if folder in given else ""
            return made or run([sys.executable, "-m", "trainer_fsdp_patch", *given])
    return _known(f"trainer_fsdp_patch {words[0]}")


ADAPTER = """
import sys
import torch
from peft import LoraConfig, get_peft_model

settings = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), settings).save_pretrained(sys.argv[1])
"""


def _pip(name: str, words: list[str]) -> str:
    """pip install: pins are those that the package is tested with, and extras exist."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    pins: dict[str, list[SpecifierSet]] = {}
    for item in map(Requirement, extras["test"].split("\n")[1:]):
        pins.setdefault(item.name, []).append(item.specifier)
    if words[:1] != ["install"]:
        return f"pip {words[:1]} is not known"
    for word in words[1:]:
        local = re.fullmatch(r"\.(?:\[(.*)\])?", word)
        if local:
            asked = filter(None, (local[1] or "").split(","))
            lacking = [extra for extra in asked if extra not in extras]
        elif word.startswith("-") or "://" in word:
            lacking = []
        else:
            asked_for = Requirement(word)
            pinned = pins.get(asked_for.name, [asked_for.specifier])
            lacking = [word] if asked_for.specifier and asked_for.specifier not in pinned else []
        if lacking:
            return f"setup.cfg has no {lacking[0]}"
    return ""


def _nox(name: str, words: list[str]) -> str:
    sessions = [words[place + 1] for place, word in enumerate(words) if word == "-s"]
    text = (ROOT / "noxfile.py").read_text()
    lacking = [session for session in sessions if f"\ndef {session}(" not in text]
    return f"noxfile.py has no session {lacking[0]}" if lacking else ""


def _pytest(name: str, words: list[str]) -> str:
    text = (ROOT / "tests" / "conftest.py").read_text()
    for word in words:
        if word.startswith("--") and f'"{word}"' not in text:
            return f"tests/conftest.py has no {word}"
        if not word.startswith("-") and not (ROOT / word).exists():
            return f"no {word}"
    return _known(name)


def _mkdocs(name: str, words: list[str]) -> str:
    return _known(name) if words[:1] in (["build"], ["serve"]) else f"mkdocs {words[:1]} is not known"


CHECKS: dict[str, Callable[[str, list[str]], str]] = {
    "trainer_fsdp_patch": _ours,
    "pip": _pip,
    "nox": _nox,
    "pytest": _pytest,
    "mkdocs": _mkdocs,
}


def anchors(text: str) -> set[str]:
    """Anchors of a page that GitHub and MkDocs both give its headings."""
    found: list[set[str]] = [set(), set()]
    seen: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for heading in re.findall(r"^#{1,6} +(.*?)\s*$", CODE.sub("", text), re.MULTILINE):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        github = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        ascii_only = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        mkdocs = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())
        for place, (slug, sign) in enumerate([(github, "-"), (mkdocs, "_")]):
            again = seen[place][slug]
            found[place].add(f"{slug}{sign}{again}" if again else slug)
            seen[place][slug] += 1
    return found[0] & found[1]


def links(text: str) -> list[str]:
    """Targets of links and pictures within the repository."""
    plain = re.sub(r"`[^`\n]*`", "", CODE.sub("", text))
    found = re.findall(r"\]\(\s*<?([^)>\s]+)", plain) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", plain, re.MULTILINE)
    found += re.findall(r"""(?:href|src)=["']([^"']+)["']""", plain)
    return [target for target in found if not re.match(r"[a-z][a-z+.-]*:", target)]


def dead_links(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere, by file or by anchor."""
    dead = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.is_relative_to(ROOT) and file.is_file()
        known = anchors(text if file == page else file.read_text()) if inside and file.suffix == ".md" else set()
        if not inside or (anchor and anchor not in known):
            dead.append(target)
    return dead
