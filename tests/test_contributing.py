"""The tutorial of CONTRIBUTING.md, carried out on a copy of the repository."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
BLOCKS = dict(re.findall(r"```python\n# (.*?)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL))
FILE = "trl_ift/preference/odpo.py"


def lines_of_code(source: str) -> int:
    """Lines without docstrings, comments and blank lines."""
    lines: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno
            lines |= set(range(node.lineno, last + 1))
            for decorator in getattr(node, "decorator_list", []):
                lines.add(decorator.lineno)
    text = source.splitlines()
    return sum(bool(text[number - 1].strip()) and not text[number - 1].strip().startswith("#") for number in lines)


def test_a_pairwise_method_is_short():
    assert 20 < lines_of_code(BLOCKS[FILE]) <= 60


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with the new method."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("trl_ift", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    (folder / FILE).write_text(BLOCKS[FILE])
    insertions = {place: text for place, text in BLOCKS.items() if ", " in place}
    assert len(insertions) == 6
    for place, text in insertions.items():
        file, name = place.split(", ")
        path = folder / file
        before = path.read_text()
        opening = re.search(rf"^{name} = [({{]\n", before, re.MULTILINE)
        path.write_text(before[: opening.end()] + text + before[opening.end() :])
    return folder


def run(copy, *command):
    environment = os.environ | {"PYTHONPATH": str(copy)}
    return subprocess.run([sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True)


def test_the_method_of_the_tutorial_passes_the_contract(copy):
    result = run(
        copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_family.py", "tests/test_methods.py",
        "tests/test_cli.py", "tests/test_bad_input.py", "-k", "odpo or has_a_formula or in_the_table",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    found = int(re.search(r"(\d+) passed", result.stdout)[1])
    assert found > 20
    where = run(copy, "-c", "import trl_ift; print(trl_ift.__file__, trl_ift.ODPOTrainer.__name__)")
    assert where.stdout.split() == [str(copy / "trl_ift" / "__init__.py"), "ODPOTrainer"]


def test_it_has_a_command_and_a_place_in_the_tables(copy):
    help_text = run(copy, "-m", "trl_ift.cli", "odpo", "--help")
    assert "--odpo_alpha" in help_text.stdout, help_text.stderr
    table = run(copy, "-m", "trl_ift.cli", "methods", "--markdown").stdout
    assert "| DPO with an Offset | `ODPOTrainer`, `trl-ift odpo` |" in table
    assert "| some pairs matter more than others, and scores say how much | DPO with an Offset" in table


def test_the_contract_finds_a_mistake(copy):
    """A loss that is not the formula, and an option that does nothing, are found."""
    path = copy / FILE
    right = path.read_text()
    path.write_text(right.replace("beta * margins - alpha * offsets", "beta * margins - offsets"))
    try:
        files = ("tests/test_family.py", "tests/test_methods.py")
        result = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "odpo and (loss or option)")
    finally:
        path.write_text(right)
    assert result.returncode == 1
    for test in ("test_family.py::test_loss_and_gradients_of_the_trainer", "test_methods.py::test_every_option_acts"):
        assert re.search(rf"FAILED tests/{test}\[odpo\]", result.stdout)
