"""Mutation testing of the files of the losses: change one operator or number at a time, and see whether a test fails.

    python tests/mutants.py                            # every method's file; `make mutants`
    python tests/mutants.py dpop chipo --jobs 2        # those of some methods
    python tests/mutants.py --file trl_ift/memory.py --tests tests/test_check.py

Everything heavy is imported once; each mutant runs in a fork of that process, which sees the changed source and stops at the
first test that fails. What survives is printed with its line. Outcomes are kept (`--output`): a run goes on where it was;
they are those of a source and of its tests, and forgotten when either changes. Known survivors and why they are none:
`EQUIVALENT`.
"""

import argparse
import ast
import copy
import hashlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
# Source line after the change -> why no test could tell it from the original
EQUIVALENT: dict[str, str] = {
    # aligned_sft.py
    "near, far = (x.clamp(min=-math.log(3)), x.clamp(max=-math.log(2)))": "the value is taken for x > -log 2 alone",
    "return torch.where(x >= -math.log(2), torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))": (
        "both branches are log(1/2) at x = -log 2"
    ),
    "aligned = align_loss(chosen, rejected.detach(), args.beta)": "what is recorded is detached once more",
    "aligned = align_loss(chosen.detach(), rejected, args.beta)": "what is recorded is detached once more",
}
_BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
           ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}  # fmt: skip
_COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
_NAMES = {"sum": "mean", "mean": "sum", "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum",
          "logsigmoid": "sigmoid", "relu": "abs", "clamp_min": "clamp_max", "clamp_max": "clamp_min", "chosen": "rejected",
          "rejected": "chosen", "exp": "abs", "expm1": "exp", "log1p": "log", "softmax": "log_softmax",
          "cumsum": "cumprod", "any": "all", "all": "any"}  # fmt: skip
_TIMEOUT = 180


# ---------------------------------------------------------------- mutants


@dataclass(frozen=True)
class Mutant:
    """A changed source.

    Attributes:
        line: Number of the changed line.
        before, after: The statement before and after, unparsed.
        source: The whole module.
    """

    line: int
    before: str
    after: str
    source: str


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may stand in the place of one."""
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        changed = copy.copy(node)
        changed.op = _BINARY[type(node.op)]()
        yield changed
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARE:
        changed = copy.copy(node)
        changed.ops = [_COMPARE[type(node.ops[0])](), *node.ops[1:]]
        yield changed
    elif isinstance(node, ast.BoolOp):
        changed = copy.copy(node)
        changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        changed = copy.copy(node)
        changed.attr = _NAMES[node.attr]
        yield changed
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args and not node.keywords:
        if node.func.attr in ("detach", "float"):
            yield node.func.value
    elif isinstance(node, ast.IfExp):
        changed = copy.copy(node)
        changed.body, changed.orelse = node.orelse, node.body
        yield changed
    elif isinstance(node, ast.If):
        changed = copy.copy(node)
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed


def mutants_of(source: str) -> list[Mutant]:
    """All mutants of a module: not of its annotations, texts, imports and citations."""
    tree = ast.parse(source)
    found = []

    def visit(parent: ast.AST, statement: ast.stmt) -> None:
        for name, value in ast.iter_fields(parent):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            children = value if isinstance(value, list) else [value]
            for index, child in enumerate(children):
                if not isinstance(child, ast.AST) or isinstance(child, ast.Import | ast.ImportFrom):
                    continue
                if isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "_paper":
                    continue
                own = child if isinstance(child, ast.stmt) else statement
                for changed in _changes(child):
                    before = _text(own)
                    put(parent, name, index, changed)
                    after = _text(changed if own is child else own)
                    if after != before:
                        found.append(Mutant(own.lineno, before, after, ast.unparse(ast.fix_missing_locations(tree))))
                    put(parent, name, index, child)
                visit(child, own)

    def put(parent: ast.AST, name: str, index: int, child: ast.AST) -> None:
        if isinstance(getattr(parent, name), list):
            getattr(parent, name)[index] = child
        else:
            setattr(parent, name, child)

    visit(tree, tree.body[0])
    return found


def _text(statement: ast.AST) -> str:
    """A statement on one line: of one with a body its head."""
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(statement))).split("\n")[0]


# ---------------------------------------------------------------- running


class _Source(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module another source."""

    def __init__(self, name: str, path: Path, source: str):
        self.name, self.path, self.source = name, path, source

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            return importlib.util.spec_from_file_location(fullname, self.path, loader=self)
        return None

    def exec_module(self, module):
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def start(path: Path, source: str, arguments: list[str]) -> int:
    """Run the tests with another source of a file in a fork; return its process id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    sys.meta_path.insert(0, _Source(name, path, source))
    import pytest

    try:
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
    except BaseException:
        status = 1
    os._exit(status)


def survivors_of(path: Path, sources: Sequence[str], arguments: list[str], jobs: int) -> Iterator[tuple[int, bool]]:
    """Whether the tests pass with each of the sources, as (index, outcome), in the order in which they end."""
    waiting, running = list(enumerate(sources)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            index, source = waiting.pop(0)
            running[start(path, source, arguments)] = index, time.monotonic() + _TIMEOUT
        for child, (index, deadline) in list(running.items()):
            finished, status = os.waitpid(child, os.WNOHANG)
            if not finished and time.monotonic() > deadline:  # without an end, which a test would wait for too
                os.killpg(child, signal.SIGKILL)
                finished, status = os.waitpid(child, 0)
            if finished:
                del running[child]
                yield index, os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)


def tests_of(name: str, path: Path) -> list[str]:
    """Arguments of pytest for the tests of a method, the quick ones first."""
    own = ROOT / "tests" / f"test_{path.stem}.py"
    ids = [f"{ROOT}/tests/{file}" for file in ("test_pure_losses.py", "test_family.py")]
    selected = (
        [str(own)] if own.is_file() else [str(p) for p in sorted((ROOT / "tests").glob(f"test_{path.stem}*.py"))]
    )
    if path.parent.name == "unpaired":
        selected.append(f"{ROOT}/tests/test_unpaired.py")
    words = {name, path.stem, path.stem.replace("_", "-")}
    return [*selected, *ids, f"{ROOT}/tests/test_methods.py", "-m", "not slow", "-k", " or ".join(
        sorted({f"test_{path.stem}", *words, *(["test_unpaired"] if path.parent.name == "unpaired" else [])})
    )]  # fmt: skip


def digest(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def run(path: Path, arguments: list[str], jobs: int, output: Path) -> list[Mutant]:
    """Try all mutants of a file; return those that survive."""
    source = path.read_text()
    files = [Path(argument) for argument in arguments if argument.endswith(".py")]
    label = str(path.relative_to(ROOT))
    known = json.loads(output.read_text()) if output.is_file() else {}
    key = digest([path, *files])
    outcomes = known[label]["outcomes"] if known.get(label, {}).get("key") == key else {}
    if [outcome for _, outcome in survivors_of(path, [source], arguments, 1)] != [True]:
        raise SystemExit(f"{label}: its tests fail without a change: pytest {' '.join(arguments)}")
    mutants, survivors = mutants_of(source), []
    names = [f"{mutant.line}: {hashlib.sha256(mutant.source.encode()).hexdigest()[:12]}" for mutant in mutants]
    untried = [index for index, name in enumerate(names) if name not in outcomes]
    try:
        for position, outcome in survivors_of(path, [mutants[index].source for index in untried], arguments, jobs):
            outcomes[names[untried[position]]] = outcome
    finally:
        known[label] = {"key": key, "outcomes": outcomes}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(known, indent=1))
    for mutant, name in zip(mutants, names, strict=True):
        if outcomes[name] and mutant.after not in EQUIVALENT:
            survivors.append(mutant)
            print(f"{label}:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}", flush=True)
    print(f"{label}: {len(mutants) - len(survivors)} of {len(mutants)} mutants killed or explained", flush=True)
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="commands of methods; by default all")
    parser.add_argument("--file", type=Path, help="another file, with --tests")
    parser.add_argument("--tests", nargs="+", default=[], help="arguments of pytest for --file")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutants.json", help="where outcomes are kept")
    parser.add_argument("--list", action="store_true", help="print the mutants, and run none")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from trl_ift.registry import METHODS, get_method

    if args.file is not None:
        work = [(args.file.resolve(), args.tests)]
    else:
        methods = [get_method(name) for name in args.methods] or list(METHODS)
        files = {ROOT / f"{method.module.replace('.', '/')}.py": method.name for method in methods}
        work = [(path, tests_of(name, path)) for path, name in files.items() if path.stem != "trainer"]
    if args.list:
        for path, _ in work:
            for mutant in mutants_of(path.read_text()):
                print(f"{path.name}:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}")
        return 0

    for name in [name for name in sys.modules if name.split(".")[0] == "trl_ift"]:
        del sys.modules[name]  # each fork imports it anew
    os.environ["OMP_NUM_THREADS"] = "1"
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer  # noqa: F401

    torch.set_num_threads(1)
    found = [mutant for path, arguments in work for mutant in run(path, arguments, args.jobs, args.output)]
    print(f"{len(found)} mutants survive")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
