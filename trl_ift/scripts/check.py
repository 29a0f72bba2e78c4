"""The script of `trl-ift check METHOD`: a dry run of the training that `trl-ift METHOD` would start with the same options."""

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from trl_ift.redaction import redacted
from trl_ift.registry import METHODS, Method, get_method
from trl_ift.scripts.train import (
    INPUT_ERRORS,
    given_options,
    parse_options,
    prepare,
    read_config,
    report_error,
    usage_error,
)
from trl_ift.stages import is_main_process


PROG = "trl-ift check"


def make_parser(method: Method, prog: str | None = None) -> Any:
    """Return the parser of the method's training command, with the options of the check."""
    script = import_module(f"trl_ift.scripts.{method.script.removesuffix('.py')}")
    parser = script.make_parser(method, prog or f"{PROG} {method.name}")
    parser.description = (
        f"Dry run: what `trl-ift {method.name}` would do with these options. Writes and pushes nothing."
    )
    add = parser.add_argument
    add("--method", help="The method, in a YAML file that names it; must be that of the command line")
    add("--rows", type=int, default=3, help="Rows to show")
    add("--json", metavar="FILE", help="Write what was found as JSON too")
    add("--no_model", action="store_true", help="Load no weights: no first loss, all else from config and tokenizer")
    return parser


def split_method(argv: list[str]) -> tuple[Method, list[str]]:
    """Return the method of a command line and its options: `METHOD [options]`, or `FILE.yaml [options]` with a key `method`."""
    names = ", ".join(method.name for method in METHODS)
    usage = (
        f"`{PROG} METHOD --config FILE [options of trl-ift METHOD]`, or `{PROG} FILE` with a key `method` in the file"
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\nMethods: {names}. `{PROG} METHOD --help` lists the options.")
        raise SystemExit(0 if argv else 2)
    first, rest = argv[0], argv[1:]
    if Path(first).is_file():
        try:
            name = read_config(first).get("method")
        except INPUT_ERRORS as error:
            raise SystemExit(report_error(PROG, error)) from None
        if name is None:
            usage_error(PROG, f"`{first}` has no key `method`. Add one, or name the method: {usage}")
        first, rest = str(name), ["--config", first, *rest]
    if first not in {method.name for method in METHODS}:
        usage_error(PROG, f"unknown method {first!r}: expected {usage}. Methods: {names}")
    return get_method(first), rest


# ---------------------------------------------------------------- settings without an effect


@dataclass(frozen=True)
class Settings:
    """The parsed options of a training, all in one namespace, and which of them the user gave."""

    values: Mapping[str, Any]
    given: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        value = self.values.get(name)
        return getattr(value, "value", value)  # of an enumeration


_EVALUATION = (
    "eval_steps", "per_device_eval_batch_size", "eval_accumulation_steps", "eval_delay", "eval_packing",
    "prediction_loss_only", "metric_for_best_model", "dataset_test_split", "bf16_full_eval", "fp16_full_eval",
    "batch_eval_metrics",
)  # fmt: skip
_HUB = ("hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision", "hub_token")
_LORA = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "lora_task_type", "use_rslora", "use_dora",
)  # fmt: skip
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
# Names, when they have no effect, and what would give them one
_UNUSED = (
    (_EVALUATION, lambda s: s.eval_strategy == "no", "nothing is evaluated: set `eval_strategy`"),
    (("eval_steps",), lambda s: s.eval_strategy == "epoch", "with `eval_strategy: epoch`: set it to steps"),
    (
        ("save_total_limit", "save_only_model", "save_steps"),
        lambda s: s.save_strategy == "no",
        "nothing is saved during training: set `save_strategy`",
    ),
    (("save_steps",), lambda s: s.save_strategy in ("epoch", "best"), "unless `save_strategy` is steps"),
    (
        ("logging_steps",),  # it is the default of `eval_steps` too
        lambda s: s.logging_strategy != "steps" and not (s.eval_strategy == "steps" and s.eval_steps == s.logging_steps),
        "unless `logging_strategy` is steps",
    ),
    (
        ("warmup_steps",),
        lambda s: s.lr_scheduler_type == "constant",
        "`lr_scheduler_type: constant` has no warm-up: set it to constant_with_warmup",
    ),
    (
        ("warmup_steps",),
        lambda s: s.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
        "this `lr_scheduler_type` has no warm-up: set another one",
    ),
    (_HUB, lambda s: not s.push_to_hub, "nothing is pushed: set `push_to_hub`"),
    (_LORA, lambda s: not s.use_peft, "no adapter is trained: set `use_peft`"),
    (
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
        lambda s: not s.load_in_4bit,
        "the model is not loaded in 4 bits: set `load_in_4bit`",
    ),
    (("num_train_epochs",), lambda s: s.max_steps > 0, "`max_steps` decides: drop one of the two"),
    (("packing_strategy",), lambda s: not (s.packing or s.eval_packing), "nothing is packed: set `packing`"),
    (
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        lambda s: not s.gradient_checkpointing,  # which transformers sets to the value of `activation_checkpointing`
        "activations are kept: set `gradient_checkpointing`",
    ),
    (
        ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"),
        lambda s: not s.dataloader_num_workers,
        "the main process loads the data: set `dataloader_num_workers`",
    ),
    (("truncation_mode",), lambda s: s.max_length is None, "nothing is truncated: set `max_length`"),
    (
        ("precompute_ref_batch_size",),
        lambda s: not (s.precompute_ref_log_probs or s.logit_mode == "reference"),
        "no reference is stored beforehand: set `precompute_ref_log_probs`",
    ),
    (("adam_epsilon",), lambda s: "lion" in s.optim, "`optim` has no such option"),
    (_ADAM, lambda s: s.optim.startswith(("sgd", "adafactor", "adagrad", "rmsprop")), "`optim` has no such options"),
    (
        ("greater_is_better",),
        lambda s: not s.metric_for_best_model and not s.load_best_model_at_end,
        "no checkpoint is the best one: set `metric_for_best_model`",
    ),
    (("ignore_data_skip",), lambda s: not s.resume_from_checkpoint, "nothing is resumed"),
    (
        ("dataset_config", "dataset_train_split", "dataset_streaming"),
        lambda s: bool(s.datasets),
        "the parts of `datasets:` have their own (`name`, `split`; `streaming` beside them)",
    ),
    (("streaming",), lambda s: not s.datasets, "without `datasets:`: set `dataset_streaming`"),
    (
        ("dataset_config",),
        lambda s: bool(s.dataset_name) and Path(s.dataset_name).expanduser().is_file(),
        "a file has no configurations",
    ),
    (("run_name",), lambda s: not s.report_to, "nothing is tracked: set `report_to`"),
    (
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        lambda s: "trackio" not in s.report_to,
        "without trackio in `report_to`",
    ),
    (("fsdp_config",), lambda s: not s.fsdp, "without `fsdp`"),
    (
        ("length_column_name",),
        lambda s: s.train_sampling_strategy not in ("group_by_length", "batch_rebalance"),
        "unless `train_sampling_strategy` is group_by_length or batch_rebalance",
    ),
    (("liger_kernel_config",), lambda s: not s.use_liger_kernel, "without `use_liger_kernel`"),
    (("torch_compile_backend", "torch_compile_mode"), lambda s: not s.torch_compile, "without `torch_compile`"),
)  # fmt: skip


def unused_settings(settings: Settings) -> list[str]:
    """A message for each option that the user gave and that nothing reads."""
    messages = []
    for names, unused, reason in _UNUSED:
        for name in names:
            # A switch that is off asks for nothing
            if name in settings.given and settings.values.get(name) not in (None, False) and unused(settings):
                value = redacted(getattr(settings, name), name)
                value = f"{value:g}" if isinstance(value, float) else value
                messages.append(f"`{name}: {value}` ({settings.given[name]}) has no effect: {reason}, or drop it.")
    if "eval_on_start" in settings.given and settings.eval_on_start and settings.eval_strategy == "no":
        messages.append(
            f"`eval_on_start: True` ({settings.given['eval_on_start']}) evaluates before the first step, and there is no "
            "evaluation dataset, so that training stops there: set `eval_strategy`, or drop it."
        )
    return messages


def _misplaced(settings: Settings, found: Any, steps_known: bool) -> list[str]:
    """Messages about options whose value the size of the run or of the model makes void."""
    messages, steps, positions = [], found.plan["steps"], found.plan["positions"]
    # A fraction is of the steps, and rounded up to one
    counted = "warmup_steps" in settings.given and settings.warmup_steps >= 1
    if counted and steps_known and found.plan["warmup_steps"] >= steps:
        messages.append(
            f"`warmup_steps: {settings.warmup_steps:g}` takes all of the {steps} steps: the learning rate is never reached. "
            "Lower it."
        )
    # Positions begin anew with each text that is packed, unless texts are cut wherever a row ends
    restarted = settings.packing and settings.packing_strategy != "wrapped"
    limit = settings.max_length if "max_length" in settings.given and not restarted else None
    if limit and positions and limit > positions:
        messages.append(f"`max_length: {limit}` is more than the {positions} positions of the model. Lower it.")
    return messages


# ---------------------------------------------------------------- the run


class _Deferred(Method):
    """A method whose "trainer" is the arguments it would be built with."""

    trainer_class = dict


def inspect(method: Method, parsed: tuple[Any, ...], given: Mapping[str, str]) -> Any:
    """Inspect the training of parsed options: those of the method's script, and a namespace with those of the check."""
    from trl_ift.inspection import inspect_training

    *configs, options = parsed
    if options.rows < 0:
        raise ValueError(f"`--rows {options.rows}` must be at least 0.")
    one_training = method.script == "train.py"
    if not one_training:
        configs[1] = _of_iteration(configs[1])
    settings = Settings({name: value for config in configs for name, value in vars(config).items()}, given)
    errors = unused_settings(settings)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if one_training:
                arguments = prepare(_Deferred(**vars(method)), *configs)
            else:
                arguments = _self_play_arguments(configs, folder, options)
            shown = {"rows": options.rows, "load_model": not options.no_model}
            found = inspect_training(method.trainer_class, **shown, **arguments)
    except INPUT_ERRORS as error:
        if not errors:
            raise
        first = str(error) or type(error).__name__
        raise ValueError("\n".join([first, *(f"error: {message}" for message in errors)])) from error
    if not one_training:
        found.data["note"] = (
            "answers of the model to the first prompts alone: the others are generated when training begins, so that the "
            "figures of data and steps are those of these rows"
        )
        found.data["dropped"] = {"number": 0, "why": []}
        if found.memory["without_checkpointing"] is not None:
            found.memory["without_checkpointing"]["fits"] = None  # it is the user's choice there
    found.errors = [*errors, *_misplaced(settings, found, one_training), *found.errors]
    return found


def _of_iteration(training_args: Any) -> Any:
    """The config as an iteration of self-play trains with it."""
    training_args = copy(training_args)
    training_args.precompute_ref_log_probs = True
    training_args.overwrite_output_dir = True  # it goes on with what is there
    return training_args


def _self_play_arguments(configs: list[Any], folder: str, options: Any) -> dict[str, Any]:
    """The arguments of the trainer of a first iteration, on the first rows, which the model answers."""
    from peft import PeftModel

    from trl_ift.data import build_pairs, generate_completions
    from trl_ift.data.inference import load_model, load_tokenizer
    from trl_ift.data.pairs import first_turns
    from trl_ift.inspection import without_evaluation

    script_args, training_args, model_args, dataset_args, config, *latent = configs
    if options.no_model:
        raise ValueError("`--no_model` cannot check self-play: its rejected answers are the model's own. Drop it.")
    method = get_method("spin" if not latent else "ld-align")
    arguments = prepare(_Deferred(**vars(method)), script_args, training_args, model_args, dataset_args)
    number = max(options.rows, training_args.per_device_train_batch_size)
    data = first_turns(arguments["train_dataset"])
    data = data.select(range(min(number, len(data), config.max_rows or number)))
    kwargs = dict(training_args.model_init_kwargs or {})
    completions = generate_completions(
        arguments["model"],
        data.remove_columns("completion"),
        folder,
        adapter=config.initial_adapter,
        quantization_config=arguments["quantization_config"],
        model_init_kwargs=kwargs,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=training_args.seed,
        score=False,
    )
    pairs = build_pairs(data, completions, processing_class=load_tokenizer(arguments["model"], None, kwargs))
    if latent:  # whose distances an encoder measures later
        pairs = pairs.add_column("latent_distance", [1.0] * len(pairs))
    arguments |= {"args": without_evaluation(arguments["args"]), "train_dataset": pairs, "eval_dataset": None}
    if config.initial_adapter is not None:  # which is trained further
        if (quantization := arguments["quantization_config"]) is not None:
            kwargs["quantization_config"] = quantization
        policy = load_model(arguments["model"], None, kwargs)
        arguments["model"] = PeftModel.from_pretrained(policy, config.initial_adapter, is_trainable=True)
        arguments["args"].model_init_kwargs = arguments["peft_config"] = arguments["quantization_config"] = None
    return arguments


def run(argv: list[str]) -> int:
    """Run the script on a command line, METHOD first: 0, 1 if something is wrong, 130 after Ctrl-C."""
    from accelerate import PartialState

    method = get_method(argv[0])
    prog = f"{PROG} {method.name}"
    try:
        parser = make_parser(method, prog)
        parsed = parse_options(parser, argv[1:], prog)
        options = parsed[-1]
        if options.method not in (None, method.name):
            usage_error(prog, f"the YAML file names the method {options.method!r}")
        given = given_options(parser, argv[1:])
        found = inspect(method, parsed, given)
        if is_main_process():
            report = redacted(found.to_dict())
            print(rendered(report, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
            if options.json is not None:
                text = json.dumps(report, indent=2, ensure_ascii=False)
                Path(options.json).write_text(f"{text}\n", encoding="utf-8")
    except INPUT_ERRORS as error:
        return report_error(prog, error)
    except KeyboardInterrupt:
        return 130
    PartialState().destroy_process_group()
    return 1 if found.errors else 0


# ---------------------------------------------------------------- the report


# Kind of a segment -> marks without colour, codes with
_MARKS = {"context": ("", ""), "trained": ("⟦", "⟧"), "cut": ("~~", "~~")}
_COLOURS = {"context": "", "trained": "\x1b[32m", "cut": "\x1b[2;9m"}
_LONGEST = 600  # characters of a segment that are shown


def rendered(found: Mapping[str, Any], colour: bool = False) -> str:
    """The report for a terminal, from `Inspection.to_dict()`."""
    lines: list[str] = []
    if found["rows"]:
        key = "green: trained, struck: cut" if colour else "⟦trained⟧, ~~cut~~"
        lines += _head(f"Rows as the model sees them ({key})")
        for number, row in enumerate(found["rows"]):
            for response in row:
                cut = f", {response['cut']} cut" if response["cut"] else ""
                lines.append(
                    f"  row {number}, {response['name']}: {response['tokens']} tokens, {response['trained']} trained{cut}"
                )
                text = "".join(_marked(kind, part, colour) for kind, part in response["segments"])
                lines += [f"    {line}" for line in text.split("\n")]
    lines += _data_lines(found["data"])
    lines += _head("Reference")
    lines.append(f"  {found['reference']['kind']}; {found['reference']['cost']}")
    lines += _loss_lines(found["loss"])
    lines += _memory_lines(found["memory"])
    lines += _plan_lines(found["plan"])
    if found["warnings"]:
        lines += _head("Warnings of the trainer")
        lines += [f"  - {message}" for message in found["warnings"]]
    lines += _head("Verdict")
    lines += [f"  error: {message}" for message in found["errors"]]
    if not found["errors"]:
        lines.append("  Nothing is wrong with this training.")
    return "\n".join(lines).lstrip("\n")


def _head(title: str) -> list[str]:
    return ["", title]


def _marked(kind: str, text: str, colour: bool) -> str:
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    if not colour:
        return _MARKS[kind][0] + text + _MARKS[kind][1]
    code = _COLOURS[kind]
    return f"{code}{text}\x1b[0m" if code else text


def _data_lines(data: Mapping[str, Any]) -> list[str]:
    lines, stream = _head("Data"), data["kept"] is None
    if stream:
        lines.append(f"  a stream; the first {data['looked_at']} rows:")
    else:
        dropped = data["dropped"]
        lines.append(f"  {data['rows']} rows given, {data['kept']} trained on, {dropped['number']} dropped")
        lines += [f"    {reason}" for reason in dropped["why"]]
    if "note" in data:
        lines.append(f"  note: {data['note']}")
    quantiles = ", ".join(f"{name} {value}" for name, value in data["lengths"].items())
    share = data["trained_tokens"] / max(data["tokens"], 1)
    lines += [
        f"  {data['truncated']:.1%} of the rows are truncated",
        f"  tokens of a response with its prompt: {quantiles}",
        f"  {data['tokens']:,} tokens {'of these rows' if stream else 'an epoch'} in {data['responses']:,} responses, "
        f"{data['trained_tokens']:,} ({share:.0%}) trained",
        f"  padding: {data['padding']:.0%} of the places in a batch",
        f"  {data['duplicates']} rows repeat the prompt and the first response of another",
    ]
    return lines


def _loss_lines(loss: Mapping[str, Any]) -> list[str]:
    lines = _head("First loss")
    if loss["measured"] is None:
        return [*lines, f"  not measured: {loss['reason']}"]
    known = f"known value {loss['known']:.5f}" if loss["known"] is not None else "no known value"
    reason = f" ({loss['reason']})" if loss["reason"] else ""
    return [*lines, f"  measured on the first micro-batch {loss['measured']:.5f}, {known}{reason}"]


def _memory_lines(memory: Mapping[str, Any]) -> list[str]:
    lines = _head("Memory of a device (an estimate; the formula is in docs/check.md)")
    lines += [f"  {name:<12} {_size(value):>10}" for name, value in memory["parts"].items() if value]
    if memory["unknown"] is not None:
        lines.append(f"  without the activations, which cannot be estimated for this model ({memory['unknown']})")
    available = f" of {_size(memory['available'])}" if memory["available"] else ""
    lines.append(f"  {'in all':<12} {_size(memory['total']):>10}{available}")
    if memory["available"] and memory["total"] > memory["available"]:
        lines.append("  That does not fit.")
    if memory["without_checkpointing"] is not None:
        total, fits = memory["without_checkpointing"]["total"], memory["without_checkpointing"]["fits"]
        lines.append(f"  without gradient checkpointing {_size(total)}, and about a quarter less time.")
        if fits is not None:
            known = "fits, with a margin" if fits else "may not fit"
            lines.append(
                f"  That {known}: a training command keeps it {'off' if fits else 'on'} unless the option is set."
            )
    if memory["would_save"]:
        lines.append("  lower with:")
        lines += [f"    {_size(saved):>10}  {change}" for change, saved in memory["would_save"]]
    return lines


def _plan_lines(plan: Mapping[str, Any]) -> list[str]:
    epochs = "" if plan["epochs"] is None else f", {plan['epochs']:g} epochs"
    processes = f" on {plan['processes']} processes" if plan["processes"] > 1 else ""
    return [
        *_head("Training"),
        f"  {plan['steps']} steps of {plan['batch_size']} rows{processes}{epochs}, {plan['warmup_steps']} of warm-up",
        f"  {plan['tokens']:,} tokens in all",
        f"  {plan['trained_parameters']:,} of {plan['parameters']:,} parameters are trained",
        f"  checkpoints kept: {plan['checkpoints']}, of {_size(plan['checkpoint_bytes'])}",
    ]


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
