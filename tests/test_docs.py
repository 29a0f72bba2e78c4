"""The Python examples of README and docs run as they stand, on a tiny model and dataset under the same names."""

import re
from pathlib import Path

import pytest
import tiny


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_example(code, tmp_path, monkeypatch, tokenizer):
    # `from_pretrained` and `load_dataset` look for a local folder of that name first
    model = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    tiny.model("llama", tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    data = tmp_path / "trl-lib" / "tldr"
    data.mkdir(parents=True)
    tiny.prompt_completion_data().to_json(data / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    here = 'use_cpu=True, bf16=False, max_steps=2, report_to="none"'
    code, changed = re.subn(
        r'Config\(output_dir="([\w-]+)"(, push_to_hub=True)?', rf'Config(output_dir="\1", {here}', code
    )
    assert changed == 1
    namespace: dict = {}
    exec(code, namespace)
    assert namespace["trainer"].state.global_step == 2


def test_every_relative_link_leads_somewhere():
    for page in [
        *PAGES,
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "examples").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
