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
_KINDS = ("sft", "self-play", "pairs", "weighted", "degraded", "samples", "triples", "lists", "unpaired", "reward")

# fmt: off
METHODS = (
    Method("ift", "Intuitive Fine-Tuning", "trl_ift.supervised.ift", "IFTTrainer", "IFTConfig", "language modeling, prompt-completion", "2405.11870", "alignment from SFT data: no pairs, no reference model", "sft", symptom="only prompts with one good answer each, and no time for a second stage"),  # noqa: E501
    Method("dpo", "Direct Preference Optimization", "trl_ift.preference.trainer", "PreferenceTrainer", "PreferenceConfig", "preference", "2305.18290", "TRL's DPO losses with row weights and the right reference; base of the methods below"),  # noqa: E501
    Method("davir-dpo", "DavIR-DPO", "trl_ift.preference.davir_dpo", "DavIRDPOTrainer", "DavIRDPOConfig", "preference", "2310.13008", "DPO with each reward divided by the size of the response's reference log-prob, against effects of length", symptom="DPO learns length: the margin goes with the difference in length"),  # noqa: E501
    Method("dpop", "DPO-Positive", "trl_ift.preference.dpop", "DPOPTrainer", "DPOPConfig", "preference", "2402.13228", "DPO with a penalty on chosen responses that become less likely", symptom="`logps/chosen` falls during DPO; pairs differ in a few tokens"),  # noqa: E501
    Method("minor-dpo", "MinorDPO", "trl_ift.preference.minor_dpo", "MinorDPOTrainer", "MinorDPOConfig", "preference", "2408.09834", "DPO that stops pushing a rejected response down below its reference", symptom="`logps/rejected` falls without end; DPO breaks at high learning rates"),  # noqa: E501
    Method("chipo", "Chi-squared Preference Optimization", "trl_ift.preference.chipo", "ChiPOTrainer", "ChiPOConfig", "preference", "2407.13399", "DPO with a chi-squared regulariser", symptom="over-optimisation: quality falls with more epochs or a small beta"),  # noqa: E501
    Method("regularized-po", "Regularized Preference Optimization", "trl_ift.preference.regularized_po", "RegularizedPOTrainer", "RegularizedPOConfig", "preference", "2405.16436", "DPO that imitates the chosen responses", symptom="`logps/chosen` falls during DPO, and should rise"),  # noqa: E501
    Method("soft-label-po", "Geometric-Averaged Preference Optimization", "trl_ift.preference.soft_label_po", "SoftLabelPOTrainer", "SoftLabelPOConfig", "preference, and label probabilities", "2409.06691", "DPO, IPO and ROPO on pairs whose labels have probabilities (GDPO, GIPO, GROPO; cDPO, cIPO)", symptom="labels are vote shares or probabilities, and many pairs are near ties"),  # noqa: E501
    Method("ada-dpo", "Adaptive Preference Scaling", "trl_ift.preference.ada_dpo", "AdaDPOTrainer", "AdaDPOConfig", "preference", "2406.02764", "DPO in which every pair has a scale of its own, solved anew at each step", symptom="some pairs are clear and others ambiguous, and no scores say which"),  # noqa: E501
    Method("aligned-sft", "Aligned Supervised Fine-Tuning", "trl_ift.preference.aligned_sft", "AlignedSFTTrainer", "AlignedSFTConfig", "preference", "2409.10571", "SFT on the chosen responses and a push on each response of a pair by its own likelihood; no reference model", symptom="pairs, but no SFT stage and no memory for a reference; chosen and rejected differ much in length"),  # noqa: E501
    Method("tis-dpo", "Token-level Importance Sampling DPO", "trl_ift.preference.tis_dpo", "TISDPOTrainer", "TISDPOConfig", "preference, and weights of tokens", "2410.04350", "DPO with a weight for each token, estimated from a positive and a negative model", "weighted", symptom="long responses that mix good and bad parts"),  # noqa: E501
    Method("relative-po", "Relative Preference Optimization", "trl_ift.preference.relative_po", "RelativePOTrainer", "RelativePOConfig", "preference, and prompt embeddings", "2402.10958", "DPO that compares the responses of related prompts too", symptom="few pairs, whose prompts are alike"),  # noqa: E501
    Method("mrpo", "Multi-Reference Preference Optimization", "trl_ift.preference.mrpo", "MRPOTrainer", "MRPOConfig", "preference, and other models to compare with", "2405.16388", "DPO against several references, whose log-probs are stored before training", symptom="few pairs, and stronger or other models at hand whose knowledge shall count"),  # noqa: E501
    Method("self-supervised-po", "Self-supervised Preference Optimization (SPO-style)", "trl_ift.preference.self_supervised_po", "SelfSupervisedPOTrainer", "SelfSupervisedPOConfig", "preference", "2409.17791", "TRL's DPO losses with an auxiliary task: the policy tells how much key content was removed from a response", "degraded", symptom="pairs differ in degree, and the loss only sees better and worse"),  # noqa: E501
    Method("figa", "Fine-grained Quality Signals (FIGA)", "trl_ift.preference.figa", "FIGATrainer", "FIGAConfig", "preference: the revised answer over the initial one", "2311.04072", "learning from minimal edits: tokens put in are imitated, tokens taken out are pushed down; no reference model", symptom="answers of the model and small corrections of them"),  # noqa: E501
    Method("fpo", "Feature-level Preference Optimization", "trl_ift.preference.fpo", "FPOTrainer", "FPOConfig", "preference, and a sparse autoencoder of the model", "2411.07618", "DPO held near the reference in the features of a sparse autoencoder", symptom="a sparse autoencoder of the model is at hand, and DPO makes answers alike"),  # noqa: E501
    Method("mpo", "Maximum Preference Optimization", "trl_ift.preference.mpo", "MPOTrainer", "MPOConfig", "preference, and samples of the starting model", "2312.16430", "bounded preference loss with a KL term that acts outside the pairs; no reference model", "samples", symptom="the model drifts on prompts outside the pairs; no memory for a reference"),  # noqa: E501
    Method("spin", "Self-Play fIne-tuNing", "trl_ift.preference.spin", "SPINTrainer", "SPINConfig", "prompt-completion (the trainer: preference, with the model's own answers rejected)", "2401.01335", "alignment from SFT data: the answers against those that the model itself generates, in iterations", "self-play", "self_play.py", symptom="only prompts with one good answer each, and SFT on them has stopped to help"),  # noqa: E501
    Method("ld-align", "LD-Align", "trl_ift.preference.ld_align", "LDAlignTrainer", "LDAlignConfig", "prompt-completion (the trainer: preference, and latent distances or weights)", "2404.06390", "SPIN with each pair weighted by the distance of its answers in a latent space", "self-play", "self_play.py", symptom="self-play over-fits pairs whose two answers mean the same"),  # noqa: E501
    Method("tpo", "Triple Preference Optimization", "trl_ift.preference.tpo", "TPOTrainer", "TPOConfig", "triples (gold, chosen, rejected)", "2405.16681", "SFT and preference optimisation in one stage; no reference model", "triples", symptom="a gold answer beside each pair; SFT and preferences in one stage"),  # noqa: E501
    Method("exo", "Efficient Exact Optimization", "trl_ift.preference.exo", "EXOTrainer", "EXOConfig", "prompts with several scored responses, or preference", "2402.00856", "reverse KL to the distribution that the rewards of several responses induce: mode-seeking, where DPO spreads", "lists", symptom="several responses a prompt, scored by a reward model"),  # noqa: E501
    Method("eurus-reward", "Eurus Reward Modeling", "trl_ift.reward.eurus", "EurusRewardTrainer", "EurusRewardConfig", "preference, optionally with a column of booleans", "2404.02078", "reward model that adds an absolute term to Bradley-Terry, where right and wrong are objective", "reward", symptom="a reward model ranks pairs well and gives wrong solutions a high reward"),  # noqa: E501
    Method("ulma", "Unified Language Model Alignment", "trl_ift.unpaired.ulma", "ULMATrainer", "ULMAConfig", "unpaired preference", "2312.02554", "good answers as demonstrations, bad ones with a penalty: point-wise DPO and SFT in one loss", "unpaired", symptom="thumbs up and down on single answers, with good answers of gold quality"),  # noqa: E501
    Method("uft", "Unified Fine-Tuning", "trl_ift.unpaired.uft", "UFTTrainer", "UFTConfig", "unpaired preference, with a label or a score in [0, 1]", "2410.21438", "demonstrations and graded feedback under one loss", "unpaired", symptom="scores of single answers; skills of SFT are lost in a second stage of alignment"),  # noqa: E501
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
