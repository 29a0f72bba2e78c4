"""Mutation testing of the files of the losses: change one operator or number at a time, and see whether a test fails.

    python tests/mutants.py                            # every method's file; `make mutants`
    python tests/mutants.py dpop chipo --jobs 2        # those of some methods
    python tests/mutants.py --file trl_ift/memory.py --tests tests/test_check.py

The tests of a file are collected once. Each mutant runs in a fork of that process, in which the functions of the file get the
changed code: the tests that reach the changed line, quick ones before slow ones, until one fails. What stands outside functions
(defaults, constants) is changed by a fresh import of the package instead. What survives is printed with its line. Outcomes are
kept (`--output`): a run goes on where it was; they are those of a source and of its tests, and forgotten when either changes.
Known survivors and why they are none: `EQUIVALENT`.
"""

import argparse
import ast
import copy
import functools
import hashlib
import importlib.abc
import importlib.util
import inspect
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

import pytest


ROOT = Path(__file__).resolve().parent.parent
_RECORDED = "what is recorded is detached once more"
_MATRIX = "a matrix, of which it is the last dimension"
_PROCESSES = "tests with two processes, which take too long for each mutant, fail"
_TENSOR_PARALLEL = "1 without tensor parallelism, which one machine without GPUs does not have"
# Source line after the change -> why none of the tests that run for each mutant could tell it from the original
EQUIVALENT: dict[str, str] = {
    # ada_dpo.py
    "low, high = (0.0, 101.0)": "the bisection has converged either way",
    "for _ in range(101):": "so it has after 100 steps",
    "if math.log1p(math.exp(-z)) + z / (1 + math.exp(z)) >= _LOG_2 - rho0:": "equal at the solution alone",
    "for _ in range(61):": "the bisection has converged after 60 steps",
    "rises = _entropy(h / tau) + 2 * rho0 * tau >= _LOG_2": "equal at the solution alone",
    # relative_po.py
    "raise ValueError(f\"{where}: column '{self.name}' must hold a list of finite numbers, not all 0, found {str(value)[:81]}. "
    'Correct or drop the row.")': "one more character of a value in a message",
    "distances = 2 - F.normalize(chosen, dim=1) @ F.normalize(rejected, dim=1).T": "a constant, of which the softmax is none",
    # fpo.py
    "for row, (states, own) in enumerate(zip(hidden, mask, strict=False)):": "both have a row a response",
    "largest = features.topk(top_k).indices": "indices have no gradient",
    "return fpo_loss(chosen_logratios, rejected_logratios, zero, zero, self.beta, 1.0)": "a factor of distances of 0",
    "_CHUNK = 513": "the sums are the same",
    # eurus.py
    "chosen, rejected = outputs.logits.squeeze(1).float().chunk(2)": "logits are (2B, 1)",
    "if len(usable) <= len(raw):": "a pass over rows of which none was dropped",
    "if 'chosen_ids' in row or 'rejected_ids' in row:": "the two columns come together",
    # soft_label_po.py
    "return abs(2 * label - 1) >= _TIE": "no float32 label is exactly at the bound",
    # figa.py
    "costs = np.empty((len(a) + 2, len(b) + 1), dtype=np.int64)": "a row more than is used",
    "nll = -initial_logps": "it is compared alone, which has no gradient",
    "sums, count = figa_sums(revised.token_logps, initial.token_logps, good, bad, revised.mask, **weights, **bounds)": (
        "a factor of 0 and 1 either way"
    ),
    "self._record(revised.token_logps, initial.token_logps.detach(), good, bad, bounds)": _RECORDED,
    "self._record(revised.token_logps.detach(), initial.token_logps, good, bad, bounds)": _RECORDED,
    # mpo.py
    "probabilities = torch.sigmoid(logits)": _RECORDED,
    "if len(self._first_weights) == self.args.gradient_accumulation_steps and mean <= 0.001:": (
        "a mean is never exactly at the bound"
    ),
    # mrpo.py
    "if abs(sum(weights) - 1) >= 0.001:": "a sum is never exactly at the bound",
    "values = margins.new_tensor([2.0] * number if fixed is None else fixed)": "the weights are normalised",
    "stored = _number_stored(rows[0]) if rows else 1": "without rows the data are refused",
    "if args.ref_models is not None or not found:": "without either, the columns are asked for before",
    # self_supervised_po.py
    "seed: int = 1": "the trainer gives its own",
    # exo.py
    "return F.log_softmax(scores.masked_fill(~mask, -math.inf), 1).masked_fill(~mask, 0.0)": "scores are (B, K)",
    "return (terms * mask).sum(1)": "terms are (B, K)",
    "self._record(log_q, log_p, rewards, mask)": _RECORDED,
    # uft.py
    "z = self.implicit_rewards(batch)": _RECORDED,
    "if min(variances) >= 1e-12:": "a variance is never exactly the bound",
    # ift.py
    "if noise_std >= 0:": "noise of deviation 0 adds 0",
    "while shift <= length:": "a shift by the whole length adds nothing",
    "past = discounted_future_sum(items.flip(1), documents.flip(-1), gamma).flip(-1)": _MATRIX,
    "past = discounted_future_sum(items.flip(-1), documents.flip(1), gamma).flip(-1)": _MATRIX,
    "past = discounted_future_sum(items.flip(-1), documents.flip(-1), gamma).flip(1)": _MATRIX,
    "best, likeliest = logits.max(1)": _MATRIX,
    "true_logits = logits.gather(1, targets[tile, None].to(logits.device)).squeeze(-1)": _MATRIX,
    "true_logits = logits.gather(-1, targets[tile, None].to(logits.device)).squeeze(1)": _MATRIX,
    "likeliest = (logits / temperature - noise.log()).argmax(1)": _MATRIX,
    "probabilities = (logits / temperature).softmax(1).to(table)": _MATRIX,
    "top, ids = (logits / temperature).topk(min(top_k or 1, logits.size(1)), dim=-1)": _MATRIX,
    "top, ids = (logits / temperature).topk(min(top_k or 1, logits.size(-1)), dim=1)": _MATRIX,
    "probabilities = top.softmax(1).to(table)": _MATRIX,
    "log_sum = best + logits.sub_(best[:, None]).exp_().sum(1).log()": _MATRIX,
    "top, ids = (logits / temperature).topk(min(top_k or 2, logits.size(-1)), dim=-1)": "the config asks for its number",
    "safe = torch.where(normaliser == 0, 2.0, normaliser)[documents]": "where it is 0, the quotient is not taken",
    "smallest = torch.cat([candidates, candidates.new_full((2,), math.inf)]).amin()": "one more of what is not the smallest",
    "past = past + torch.where(torch.isfinite(smallest), smallest, 2.0)": "the weights are normalised",
    "reach = 2 / torch.log1p(past) if norm == 'log' else 1 / past": "the weights are normalised",
    "return torch.exp(torch.where(mask, reach - peaks, math.inf))": "the caller drops what the mask does",
    "reach = reach / torch.where(peaks > 0, peaks, 2.0)": "where no peak is above 0, it divides 0",
    "autocast = torch.autocast(device_type, dtype=torch.get_autocast_dtype(device_type), "
    "enabled=torch.is_autocast_enabled(device_type), cache_enabled=True)": "this torch caches no cast without gradient",
    "sft_nll_sum, match_sum = (-output.log_probs.sum(), output.is_top1.sum())": _RECORDED,
    "self._drawn = (-2, 0)": "no step has this number either",
    "self._drawn = (-1, 1)": "no step has this number",
    "if not (self.args.average_tokens_across_devices and self.args.world_size > 1):": _PROCESSES,
    "if self.args.average_tokens_across_devices or self.args.world_size > 1:": _PROCESSES,
    "if self.args.average_tokens_across_devices and self.args.world_size >= 1:": "one process gathers its own",
    "if self.args.average_tokens_across_devices and self.args.world_size > 2:": _PROCESSES,
    "num_documents = self.accelerator.gather(num_documents).sum() * self.get_tp_size()": _TENSOR_PARALLEL,
    "num_documents = self.accelerator.gather(num_documents).mean() // self.get_tp_size()": _PROCESSES,
    "if not (num_items_in_batch is not None and args.average_tokens_across_devices):": _PROCESSES,
    "if num_items_in_batch is not None or args.average_tokens_across_devices:": _PROCESSES,
    "if num_items_in_batch is None and args.average_tokens_across_devices:": _PROCESSES,
    "loss = loss / (self.accelerator.num_processes // self.get_tp_size())": _PROCESSES,
    "loss = loss * (self.accelerator.num_processes * self.get_tp_size())": _TENSOR_PARALLEL,
    # tis_dpo.py
    "CHOSEN_WEIGHTS = TokenColumn('chosen_weights', required=False, response='chosen')": "the trainer asks for it first",
    "REJECTED_WEIGHTS = TokenColumn('rejected_weights', required=False, response='rejected')": "so it does for this one",
    # aligned_sft.py
    "near, far = (x.clamp(min=-math.log(3)), x.clamp(max=-math.log(2)))": "the value is taken for x > -log 2 alone",
    "return torch.where(x >= -math.log(2), torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))": (
        "both branches are log(1/2) at x = -log 2"
    ),
    "aligned = align_loss(chosen, rejected.detach(), args.beta)": _RECORDED,
    "aligned = align_loss(chosen.detach(), rejected, args.beta)": _RECORDED,
}
_BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
           ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}  # fmt: skip
_COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
_NAMES = {"sum": "mean", "mean": "sum", "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum",
          "logsigmoid": "sigmoid", "relu": "abs", "clamp_min": "clamp_max", "clamp_max": "clamp_min", "chosen": "rejected",
          "rejected": "chosen", "exp": "abs", "expm1": "exp", "log1p": "log", "softmax": "log_softmax",
          "cumsum": "cumprod", "any": "all", "all": "any"}  # fmt: skip
_TIMEOUT = 240


# ---------------------------------------------------------------- mutants


@dataclass(frozen=True)
class Mutant:
    """A changed source.

    Attributes:
        line, last_line: Numbers of the lines of the changed statement (of one with a body: of its head).
        in_function: Whether it stands in the body of a function.
        before, after: The statement before and after, unparsed.
        source: The whole module.
    """

    line: int
    last_line: int
    in_function: bool
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.line}: {hashlib.sha256(self.source.encode()).hexdigest()[:12]}"


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

    def visit(parent: ast.AST, statement: ast.stmt, in_function: bool) -> None:
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
                inside = in_function or (isinstance(parent, ast.FunctionDef) and name == "body")
                for changed in _changes(child):
                    before = _text(own)
                    put(parent, name, index, changed)
                    after = _text(changed if own is child else own)
                    if after != before:
                        changed_source = ast.unparse(ast.fix_missing_locations(tree))
                        found.append(Mutant(own.lineno, _last_line(own), inside, before, after, changed_source))
                    put(parent, name, index, child)
                visit(child, own, inside)

    def put(parent: ast.AST, name: str, index: int, child: ast.AST) -> None:
        if isinstance(getattr(parent, name), list):
            getattr(parent, name)[index] = child
        else:
            setattr(parent, name, child)

    visit(tree, tree.body[0], False)
    return found


def _text(statement: ast.AST) -> str:
    """A statement on one line: of one with a body its head."""
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(statement))).split("\n")[0]


def _last_line(statement: ast.stmt) -> int:
    body = getattr(statement, "body", None)
    return max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno or statement.lineno


# ---------------------------------------------------------------- changing code


def functions_of(source: str, path: Path) -> dict[str, CodeType]:
    """The code of the functions and methods of a source, by qualified name: inner functions are part of theirs."""
    found: dict[str, CodeType] = {}

    def visit(code: CodeType) -> None:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                if constant.co_flags & inspect.CO_OPTIMIZED:
                    found[constant.co_qualname] = constant
                else:  # the body of a class
                    visit(constant)

    visit(compile(source, str(path), "exec"))
    return found


def _defined(namespace: dict[str, object], module: str) -> Iterator[FunctionType]:
    """The functions and methods that a module defines, decorated or not."""
    for value in list(namespace.values()):
        if isinstance(value, type) and value.__module__ == module:
            yield from _defined(dict(vars(value)), module)
        elif isinstance(value, property):
            yield from _defined({"fget": value.fget, "fset": value.fset}, module)
        elif isinstance(value, staticmethod | classmethod):
            yield from _defined({"function": value.__func__}, module)
        elif isinstance(value, functools.cached_property):
            yield from _defined({"function": value.func}, module)
        elif hasattr(value, "__wrapped__"):
            yield from _defined({"function": value.__wrapped__}, module)
        elif isinstance(value, FunctionType) and value.__module__ == module:
            yield value


def put_code(module: str, source: str, path: Path) -> None:
    """Give the functions of an imported module the code that another source has for them."""
    codes = functions_of(source, path)
    for function in _defined(vars(sys.modules[module]), module):
        if function.__code__.co_qualname in codes:
            function.__code__ = codes[function.__code__.co_qualname]


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


# ---------------------------------------------------------------- running


def fork(work: Callable[[], int]) -> int:
    """Start a process that does this in silence and exits with what it returns; return its id, also that of its group."""
    child = os.fork()
    if child:
        return child
    os.setpgid(0, 0)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        status = int(work())
    except BaseException:
        status = 1
    os._exit(status)


def outcomes_of(works: dict[str, Callable[[], int]], jobs: int) -> Iterator[tuple[str, bool]]:
    """Do each in a process of its own; give its name and whether it returned 0, in the order in which they end."""
    waiting, running = list(works.items()), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, work = waiting.pop(0)
                running[fork(work)] = name, time.monotonic() + _TIMEOUT
            for child, (name, deadline) in list(running.items()):
                finished, status = os.waitpid(child, os.WNOHANG)
                if not finished and time.monotonic() > deadline:  # without an end, which a test would wait for too
                    os.killpg(child, signal.SIGKILL)
                    finished, status = os.waitpid(child, 0)
                if finished:
                    del running[child]
                    yield name, os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.01)
    finally:
        for child in running:
            os.killpg(child, signal.SIGKILL)


class Quick:
    """The key that sorts collected tests: files of quick tests first, and so within a file."""

    def __init__(self, items: list, seconds: dict[str, float]):
        self.seconds, of_files = seconds, defaultdict(list)
        for item in items:
            of_files[item.path].append(seconds.get(item.nodeid, 0.0))
        self.means = {path: sum(times) / len(times) for path, times in of_files.items()}

    def __call__(self, item) -> tuple[float, str, float]:
        return self.means[item.path], str(item.path), self.seconds.get(item.nodeid, 0.0)


class Sorted:
    """A plugin of pytest that runs quick tests first.

    Args:
        seconds: How long each takes.
    """

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def pytest_collection_modifyitems(self, items) -> None:
        items.sort(key=Quick(items, self.seconds))


class Tests:
    """A plugin of pytest: once the tests of a file are collected, run them for each mutant in a fork.

    Args:
        path: The file.
        mutants: Its mutants.
        jobs: Mutants at a time.
        keep: Called with the name of each mutant and whether it survives.
        found: File for what is learned of the tests: how long they take, and which lines they reach.
    """

    def __init__(self, path: Path, mutants: list[Mutant], jobs: int, keep: Callable[[str, bool], None], found: Path):
        self.path, self.mutants, self.jobs, self.keep, self.found = path, mutants, jobs, keep, found
        self.module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        self.here = False  # whether the tests are run in this process

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        if self.here:
            return None
        _, status = os.waitpid(fork(functools.partial(self._record, session)), 0)
        if status:
            return True
        seconds, self.reached = json.loads(self.found.read_text())
        session.items.sort(key=Quick(session.items, seconds))
        works = {mutant.name: functools.partial(self._try, mutant, session) for mutant in self.mutants}
        for name, survives in outcomes_of(works, self.jobs):
            self.keep(name, survives)
        return True

    def _try(self, mutant: Mutant, session) -> int:
        """Run the tests that reach the mutant in this fork."""
        lines = set(range(mutant.line, mutant.last_line + 1))
        session.items[:] = [item for item in session.items if not lines.isdisjoint(self.reached[item.nodeid])]
        put_code(self.module, mutant.source, self.path)
        return self._run(session)

    def _run(self, session) -> int:
        self.here = True
        session.config.hook.pytest_runtestloop(session=session)
        return int(session.testsfailed > 0)

    def _record(self, session) -> int:
        """Run the tests with the unchanged file, and write down what is learned of them."""
        import coverage

        measured = coverage.Coverage(include=[str(self.path)], data_file=None, config_file=False)
        reached, seconds = {}, defaultdict(float)

        class Recorder:
            def pytest_runtest_logstart(self, nodeid):
                measured.switch_context(nodeid)

            def pytest_runtest_logreport(self, report):
                seconds[report.nodeid] += report.duration

        session.config.pluginmanager.register(Recorder())
        measured.start()
        status = self._run(session)
        measured.stop()
        data = measured.get_data()
        for item in session.items:
            data.set_query_context(item.nodeid)
            reached[item.nodeid] = data.lines(str(self.path)) or []
        self.found.write_text(json.dumps([seconds, reached]))
        return status


def tests_of(name: str, path: Path) -> list[str]:
    """Arguments of pytest for the tests of a method."""
    own = ROOT / "tests" / f"test_{path.stem}.py"
    ids = [f"{ROOT}/tests/{file}" for file in ("test_ranges.py", "test_pure_losses.py", "test_family.py")]
    selected = (
        [str(own)] if own.is_file() else [str(p) for p in sorted((ROOT / "tests").glob(f"test_{path.stem}*.py"))]
    )
    extra = {"unpaired": ["test_unpaired"], "supervised": ["test_bad_input"]}.get(path.parent.name, [])
    selected += [f"{ROOT}/tests/{stem}.py" for stem in extra]
    words = {name, path.stem, path.stem.replace("_", "-"), f"test_{path.stem}", *extra}
    last = f"{ROOT}/tests/test_methods.py"
    return [*selected, *ids, last, "-m", "not slow", "-k", " or ".join(sorted(words))]


def digest(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def with_source(path: Path, source: str, options: list[str], seconds: dict[str, float]) -> int:
    """Run the tests with another source of a file, which is not yet imported."""
    sys.meta_path.insert(0, _Source(".".join(path.relative_to(ROOT).with_suffix("").parts), path, source))
    return pytest.main(options, [Sorted(seconds)])


def run(path: Path, arguments: list[str], jobs: int, output: Path) -> list[Mutant]:
    """Try all mutants of a file; return those that survive."""
    source, options = path.read_text(), ["-x", "-q", "-p", "no:cacheprovider", *arguments]
    files = [Path(argument) for argument in arguments if argument.endswith(".py")]
    label, mutants = str(path.relative_to(ROOT)), mutants_of(source)
    key = digest([path, *files])
    known = json.loads(output.read_text()) if output.is_file() else {}
    if known.get(label, {}).get("key") != key:
        known[label] = {"key": key, "outcomes": {}}
    outcomes = known[label]["outcomes"]

    def keep(name: str, survives: bool) -> None:
        outcomes[name] = survives
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(".partial")
        partial.write_text(json.dumps(known, indent=1))
        partial.replace(output)

    outcomes.update((mutant.name, True) for mutant in mutants if mutant.after in EQUIVALENT)
    untried = [mutant for mutant in mutants if mutant.name not in outcomes]
    inside = [mutant for mutant in untried if mutant.in_function]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        if untried:  # in a process of its own: in this one the package is never imported
            plugin = Tests(path, inside, jobs, keep, found)
            os.waitpid(fork(lambda: pytest.main(options, [plugin])), 0)
            if not found.is_file():
                raise SystemExit(f"{label}: its tests fail without a change: pytest {' '.join(arguments)}")
            outcomes.update(json.loads(output.read_text())[label]["outcomes"] if inside else {})
            seconds, _ = json.loads(found.read_text())
        works = {
            m.name: functools.partial(with_source, path, m.source, options, seconds)
            for m in untried
            if not m.in_function
        }
        for name, survives in outcomes_of(works, jobs):
            keep(name, survives)
    for mutant in mutants:
        if outcomes[mutant.name] and mutant.after not in EQUIVALENT:
            print(f"{label}:{mutant.line}\n  - {mutant.before}\n  + {mutant.after}", flush=True)
    survivors = [m for m in mutants if outcomes[m.name] and m.after not in EQUIVALENT]
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
    import torch
    from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer  # noqa: F401

    torch.set_num_threads(1)
    found = [mutant for path, arguments in work for mutant in run(path, arguments, args.jobs, args.output)]
    print(f"{len(found)} mutants survive")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
