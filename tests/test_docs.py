"""The Python examples of README and docs run as they stand, on a tiny model and dataset under the same names."""

import re
from pathlib import Path

import pytest
import tiny
from datasets import Dataset


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def ultrafeedback() -> Dataset:
    """The columns of `trl-lib/ultrafeedback_binarized`: conversations with an implicit prompt, and scores."""
    rows = [
        {
            side: [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            for side, text in (("chosen", answer), ("rejected", answer[::-1]))
        }
        for question, answer in tiny.QUESTIONS
    ]
    ratings = [max(1.0, float(i)) for i in range(len(rows))]  # of 1 to 10
    return Dataset.from_list(
        [row | {"score_chosen": 8.0, "score_rejected": rating} for row, rating in zip(rows, ratings, strict=True)]
    )


def triples() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": question, "reference": f" {answer}", "chosen": f" {answer[:9]}", "rejected": f" {answer[::-1]}"}
            for question, answer in tiny.QUESTIONS
        ]
    )


DATASETS = {
    "trl-lib/tldr": tiny.prompt_completion_data,
    "trl-lib/ultrafeedback_binarized": ultrafeedback,
    "tpo-alignment/triple-preference-ultrafeedback-40K": triples,
    "trl-lib/kto-mix-14k": lambda: tiny.conversational_data().add_column("label", [True, False] * 4),
}


@pytest.mark.parametrize("code", BLOCKS)
def test_example(code, tmp_path, monkeypatch, tokenizer):
    # `from_pretrained` and `load_dataset` look for a local folder of that name first
    model = tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    tiny.model("llama", tokenizer).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for name, dataset in DATASETS.items():
        data = tmp_path / name
        data.mkdir(parents=True)
        dataset().to_json(data / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    here = 'use_cpu=True, bf16=False, max_steps=2, report_to="none"'
    code, trainings = re.subn(
        r'Config\(output_dir="([\w-]+)"(, push_to_hub=True)?', rf'Config(output_dir="\1", {here}', code
    )
    assert trainings == code.count("trainer.train()") + len(re.findall(r"^self_play\(", code, re.MULTILINE))
    namespace: dict = {}
    exec(code.replace("max_new_tokens=256", "max_new_tokens=8"), namespace)
    if "trainer" in namespace:
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
