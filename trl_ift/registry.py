"""The methods of the library, one line each.

The package's public names, the CLI, the README's table and the contract tests read this list: a new method is under all
of them once its line stands here. Nothing heavy is imported.
"""

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: CLI command, `trl-ift <name>`.
        title: Full name of the method.
        module: Module that defines the trainer and the config.
        trainer: Name of the trainer class.
        config: Name of the config class.
        data: Dataset types it trains on, in TRL's words.
        paper: arXiv id.
        summary: What it is for, in one clause.
        kind: What the study makes of preference pairs for it; see `trl_ift.study.methods`.
        script: Script of `scripts/` behind its command.
        symptom: What one sees in a run, or lacks, that the method is for.
    """

    name: str
    title: str
    module: str
    trainer: str
    config: str
    data: str
    paper: str
    summary: str
    kind: str = "pairs"
    script: str = "train.py"
    symptom: str = ""

    @property
    def trainer_class(self) -> type:
        return getattr(import_module(self.module), self.trainer)

    @property
    def config_class(self) -> type:
        return getattr(import_module(self.module), self.config)


# Order of the README's table
_KINDS = ("sft", "self-play", "pairs", "samples", "triples", "lists", "unpaired", "reward")

# fmt: off
METHODS = (
    Method("ift", "Intuitive Fine-Tuning", "trl_ift.supervised.ift", "IFTTrainer", "IFTConfig", "language modeling, prompt-completion", "2405.11870", "alignment from SFT data: no pairs, no reference model", "sft"),  # noqa: E501
    Method("dpo", "Direct Preference Optimization", "trl_ift.preference.trainer", "PreferenceTrainer", "PreferenceConfig", "preference", "2305.18290", "TRL's DPO losses with row weights and the right reference; base of the methods below"),  # noqa: E501
    Method("davir-dpo", "DavIR-DPO", "trl_ift.preference.davir_dpo", "DavIRDPOTrainer", "DavIRDPOConfig", "preference", "2310.13008", "DPO with each reward divided by the size of the response's reference log-prob, against effects of length"),  # noqa: E501
    Method("dpop", "DPO-Positive", "trl_ift.preference.dpop", "DPOPTrainer", "DPOPConfig", "preference", "2402.13228", "DPO with a penalty on chosen responses that become less likely", symptom="`logps/chosen` falls during DPO; pairs differ in a few tokens"),  # noqa: E501
    Method("minor-dpo", "MinorDPO", "trl_ift.preference.minor_dpo", "MinorDPOTrainer", "MinorDPOConfig", "preference", "2408.09834", "DPO that stops pushing a rejected response down below its reference", symptom="`logps/rejected` falls without end; DPO breaks at high learning rates"),  # noqa: E501
    Method("chipo", "Chi-squared Preference Optimization", "trl_ift.preference.chipo", "ChiPOTrainer", "ChiPOConfig", "preference", "2407.13399", "DPO with a chi-squared regulariser", symptom="over-optimisation: quality falls with more epochs or a small beta"),  # noqa: E501
    Method("mpo", "Maximum Preference Optimization", "trl_ift.preference.mpo", "MPOTrainer", "MPOConfig", "preference, and samples of the starting model", "2312.16430", "bounded preference loss with a KL term that acts outside the pairs; no reference model", "samples"),  # noqa: E501
    Method("spin", "Self-Play fIne-tuNing", "trl_ift.preference.spin", "SPINTrainer", "SPINConfig", "prompt-completion (the trainer: preference, with the model's own answers rejected)", "2401.01335", "alignment from SFT data: the answers against those that the model itself generates, in iterations", "self-play", "self_play.py"),  # noqa: E501
    Method("ld-align", "LD-Align", "trl_ift.preference.ld_align", "LDAlignTrainer", "LDAlignConfig", "prompt-completion (the trainer: preference, and latent distances or weights)", "2404.06390", "SPIN with each pair weighted by the distance of its answers in a latent space", "self-play", "self_play.py"),  # noqa: E501
    Method("tpo", "Triple Preference Optimization", "trl_ift.preference.tpo", "TPOTrainer", "TPOConfig", "triples (gold, chosen, rejected)", "2405.16681", "SFT and preference optimisation in one stage; no reference model", "triples"),  # noqa: E501
)
# fmt: on


def get_method(name: str) -> Method:
    """Return the method called `name`; `ValueError` names the known ones."""
    for method in METHODS:
        if method.name == name:
            return method
    raise ValueError(f"Unknown method {name!r}. Known methods: {', '.join(method.name for method in METHODS)}.")


def methods_table() -> str:
    """The methods as a Markdown table, by the data they need (README, documentation)."""
    rows = ["| method | trainer | data | what for | paper |", "| --- | --- | --- | --- | --- |"]
    rows += [
        f"| {m.title} | `{m.trainer}`, `trl-ift {m.name}` | {m.data} | {m.summary} "
        f"| [{m.paper}](https://huggingface.co/papers/{m.paper}) |"
        for m in sorted(METHODS, key=lambda m: _KINDS.index(m.kind))
    ]
    return "\n".join(rows)


def symptoms_table() -> str:
    """The methods as a Markdown table, by what one sees in a run (README, documentation)."""
    rows = ["| what you see, or have | method |", "| --- | --- |"]
    rows += [f"| {m.symptom} | {m.title} (`trl-ift {m.name}`) |" for m in METHODS if m.symptom]
    return "\n".join(rows)
