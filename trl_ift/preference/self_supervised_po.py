r"""Self-supervised Preference Optimization (SPO-style), https://huggingface.co/papers/2409.17791.

Not Soft Preference Optimization (2405.00747), not Self Preference Optimization with self-regularization, not self-play.

A pairwise loss sees "better" and "worse" only. The auxiliary task makes the policy's representation tell *degrees* apart,
without labels: key content is removed from a response at one of K levels, and a classifier on the policy's hidden state has to
say at which one. It is added to any of TRL's pairwise losses:

    L = L_align  +  gamma_w mean[ - log q( k | degraded_k(y_w), x ) ]  +  gamma_l mean[ - log q( k | degraded_k(y_l), x ) ]

with q the softmax of a linear head on the pooled last hidden state of the degraded response.

Confirmed by abstract and summaries: key content is extracted and selectively removed, a self-supervised module classifies the
degree, its loss is added to the alignment loss and trains the model jointly. Everything else is our choice, as the paper's body
could not be read and its repository holds no code: the extraction (RAKE), the levels, the head, the weights. So this is
"SPO-style"; no reproduction is claimed.

    key phrases    runs of words between stop words and punctuation; a word scores degree / frequency, a phrase the sum of its
                   words (RAKE, with English stop words)
    degraded_k     without the first ceil(n k / (K - 1)) of the n phrases, the best first; k = 0 is the response itself
    excluded       responses of fewer than K - 1 phrases
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, Features, IterableDataset, List, Value
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)

from ..checks import check_choice, check_range, check_unused
from ..data.caching import versioned
from ..data.fingerprint import base_model
from ..data.rows import first_row
from ..hub.paper import arxiv_paper
from ..trl_internals import global_then_local_main_first
from .collator import Branch, PreferenceCollator
from .trainer import PreferenceBatch, PreferenceConfig, PreferenceTrainer, Term, prompt_and_response_ids


POOLS = ("mean", "last")
SIDES = ("chosen", "rejected")
_STATE_FILE = "spo_head.json"
_IDS = List(Value("int64"))
_ROWS = List({"prompt_ids": _IDS, "completion_ids": _IDS, "level": Value("int64")})
# Start, end and score of a key phrase
Span = tuple[int, int, float]

_WORD = re.compile(r"\w+(?:['’\-]\w+)*")
_STOP_WORDS = frozenset(
    """a about above after again against all also am an and any are aren't as at be because been before being below
    between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each either
    else etc ever every few for from further had hadn't has hasn't have haven't having he he's her here here's hers
    herself him himself his how however i i'd i'll i'm i've if in into is isn't it it's its itself just let let's like
    may me might more most must my myself neither no nor not now of off often on once only or other our ours ourselves
    out over own perhaps quite rather really same shall she should shouldn't since so some such than that that's the
    their theirs them themselves then there there's these they they're this those though through thus to too under
    until up upon us very was wasn't we we're were weren't what when where whether which while who whom whose why will
    with within without won't would wouldn't yet you you'd you'll you're you've your yours yourself yourselves""".split()  # noqa: SIM905
)


@dataclass
class SelfSupervisedPOConfig(PreferenceConfig):
    r"""
    Configuration class for the [`SelfSupervisedPOTrainer`].

    This class includes only the parameters that are specific to the auxiliary loss; `loss_type` and `beta` are those of the
    alignment loss. All defaults are our choice.

    Parameters:
        spo_gamma_chosen (`float`, *optional*, defaults to `0.1`):
            Weight of the auxiliary loss on degraded chosen responses, >= 0.
        spo_gamma_rejected (`float`, *optional*, defaults to `0.1`):
            The same on degraded rejected responses.
        spo_levels (`int`, *optional*, defaults to `4`):
            Number K of levels, >= 2.
        spo_pool (`str`, *optional*, defaults to `"mean"`):
            Hidden state that is classified: the `"mean"` over the tokens of the response, or that of the `"last"` one.
        spo_head_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the head, > 0, under the schedule of the run; at that of the policy it would hardly
            leave its zeros.
        spo_length_control (`bool`, *optional*, defaults to `False`):
            Whether removed words are replaced by other words of the response, so that the level cannot be read off the length.
    """

    spo_gamma_chosen: float = field(
        default=0.1, metadata={"help": "Weight of the auxiliary loss on degraded chosen responses."}
    )
    spo_gamma_rejected: float = field(
        default=0.1, metadata={"help": "Weight of the auxiliary loss on degraded rejected responses."}
    )
    spo_levels: int = field(default=4, metadata={"help": "Number of levels of degradation."})
    spo_pool: str = field(
        default="mean", metadata={"help": "Hidden state of a response that is classified.", "choices": list(POOLS)}
    )
    spo_head_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the head, under the schedule of the run."}
    )
    spo_length_control: bool = field(
        default=False, metadata={"help": "Whether removed words are replaced by other words of the response."}
    )

    def __post_init__(self):
        check_range("spo_gamma_chosen", self.spo_gamma_chosen, 0)
        check_range("spo_gamma_rejected", self.spo_gamma_rejected, 0)
        check_range("spo_levels", self.spo_levels, 2, integer=True)
        check_choice("spo_pool", self.spo_pool, POOLS)
        check_range("spo_head_learning_rate", self.spo_head_learning_rate, 0, low_open=True)
        if not self.spo_gamma_chosen and not self.spo_gamma_rejected:
            idle = ["spo_levels", "spo_pool", "spo_head_learning_rate", "spo_length_control"]
            check_unused(self, idle, "with `spo_gamma_chosen=0` and `spo_gamma_rejected=0`")
        super().__post_init__()


# ---------------------------------------------------------------- texts


def rake(text: str) -> list[Span]:
    """Key phrases of an English text by RAKE: start, end and score of each, in the order of the text."""
    phrases: list[list[re.Match[str]]] = []
    end = -1
    for word in _WORD.finditer(text):
        if word[0].lower().replace("’", "'") in _STOP_WORDS:
            end = -1
            continue
        if end < 0 or text[end : word.start()].strip():  # punctuation between them
            phrases.append([])
        phrases[-1].append(word)
        end = word.end()
    frequency: Counter[str] = Counter()
    degree: Counter[str] = Counter()
    for phrase in phrases:
        for word in phrase:
            frequency[word[0].lower()] += 1
            degree[word[0].lower()] += len(phrase)
    score = {word: degree[word] / frequency[word] for word in frequency}
    return [(words[0].start(), words[-1].end(), sum(score[word[0].lower()] for word in words)) for words in phrases]


def degraded_texts(text: str, spans: list[Span], levels: int, length_control: bool = False) -> list[str]:
    """The text at each level of degradation, level 0 first; none if it has too few key phrases."""
    if len(spans) < levels - 1:
        return []
    ranked = sorted(spans, key=lambda span: (-span[2], span[0]))
    draw, found = random.Random(text), []
    for level in range(levels):
        gone = sorted(ranked[: math.ceil(len(ranked) * level / (levels - 1))])
        kept = _WORD.findall(_cut(text, gone, None, draw)) if length_control else []
        found.append(_cut(text, gone, kept, draw))
    return found


def _cut(text: str, spans: list[Span], words: list[str] | None, draw: random.Random) -> str:
    """The text without spans and the double spaces that they leave, or with as many of `words` drawn in their place."""
    whole, start = "", 0
    for first, end, _ in spans:
        whole += text[start:first]
        start = end
        if words:
            whole += " ".join(draw.choice(words) for _ in _WORD.findall(text[first:end]))
        elif not whole or whole[-1].isspace():
            start += len(text[end:]) - len(text[end:].lstrip(" "))
    return whole + text[start:]


def _text_of(response: Any, side: str, eos_token: str = "") -> str:
    """The text of a response, or of its last message, from which key content is removed."""
    if isinstance(response, str):
        return response.removesuffix(eos_token)
    content = response[-1].get("content") or ""
    if not isinstance(content, str):
        raise TypeError(
            f"A message of '{side}' has the content {content!r:.80}, a {type(content).__name__} of parts, and key content is "
            "removed from texts. Make the contents strings, or set `spo_gamma_chosen=0` and `spo_gamma_rejected=0`."
        )
    return content


def _degrade(
    row: dict[str, Any], side: str, tokenizer: Any, eos_token: str, only: int | None, **options: Any
) -> dict[str, Any]:
    """The response of a row at each level, tokenized; at one level that is drawn from the seed `only`, if it is given."""
    extract = options.pop("extract")
    response, rows = row[side], []
    text = _text_of(response, side, eos_token)
    for level, degraded in enumerate(degraded_texts(text, extract(text), **options)):
        as_given = degraded if isinstance(response, str) else [*response[:-1], response[-1] | {"content": degraded}]
        prompt_ids, ids = prompt_and_response_ids(row, as_given, tokenizer, eos_token)
        rows.append({"prompt_ids": prompt_ids, "completion_ids": ids, "level": level})
    if only is not None and rows:
        rows = [random.Random(f"{only} {row['prompt_ids']} {row[f'{side}_ids']}").choice(rows)]
    return {f"degraded_{side}_rows": rows}


@dataclass
class DegreeCollator(PreferenceCollator):
    """[`PreferenceCollator`] that draws one level of each degraded response, by seed, epoch and row.

    Adds `degraded_chosen_labels` and `degraded_rejected_labels`, the levels, one a row of the branch, (N,).
    """

    seed: int = 0

    def __post_init__(self):
        # In shared memory, so that workers that outlive an epoch see the next one
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that the levels are drawn for."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        drawn = [dict(example) for example in examples]
        labels = {}
        for branch in self.branches:
            if branch.rows_column not in examples[0]:
                continue
            for example in drawn:
                key = f"{self.seed} {self.epoch} {branch.name} {example['prompt_ids']} {example['chosen_ids']}"
                rows = example[branch.rows_column]
                example[branch.rows_column] = [random.Random(key).choice(rows)] if rows else []
            levels = [row["level"] for example in drawn for row in example[branch.rows_column]]
            labels[f"{branch.name}_labels"] = torch.tensor(levels, dtype=torch.long)
        return super().torch_call(drawn) | labels


class _Epoch(TrainerCallback):
    """Tells the collator the epoch, so that the levels change from one to the next, and are those of a resumed run."""

    def __init__(self, collator: DegreeCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = int((state.epoch or 0) + 1e-6)


# ---------------------------------------------------------------- loss


def pooled(hidden: torch.Tensor, mask: torch.Tensor, pool: str = "mean") -> torch.Tensor:
    """Hidden states of N responses, (N, T, D), pooled over the tokens in `mask`, (N, T), into (N, D), float32."""
    mask = mask.to(hidden.device) != 0
    if pool == "last":
        last = (mask * torch.arange(mask.size(1), device=mask.device)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    return (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def degree_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """- log q(level) of N degraded responses, (N,), from the logits of K levels, (N, K), and the levels, (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


class SelfSupervisedPOTrainer(PreferenceTrainer):
    """Trainer for SPO-style self-supervised preference optimization, with the arguments of [`~trl.DPOTrainer`].

    The data are those of [`PreferenceTrainer`], as texts or messages. The head is a part of the model while `train` runs only:
    saved models do not have it, checkpoints keep it beside them. Another extraction is a subclass with another `key_phrases`.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import SelfSupervisedPOConfig, SelfSupervisedPOTrainer

    trainer = SelfSupervisedPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=SelfSupervisedPOConfig("qwen-spo", loss_type="ipo"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```

    Attributes:
        key_phrases: Function of a text that returns start, end and score of its key phrases.
    """

    config_class = SelfSupervisedPOConfig
    method = "self-supervised-po"
    card_options = ("loss_type", "beta")
    reads_hidden_states = True
    key_phrases: Callable[[str], list[Span]] = staticmethod(rake)
    _tag_names = ["trl", "trl-ift", "self-supervised-po"]  # noqa: RUF012
    _name = "SPO-style"
    _paper = arxiv_paper(
        "2409.17791",
        "li2024self",
        "Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree Awareness",
        "Jian Li and Haojing Huang and Yujia Zhang and Pengfei Xu and Xi Chen and Rui Song and Lida Shi and Jingwen Wang and "
        "Hao Xu",
        2024,
    )

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: SelfSupervisedPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        args = self._own_config(args, model)
        self._head: torch.nn.Linear | None = None
        self._inputs: dict[str, Any] = {}
        self._hidden: torch.Tensor | None = None
        active = args.spo_gamma_chosen or args.spo_gamma_rejected
        if active and optimizers[0] is not None:
            raise ValueError(
                "`optimizers` holds an optimizer that was built without the head of the auxiliary loss, which would not be "
                "trained. Drop it: the trainer builds its own."
            )
        if active and data_collator is not None and not isinstance(data_collator, DegreeCollator):
            raise ValueError(
                f"`data_collator` ({type(data_collator).__name__}) does not draw the levels of degraded responses. Derive it "
                "from `trl_ift.preference.self_supervised_po.DegreeCollator`, or drop it."
            )
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if not active:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("The head of the auxiliary loss is not supported with DeepSpeed and FSDP. Use DDP.")
        size = base_model(self.model).config.get_text_config().hidden_size
        self._head = torch.nn.Linear(size, args.spo_levels, dtype=torch.float32, device=args.device)
        torch.nn.init.zeros_(self._head.weight)
        torch.nn.init.zeros_(self._head.bias)
        if data_collator is None:
            self.data_collator = DegreeCollator(**vars(self.data_collator), seed=args.seed)
        self.add_callback(_Epoch(self.data_collator))

    def _declare(self, args: SelfSupervisedPOConfig) -> None:
        found = {"degraded_chosen": args.spo_gamma_chosen, "degraded_rejected": args.spo_gamma_rejected}
        self._gammas = {name: gamma for name, gamma in found.items() if gamma}
        self.branches = tuple(Branch(name) for name in self._gammas)

    # ---------------------------------------------------------------- data

    def _check_dataset(self, args: SelfSupervisedPOConfig, dataset: Any, name: str, stored: bool) -> None:
        super()._check_dataset(args, dataset, name, stored)
        row = first_row(dataset)
        if self._gammas and not ({"chosen", "rejected"} <= set(row) and ("prompt" in row or "prompt_ids" not in row)):
            raise ValueError(
                f"`{name}` has token ids and no texts, whose content could be removed. Add the columns 'prompt', 'chosen' and "
                "'rejected', or set `spo_gamma_chosen=0` and `spo_gamma_rejected=0`."
            )
        for branch in self.branches:
            side = branch.name.removeprefix("degraded_")
            if branch.rows_column in row and not self._is_own(dataset):
                raise ValueError(
                    f"`{name}` has the column '{branch.rows_column}', made by another trainer, with levels and key phrases of "
                    "its own. Drop the column: this trainer makes it."
                )
            if row[side]:
                _text_of(row[side], side)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        for branch in self.branches:
            if branch.rows_column in first_row(dataset):
                continue
            options = {
                "side": branch.name.removeprefix("degraded_"),
                "tokenizer": processing_class,
                "eos_token": self._tokenizer.eos_token,
                "only": None if dataset_name == "train" else args.seed,  # evaluations are compared with each other
                "levels": args.spo_levels,
                "length_control": args.spo_length_control,
                "extract": self.key_phrases,
            }
            features = {}
            if dataset.features is not None:  # of rows without key phrases they would not be known
                features = {"features": Features({**dataset.features, branch.rows_column: _ROWS})}
            with global_then_local_main_first():
                code = versioned(_degrade, prompt_and_response_ids, self.key_phrases)
                dataset = dataset.map(code, fn_kwargs=options, **features)
            if isinstance(dataset, Dataset) and dataset_name == "train" and not any(dataset[branch.rows_column]):
                raise ValueError(
                    f"No {options['side']} response has {args.spo_levels - 1} key phrases, so that the auxiliary loss would "
                    "have no rows. Lower `spo_levels`, or derive a trainer with `key_phrases` for the language of the data."
                )
        return self._own(dataset)

    # ---------------------------------------------------------------- the head

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in TRL; the head of the auxiliary loss is a part of the model meanwhile."""
        if self._head is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        names = {f"spo_head.{name}" for name, _ in self._head.named_parameters()}
        base = base_model(self.model)
        saved, base._keys_to_ignore_on_save = (
            base._keys_to_ignore_on_save,
            {*(base._keys_to_ignore_on_save or ()), *names},
        )
        self.model.spo_head = self._head  # before the optimizer is built
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            base._keys_to_ignore_on_save = saved
            del self.model.spo_head

    def create_optimizer(self, model=None):
        """As in transformers, with a group of its own for the head."""
        optimizer = super().create_optimizer(model)
        if self._head is None:
            return optimizer
        own = {id(parameter) for parameter in self._head.parameters()}
        if not any({id(parameter) for parameter in group["params"]} == own for group in optimizer.param_groups):
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
            options = {"lr": self.args.spo_head_learning_rate, "weight_decay": 0.0}
            optimizer.add_param_group({"params": list(self._head.parameters()), **options})
        return optimizer

    def _save_extension_state(self, checkpoint: Path, state: dict[str, Any]) -> None:
        super()._save_extension_state(checkpoint, state)
        if self._head is not None:
            values = {name: value.tolist() for name, value in self._head.state_dict().items()}
            (checkpoint / _STATE_FILE).write_text(json.dumps(values))

    def _load_extension_state(self, checkpoint: Path) -> None:
        super()._load_extension_state(checkpoint)
        if self._head is None:
            return
        if not (checkpoint / _STATE_FILE).is_file():
            raise ValueError(
                f"The checkpoint `{checkpoint}` has no `{_STATE_FILE}`: it was not written by a run with the auxiliary loss. "
                "Start from its model instead of resuming."
            )
        values = json.loads((checkpoint / _STATE_FILE).read_text())
        self._head.load_state_dict({name: torch.tensor(value) for name, value in values.items()})

    # ---------------------------------------------------------------- loss

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        pairs, extra = super()._split(inputs)
        labels = {
            name: pairs.pop(name) for name in [f"{branch.name}_labels" for branch in self.branches] if name in pairs
        }
        return pairs, extra | labels

    def _branch_inputs(self, extra: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        found = super()._branch_inputs(extra)
        for branch in found.values():  # their hidden states are read, not their log-probabilities
            branch["labels"] = torch.full_like(branch["labels"], -100)
        return found

    def _compute_loss(self, model, inputs, return_outputs):
        if not self.branches:
            return super()._compute_loss(model, inputs, return_outputs)
        self._inputs, self._hidden = inputs, None
        present = [
            inputs[f"{branch.name}_input_ids"] for branch in self.branches if f"{branch.name}_input_ids" in inputs
        ]
        rows = inputs["input_ids"].size(0) + sum(ids.size(0) for ids in present)

        def keep(module: Any, args: Any, output: Any) -> Any:
            hidden = output.last_hidden_state
            # The reference may be the same module, its adapter switched off, and sees the pairs alone
            reference = hidden.size(0) != rows or (self.model.training and not torch.is_grad_enabled())
            if reference or self._hidden is not None or self._head is None:
                return None
            # DDP has to find the parameters of the head among those of the forward pass
            link = sum(parameter.sum() for parameter in self._head.parameters())
            output.last_hidden_state = self._hidden = hidden + (0.0 * link).to(hidden)
            return output

        handle = base_model(self.model).get_decoder().register_forward_hook(keep)
        try:
            return super()._compute_loss(model, inputs, return_outputs)
        finally:
            handle.remove()
            self._inputs, self._hidden = {}, None

    def branch_terms(self, batch: PreferenceBatch) -> Iterator[Term]:
        if self._head is None:
            return
        start = self._inputs["input_ids"].size(0)
        widths = [self._inputs[key].size(1) for key in self._inputs if key.endswith("input_ids")]
        for name, gamma in self._gammas.items():
            labels = self._inputs.get(f"{name}_labels", torch.zeros(0, dtype=torch.long))
            number = len(labels)
            correct, loss = torch.zeros(()), torch.zeros(())
            if number and self._hidden is not None:
                mask = self._inputs[f"{name}_completion_mask"]
                hidden = self._hidden[start : start + number, -max(widths) :][:, : mask.size(1)]
                start += number
                with torch.autocast(hidden.device.type, enabled=False):
                    logits = self._head(pooled(hidden, mask, self.args.spo_pool).to(self._head.weight.device))
                labels = labels.to(logits.device)
                loss = degree_loss(logits, labels).sum()
                correct = (logits.argmax(1) == labels).sum()
            yield Term(loss, name, "row", gamma)
            kind = name.removeprefix("degraded_")
            self._record_mean(f"spo/loss_{kind}", loss, number)
            self._record_mean(f"spo/accuracy_{kind}", correct, number)
            self._record_mean(f"spo/rows_{kind}", torch.tensor(number), batch.chosen.logps.numel())
