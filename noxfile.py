"""Every supported stack in a fresh environment.

`nox` trains five adapters on each stack, stock and patched, and prints the table of all. `nox -s patches` runs the
patches' own tests on each, `nox -s upcoming` everything on the newest pre-releases, and `nox -s torches` the stacks
with the torch releases whose PyPI builds bring several GB.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.sessions = ["stack", "table"]
nox.options.reuse_venv = "no"

RESULTS = Path(__file__).parent / ".nox" / "stacks"
TORCH = "2.13.0"
BITSANDBYTES = "0.50.2"

STACKS = [
    ("4.40.0", "0.30.0", "0.11.0"),  # oldest; VeRA is new
    ("4.44.2", "0.33.0", "0.12.0"),  # adapters in fp32 beside a bf16 base
    ("4.46.3", "1.1.1", "0.13.2"),  # the loss is divided by the tokens of all ranks
    ("4.48.3", "1.2.1", "0.14.0"),  # VeRA on packed weights
    ("4.50.3", "1.5.2", "0.15.0"),  # PEFT's wrap policy for every method; auxiliary wrappers
    ("4.51.3", "1.6.0", "0.15.2"),  # FSDP2, sharded checkpoints only
    ("4.53.3", "1.8.1", "0.16.0"),  # FSDP2 by a path of its own; RandLora
    ("4.55.4", "1.10.1", "0.17.1"),  # prefixes of auxiliary wrappers
    ("4.57.6", "1.12.0", "0.18.1"),  # last 4.x
    ("5.1.0", "1.7.0", "0.18.1"),  # the plugin is made from arguments; first full FSDP2 checkpoints
    ("5.3.0", "1.12.0", "0.18.1"),  # update_fsdp_plugin_peft
    ("5.9.0", "1.13.0", "0.19.1"),  # last whose default is FSDP1; the upcast does nothing
    ("5.14.1", "1.14.0", "0.20.0"),  # transformers.distributed
    ("5.17.0", "1.14.0", "0.19.1"),  # EmbeddingParallel is gone
    ("5.19.0", "1.14.0", "0.21.1"),  # peft finds tensors by prefix
    ("5.24.0", "1.15.0", "0.21.2"),  # newest
]
"""transformers, accelerate and peft: the oldest, each turn of the code that the patches wrap, the newest."""

IN_CI = [STACKS[0], STACKS[6]]
"""Those that `.ci/run` adds to the newest."""

OTHER_TORCHES = [
    ("2.2.2", STACKS[0]),
    ("2.4.1", STACKS[2]),
    ("2.6.0", STACKS[5]),
    ("2.9.1", STACKS[8]),
]

NAMES = ["-".join(stack) for stack in STACKS]


def install(session: nox.Session, stack: tuple[str, str, str], torch: str = TORCH) -> None:
    """Torch first, so that a CPU build that lies on the machine is not replaced."""
    # Torch 2.2 is built on numpy 1, and no bitsandbytes that runs on a CPU supports it.
    old = torch.startswith("2.2.")
    session.install(f"torch=={torch}", *(["numpy<2"] if old else []))
    pins = [f"{name}=={version}" for name, version in zip(("transformers", "accelerate", "peft"), stack, strict=True)]
    extra = ["numpy<2"] if old else [f"bitsandbytes=={BITSANDBYTES}"]
    session.install(*pins, *extra, f"torch=={torch}", "scipy", "pytest", "pytest-timeout", "-e", ".")


def train(session: nox.Session, name: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    result = RESULTS / f"{name}.json"
    result.unlink(missing_ok=True)
    session.run("python", "tests/programs/stacks.py", "--json", str(result), *session.posargs)


@nox.session
@nox.parametrize("stack", STACKS, ids=NAMES)
def stack(session: nox.Session, stack: tuple[str, str, str]) -> None:
    """Train, save and resume on one stack."""
    install(session, stack)
    train(session, "-".join(stack))


@nox.session
def table(session: nox.Session) -> None:
    """Print what the stacks gave."""
    session.install("-e", ".")
    results = [RESULTS / f"{name}.json" for name in (*NAMES, *(f"torch-{torch}" for torch, _ in OTHER_TORCHES))]
    found = [str(result) for result in results if result.exists()]
    session.run("python", "tests/programs/stacks.py", *session.posargs, "--table", *found)


@nox.session
@nox.parametrize("stack", STACKS, ids=NAMES)
def patches(session: nox.Session, stack: tuple[str, str, str]) -> None:
    """The patches' own tests, of those whose range holds, on one stack."""
    install(session, stack)
    # Other releases have warnings of their own.
    session.run("python", "-m", "pytest", "-o", "filterwarnings=default", "tests/patches", "tests/test_seams.py")


@nox.session
@nox.parametrize("stack", IN_CI, ids=["-".join(stack) for stack in IN_CI])
def ci(session: nox.Session, stack: tuple[str, str, str]) -> None:
    """What CI runs on each stack beside the newest: patched training, and the patches' own tests."""
    install(session, stack)
    session.run("python", "tests/programs/stacks.py", "--no-stock")
    session.run("python", "-m", "pytest", "-o", "filterwarnings=default", "-q", "tests/patches", "tests/test_seams.py")


@nox.session
def upcoming(session: nox.Session) -> None:
    """The newest pre-releases: what moved, and whether the patches hold. It may fail."""
    session.install(f"torch=={TORCH}")
    extra = [f"bitsandbytes=={BITSANDBYTES}", "scipy", "pytest", "pytest-timeout", "-e", "."]
    session.install("--pre", "--upgrade", *(session.posargs or ("transformers", "accelerate", "peft")), *extra)
    either = [0, 1]
    session.run("python", "-m", "trainer_fsdp_patch", "seams", success_codes=either)
    session.run("python", "tests/programs/stacks.py", "--no-stock", success_codes=either)
    command = ["python", "-m", "pytest", "-o", "filterwarnings=default", "-q", "tests/patches"]
    session.run(*command, success_codes=either)


@nox.session
@nox.parametrize("torch", OTHER_TORCHES, ids=[torch for torch, _ in OTHER_TORCHES])
def torches(session: nox.Session, torch: tuple[str, tuple[str, str, str]]) -> None:
    """Other torch releases; by hand, for each brings several GB."""
    install(session, torch[1], torch[0])
    train(session, f"torch-{torch[0]}")
