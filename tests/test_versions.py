"""The script that runs the suite with other versions: what it installs, and the page it writes."""

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import versions
from packaging.version import Version


ROOT = Path(__file__).parent.parent


def test_the_floors_are_those_of_the_project():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = versions.floors(dependencies)
    assert set(floors) == set(versions.PINNED)
    assert f"trl>={floors['trl']},<2" in dependencies
    for name, floor in floors.items():
        assert Version(floor) <= Version(version(name))


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_documentation_names_the_floors(page):
    floors = versions.floors(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    supported = (ROOT / page).read_text().partition("Supported: ")[2]
    trl, transformers, peft = (floors[name] for name in ("trl", "transformers", "peft"))
    assert supported.startswith(f"`trl>={trl},<2`, transformers >= {transformers}, peft >= {peft},")


def test_a_package_without_a_floor_is_an_error():
    with pytest.raises(ValueError, match="`peft` in pyproject.toml needs one lower bound"):
        versions.floors(["trl>=1.16,<2", "peft", "transformers>=5.19", "accelerate>=1", "datasets>=4"])
    with pytest.raises(ValueError, match="does not name accelerate, datasets"):
        versions.floors(["trl>=1.16,<2", "peft>=0.20", "transformers>=5.19"])


def test_the_page_keeps_the_other_environment(tmp_path):
    page = tmp_path / "versions.md"
    found = dict.fromkeys(versions.SHOWN, "1.0+cpu")
    versions.write_page(page, {"newest": versions.row("newest", found, "5 passed, 1 skipped in 3.21s (0:00:03)")})
    versions.write_page(page, {"oldest": versions.row("oldest", found, "4 passed, 1 failed in 3s")})
    versions.write_page(page, {"newest": versions.row("newest", found, "6 passed in 9s")})
    table = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert [len(line.split("|")) for line in table] == [len(versions.SHOWN) + 5] * 4
    assert "| oldest | 1.0 |" in table[2]
    assert "| 4 passed, 1 failed |" in table[2]
    assert "| 6 passed |" in table[3]


def test_unknown_environments_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["versions.py", "middle", "--", "-k", "mpo"])
    with pytest.raises(SystemExit):
        versions.main()
    assert "unknown environments middle; choose from oldest, newest" in capsys.readouterr().err
