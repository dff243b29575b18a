"""Every supported stack in a fresh environment.

`nox` trains five adapters on each stack, stock and patched, and prints the table of all. `nox -s patches` runs the
patches' own tests on each, `nox -s newest` judges the newest of everything, and `nox -s torches` runs the stacks with
the torch releases whose PyPI builds bring several GB. `nox -s gpu` trains on the accelerators that are here.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import nox

nox.options.sessions = ["stack", "table"]
nox.options.reuse_venv = "no"

RESULTS = Path(__file__).parent / ".nox" / "stacks"
SUPPORT = runpy.run_path(str(Path(__file__).parent / "trainer_fsdp_patch" / "support.py"))
"""The support window; nox need not have the package."""
TORCH, BITSANDBYTES = (SUPPORT["PINNED"][package] for package in ("torch", "bitsandbytes"))
STACKS, IN_CI = SUPPORT["STACKS"], SUPPORT["IN_CI"]
OTHER_TORCHES = list(SUPPORT["TORCHES"].items())

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
def newest(session: nox.Session) -> None:
    """Judge the newest of everything that the index has: `nox -s newest -- [--pre] [--markdown FILE] [PIN ...]`.

    `--pre` takes release candidates too. A pin, such as transformers==5.24.0, takes the place of the newest.
    """
    pre = ["--pre"] if "--pre" in session.posargs else []
    pins = [argument for argument in session.posargs if "==" in argument]
    rest = [argument for argument in session.posargs if argument not in (*pre, *pins)]
    packages = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")
    free = [package for package in packages if not any(pin.startswith(f"{package}==") for pin in pins)]
    quantizers = ("torchao", "optimum-quanto")
    extra = [*quantizers, "scipy", "scikit-learn", "deepspeed", "pytest", "pytest-timeout", "-e", "."]
    session.install("--upgrade", *pre, *free, *pins, *extra)
    session.run("python", "tests/programs/newest.py", *rest)


@nox.session
@nox.parametrize("torch", OTHER_TORCHES, ids=[torch for torch, _ in OTHER_TORCHES])
def torches(session: nox.Session, torch: tuple[str, tuple[str, str, str]]) -> None:
    """Other torch releases; by hand, for each brings several GB."""
    install(session, torch[1], torch[0])
    train(session, f"torch-{torch[0]}")


# A torch that is installed already, for ROCm or XPU, is of this machine's devices; the index has CUDA's alone.
@nox.session(venv_params=["--system-site-packages"])
def gpu(session: nox.Session) -> None:
    """Train on the accelerators that are here: `nox -s gpu -- [--only TEXT] [--json FILE]`.

    `nox -s gpu --no-venv` takes the releases of the environment that is active, and installs nothing.
    """
    packages = ("transformers", "accelerate", "peft", "bitsandbytes")
    pins = [f"{package}=={SUPPORT['PINNED'][package]}" for package in packages]
    if session.venv_backend != "none":
        session.install("torch", *pins, "-e", ".")
    session.run("python", "tests/programs/gpu.py", *session.posargs)
