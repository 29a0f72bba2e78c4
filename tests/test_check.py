"""`trl-ift check` and what it is made of: the report on a training before it starts, without a trace of it."""

import copy
import json
import math
from pathlib import Path

import datasets
import pytest
import test_methods
import tiny
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile

from trl_ift import METHODS, DPOPConfig, DPOPTrainer, IFTTrainer, MinorDPOTrainer, get_method
from trl_ift.cli import main
from trl_ift.inspection import inspect_training
from trl_ift.memory import optimizer_bytes
from trl_ift.scripts import check
from trl_ift.scripts.train import parse_options
from trl_ift.sequences import sequences_of


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRL_IFT_DEBUG", raising=False)


def config_of(method, **settings):
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 4} | settings
    return method.config_class("never-written", **settings)


def arguments_of(method, tokenizer, model=None, data=None, **settings):
    makers = test_methods.DATA.get(method.name, lambda settings: {"train_dataset": tiny.preference_data()})
    model = model or test_methods.MODELS.get(method.name, lambda tokenizer: tiny.model("llama", tokenizer))(tokenizer)
    data = makers(settings) if data is None else {"train_dataset": data}
    return {"model": model, "args": config_of(method, **settings), "processing_class": tokenizer, **data}


def inspect(method, tokenizer, rows=3, load_model=True, peft_config=None, trainer_class=None, **given):
    arguments = arguments_of(method, tokenizer, **given)
    if peft_config is not None:
        arguments["peft_config"] = peft_config
    return inspect_training(trainer_class or method.trainer_class, rows=rows, load_model=load_model, **arguments)


# ---------------------------------------------------------------- every method


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method(method, tokenizer):
    arguments = arguments_of(method, tokenizer, push_to_hub=True, hub_token="hf_" + "x" * 30)
    model, args = arguments["model"], arguments["args"]
    weights, settings = copy.deepcopy(model.state_dict()), args.to_dict()
    found = inspect_training(method.trainer_class, **arguments)
    assert found.errors == []
    assert found.method == method.name
    assert math.isfinite(found.loss["measured"])
    if found.loss["known"] is None:
        assert found.loss["reason"]
    else:
        assert found.loss["measured"] == pytest.approx(found.loss["known"], abs=1e-3)
    assert len(found.rows) == 3
    for response in [response for row in found.rows for response in row]:
        assert {kind for kind, _ in response["segments"]} <= {"context", "trained"}
        assert 0 <= response["trained"] <= response["tokens"]
    assert sum(response["trained"] for row in found.rows for response in row) > 0
    assert found.data["tokens"] >= found.data["trained_tokens"] > 0
    assert found.memory["total"] == sum(found.memory["parts"].values())
    assert found.plan["steps"] == 3 * math.ceil(found.data["looked_at"] / 4)  # three epochs
    json.dumps(found.to_dict())
    # No trace
    assert not Path("never-written").exists()
    assert args.to_dict() == settings
    assert "forward" not in vars(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


LN2 = math.log(2)
# Worked out by hand, for policy = reference: options, data if not plain pairs, the value
KNOWN = {
    "dpo": ({}, LN2),
    "dpo ipo": ({"loss_type": "ipo", "beta": 0.1}, 25.0),
    "dpo hinge": ({"loss_type": "hinge"}, 1.0),
    "dpo precomputed": ({"precompute_ref_log_probs": True}, LN2),
    "dpo shared prompts": ({"shared_prompt": True}, LN2),
    "davir-dpo": ({}, LN2),
    "dpop": ({}, LN2),
    "minor-dpo": ({}, LN2),
    "chipo": ({}, LN2),
    "ada-dpo": ({"rho0": 0.3, "tau_min": 0.2}, 0.3 * 0.2),
    "exo": ({"exo_beta_r": 0.5}, 0.5 * sum(math.log(0.5) - math.log(1 / (1 + math.exp(x))) for x in (-2, 2))),
    "mpo": ({"reg_weight": 0.0, "logit_mode": "reference"}, -0.5),
    "self-supervised-po": (
        {"spo_gamma_chosen": 0.3, "spo_gamma_rejected": 0.1, "spo_levels": 3},
        LN2 + 0.4 * math.log(3),
    ),
    "regularized-po": ({}, None),
    "aligned-sft": ({}, None),
    "tpo": ({}, None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_losses(name, tokenizer):
    settings, expected = KNOWN[name]
    data = {"self-supervised-po": test_methods.wordy_data, "tpo": tiny.triple_data}.get(name, tiny.preference_data)()
    found = inspect(get_method(name.split()[0]), tokenizer, data=data, **settings)
    assert found.errors == []
    if expected is None:
        assert found.loss["known"] is None
        assert "depends on how likely the responses are" in found.loss["reason"]
    else:
        assert found.loss["known"] == pytest.approx(expected, rel=1e-5)
        assert found.loss["measured"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["minor-dpo", "dpop", "ift", "exo", "mpo", "eurus-reward", "ulma"])
def test_without_the_model(name, tokenizer, tmp_path):
    """All but the loss is the same, and no weights are read."""
    method = get_method(name)
    model = test_methods.MODELS.get(name, lambda tokenizer: tiny.model("llama", tokenizer))(tokenizer)
    for part in (model, tokenizer):
        part.save_pretrained("model")
    peft = (
        LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS") if name in ("dpop", "eurus-reward") else None
    )
    whole = inspect(method, tokenizer, model="model", peft_config=peft).to_dict()
    Path("model/model.safetensors").unlink()
    found = inspect(method, tokenizer, model="model", peft_config=peft, load_model=False).to_dict()
    assert found.pop("loss") == {"measured": None, "known": None, "reason": "the model was not loaded"}
    assert whole.pop("loss")["measured"] is not None
    assert found == whole


def test_a_model_in_memory_is_loaded(tokenizer):
    with pytest.raises(ValueError, match="`load_model=False` needs a model that is named by a string"):
        inspect(get_method("dpop"), tokenizer, load_model=False)


# ---------------------------------------------------------------- rows and data


def test_rows_and_truncation(tokenizer):
    """Against the tokenizer: what stands where, what is trained, and what `max_length` cuts."""
    row = tiny.preference_data()[5]
    lengths = [len(tokenizer(row["prompt"] + row[side])["input_ids"]) + 1 for side in ("chosen", "rejected")]
    prompt, limit = len(tokenizer(row["prompt"])["input_ids"]), lengths[0] - 3
    found = inspect(get_method("dpop"), tokenizer, data=Dataset.from_list([row] * 4), max_length=limit, rows=1)
    (chosen, rejected), decode = found.rows[0], tokenizer.decode
    ids = [*tokenizer(row["prompt"] + row["chosen"])["input_ids"], tokenizer.eos_token_id]
    assert chosen == {
        "name": "chosen", "tokens": limit, "trained": limit - prompt, "cut": 3,
        "segments": [["context", row["prompt"]], ["trained", decode(ids[prompt:limit])], ["cut", decode(ids[limit:])]],
    }  # fmt: skip
    kept = min(lengths[1], limit)
    assert (rejected["tokens"], rejected["trained"]) == (kept, kept - prompt)
    assert rejected["segments"][1][1].endswith("<|im_end|>") == (lengths[1] <= limit)
    assert found.data["truncated"] == 1.0
    assert found.data["tokens"] == 4 * (limit + kept)
    assert found.data["trained_tokens"] == 4 * (limit + kept - 2 * prompt)
    assert found.data["padding"] == pytest.approx(1 - (limit + kept) / (2 * limit))
    assert found.data["largest_batch"] == {"rows": 8, "length": limit, "labelled": 4 * (limit + kept - 2 * prompt)}
    assert found.data["duplicates"] == 3
    assert found.data["lengths"]["max"] == limit


def test_the_end_is_kept(tokenizer):
    found = inspect(get_method("dpop"), tokenizer, max_length=6, truncation_mode="keep_end")
    response = found.rows[0][0]
    assert response["segments"][0][0] == "cut"
    assert response["tokens"] == 6


def test_supervised_rows_show_what_is_cut(tokenizer):
    data = tiny.prompt_completion_data()
    long = max(len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in data)
    found = inspect(get_method("ift"), tokenizer, max_length=long - 2, rows=8)
    cut = [row[0]["cut"] for row in found.rows]
    assert max(cut) == 2
    assert found.data["truncated"] == sum(map(bool, cut)) / 8
    assert found.data["kept"] == 8


@pytest.mark.parametrize("mode", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}])
def test_rows_without_padding(tokenizer, mode):
    plain, found = (inspect(get_method("ift"), tokenizer, **options) for options in ({}, mode))
    assert found.data["padding"] == 0
    assert found.data["tokens"] == plain.data["tokens"]
    assert found.data["trained_tokens"] == plain.data["trained_tokens"]


def test_dropped_rows_have_a_reason(tokenizer):
    rows = tiny.preference_data().to_list()
    rows[2]["rejected"] = rows[2]["chosen"]
    found = inspect(get_method("dpop"), tokenizer, data=Dataset.from_list(rows))
    assert (found.data["rows"], found.data["kept"], found.data["dropped"]["number"]) == (8, 7, 1)
    assert found.data["dropped"]["why"] == ["Dropped 1 of 8 rows of the train dataset: 1 (chosen equals rejected)."]


def test_stream(tokenizer):
    data = tiny.preference_data().to_iterable_dataset()
    found = inspect(get_method("minor-dpo"), tokenizer, data=data, max_steps=5)
    assert (found.data["kept"], found.data["looked_at"], found.plan["steps"], found.plan["epochs"]) == (
        None,
        8,
        5,
        None,
    )
    assert found.loss["measured"] == pytest.approx(LN2)


def test_sequences_of_tokens_with_weights(tokenizer):
    """Of FIGA: the tokens that were put in or taken out, and the end of the revised answer."""
    found = inspect(get_method("figa"), tokenizer)
    chosen, _ = found.rows[0]
    assert 0 < chosen["trained"] < chosen["tokens"]
    everything = inspect(get_method("figa"), tokenizer, other_weight=0.5).rows[0][0]
    assert everything["trained"] > chosen["trained"]


def test_first_tokens_are_not_predicted():
    labels = torch.tensor([[5, 6, 7], [5, 6, -100]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 0]]), "labels": labels, "attention_mask": mask}
    (first,), (second,) = sequences_of(batch)
    assert (first.ids, first.trained) == ([5, 6, 7], [False, True, True])
    assert (second.ids, second.trained) == ([5, 6], [False, True])


# ---------------------------------------------------------------- reference and first loss


def test_kinds_of_reference(tokenizer):
    minor, lora = get_method("minor-dpo"), LoraConfig(r=2, target_modules="all-linear")

    def kind(**options):
        found = inspect(minor, tokenizer, rows=0, **options)
        return found.reference["kind"], found.memory["parts"]["reference"], found.loss["measured"]

    weights = 4 * sum(parameter.numel() for parameter in tiny.model("llama", tokenizer).parameters())
    assert kind() == ("copy of the model", weights, pytest.approx(LN2))
    assert kind(peft_config=lora) == ("the model, its adapter switched off", 0, pytest.approx(LN2))
    stored = (
        tiny.preference_data().add_column("ref_chosen_logps", [-9.0] * 8).add_column("ref_rejected_logps", [-9.0] * 8)
    )
    assert kind(data=stored)[:2] == ("stored columns", 0)
    assert kind(precompute_ref_log_probs=True) == ("precomputed with the model as it is", 0, pytest.approx(LN2))
    found = kind(precompute_ref_log_probs=True, peft_config=lora)
    assert found == ("precomputed with the model without its adapter as it is", 0, pytest.approx(LN2))
    assert inspect(get_method("tpo"), tokenizer).reference["kind"] == "none"


def test_wrong_reference(tokenizer):
    """An adapter that changes the model from the start: the trainer's own check, and the known loss."""
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    found = inspect(get_method("minor-dpo"), tokenizer, peft_config=lora)
    (error,) = found.errors
    assert error.startswith("The reference is not the model that is being trained")
    assert found.loss["known"] == pytest.approx(LN2)
    assert abs(found.loss["measured"] - LN2) > 1e-3

    class Unchecked(MinorDPOTrainer):  # drifts of both signs in a batch cancel in the trainer's check
        def _check_agreement(self, drift, num_tokens):
            pass

    found = inspect(get_method("minor-dpo"), tokenizer, peft_config=lora, trainer_class=Unchecked)
    (error,) = found.errors
    assert "with a reference that is the model as it starts it is 0.69315: the reference is another model" in error


def test_dropout_is_no_error(tokenizer):
    model = tiny.model("llama", tokenizer, attention_dropout=0.5)
    found = inspect(get_method("minor-dpo"), tokenizer, model=model)
    assert found.errors == []
    assert "dropout is on" in found.loss["reason"]
    assert abs(found.loss["measured"] - LN2) > 1e-3


def test_half_precision(tokenizer):
    found = inspect(get_method("minor-dpo"), tokenizer, bf16=True)
    assert found.errors == []
    assert found.loss["known"] == pytest.approx(LN2)


def test_too_few_positions(tokenizer):
    model = tiny.model("llama", tokenizer, max_position_embeddings=16)
    (error,) = inspect(get_method("dpop"), tokenizer, model=model).errors
    assert "the model 16 positions. Set `max_length=16`" in error


# ---------------------------------------------------------------- memory and plan


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_against_the_measured_peak(tokenizer, tmp_path, adapter, checkpointing):
    size = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
    data = tiny.preference_data().map(lambda row: {"prompt": row["prompt"] * 8})
    arguments = {
        "processing_class": tokenizer,
        "train_dataset": data,
        "peft_config": LoraConfig(r=4, target_modules="all-linear") if adapter else None,
    }
    options = {"max_steps": 2, "gradient_checkpointing": checkpointing, "save_strategy": "no", "disable_tqdm": True}
    args = config_of(get_method("dpop"), **options)
    found = inspect_training(DPOPTrainer, model=tiny.model("llama", tokenizer, **size), args=args, rows=0, **arguments)
    args.output_dir = str(tmp_path / "run")
    trainer = DPOPTrainer(model=tiny.model("llama", tokenizer, **size), args=args, **arguments)
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    before = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 2**22
    assert 0.5 < found.memory["total"] / (before + peak) < 2


def test_what_lowers_the_memory(tokenizer):
    found = inspect(get_method("minor-dpo"), tokenizer, rows=0, gradient_checkpointing=False)
    changes = {change.split("`")[1]: saved for change, saved in found.memory["would_save"]}
    parts = found.memory["parts"]
    assert changes["precompute_ref_log_probs"] == parts["reference"]
    assert changes["use_peft"] == parts["gradients"] + parts["optimizer"] + parts["reference"]
    lower = inspect(get_method("minor-dpo"), tokenizer, rows=0, gradient_checkpointing=True)
    assert changes["gradient_checkpointing"] == found.memory["total"] - lower.memory["total"]
    assert sorted(changes.values(), reverse=True) == [saved for _, saved in found.memory["would_save"]]


def test_optimizers():
    sizes = {"adamw_torch_fused": 800, "adamw_8bit": 200, "sgd": 0, "adafactor": 0, "lion_32bit": 400, "rmsprop": 400}
    for name, expected in sizes.items():
        assert optimizer_bytes(name, 400, 100) == expected, name


def test_plan(tokenizer):
    options = {"max_steps": 7, "save_steps": 2, "warmup_steps": 0.5, "gradient_accumulation_steps": 2}
    found = inspect(get_method("dpop"), tokenizer, per_device_train_batch_size=2, **options)
    plan, parts = found.plan, found.memory["parts"]
    assert (plan["steps"], plan["epochs"], plan["batch_size"], plan["warmup_steps"]) == (7, 3.5, 4, 4)
    assert (plan["checkpoints"], plan["tokens"]) == (4, round(3.5 * found.data["tokens"]))
    assert plan["checkpoint_bytes"] == parts["weights"] + parts["optimizer"]
    assert inspect(get_method("dpop"), tokenizer, save_total_limit=1, **options).plan["checkpoints"] == 1


# ---------------------------------------------------------------- settings without an effect


def unused(method, *argv):
    parser = check.make_parser(get_method(method))
    *configs, _ = parse_options(parser, list(argv), "x")[:5]
    values = {name: value for config in configs for name, value in vars(config).items()}
    return check.unused_settings(check.Settings(values, check.given_options(parser, list(argv))))


@pytest.mark.parametrize(
    ("method", "argv", "name"),
    [
        ("dpop", "--eval_steps 10", "eval_steps"),
        ("dpop", "--test_split_size 0.1", "test_split_size"),
        ("dpop", "--eval_strategy epoch --eval_steps 10", "eval_steps"),
        ("dpop", "--save_strategy no --save_total_limit 2", "save_total_limit"),
        ("dpop", "--save_strategy epoch --save_steps 10", "save_steps"),
        ("dpop", "--hub_model_id me/model", "hub_model_id"),
        ("dpop", "--lora_r 16", "lora_r"),
        ("dpop", "--bnb_4bit_quant_type nf4", "bnb_4bit_quant_type"),
        ("dpop", "--max_steps 9 --num_train_epochs 2", "num_train_epochs"),
        ("ift", "--packing_strategy wrapped", "packing_strategy"),
        ("dpop", "--dataloader_persistent_workers true", "dataloader_persistent_workers"),
        ("dpop", "--precompute_ref_batch_size 4", "precompute_ref_batch_size"),
        ("dpop", "--optim adafactor --adam_beta1 0.8", "adam_beta1"),
        ("dpop", "--run_name a --report_to none", "run_name"),
        ("ulma", "--greater_is_better true", "greater_is_better"),
    ],
)
def test_unused_settings(method, argv, name):
    (message,) = unused(method, "--output_dir", "out", *argv.split())
    assert message.startswith(f"`{name}: ")
    assert "(the command line) has no effect" in message


def test_settings_with_an_effect_or_by_default():
    assert unused("dpop", "--output_dir", "out") == []
    assert unused("dpop", "--use_peft", "--lora_r", "4", "--eval_strategy", "steps", "--eval_steps", "3") == []
    assert unused("dpop", "--push_to_hub", "false", "--hub_always_push", "false", "--max_steps", "4") == []
    assert unused("mpo", "--precompute_ref_batch_size", "4", "--logit_mode", "reference") == []


def test_settings_of_a_file_and_secrets():
    Path("run.yaml").write_text("eval_steps: 10\nhub_token: hf_abcdefghijklmnopqrstuvwxyz\nsave_total_limit: null\n")
    first, second = unused("dpop", "--config", "run.yaml")
    assert "(run.yaml)" in first
    assert "abcdef" not in first + second
    assert "`hub_token: ***`" in second


# ---------------------------------------------------------------- the command


@pytest.fixture
def run_file(model_dir):
    """A YAML file of a training that is right, with its method."""
    tiny.preference_data().to_json("pairs.jsonl")
    settings = {
        "method": "dpop", "model_name_or_path": model_dir, "dataset_name": "pairs.jsonl", "output_dir": "out",
        "use_peft": True, "lora_target_modules": "all-linear", "per_device_train_batch_size": 4, "max_length": 32,
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    return "run.yaml"


def test_command_by_file(run_file, capfd):
    """`trl-ift check FILE`, launched."""
    assert main(["check", run_file, "--rows", "1", "--json", "found.json"]) == 0
    shown = capfd.readouterr().out
    assert "What is the capital of France?⟦ The capital of France is Paris.<|im_end|>⟧" in shown
    assert "measured on the first micro-batch 0.69315, known value 0.69315" in shown
    assert "Nothing is wrong with this training." in shown
    assert "\x1b" not in shown
    found = json.loads(Path("found.json").read_text())
    assert found["method"] == "dpop"
    assert found["errors"] == []
    assert not Path("out").exists()


def test_command_by_method(run_file, model_dir, capfd):
    """`trl-ift check METHOD [options]`, launched, with settings that have no effect."""
    tiny.messages_data().to_json("data.jsonl")
    options = ["--model_name_or_path", model_dir, "--dataset_name", "data.jsonl", "--output_dir", "out", "--no_model"]
    assert main(["check", "ift", *options, "--eval_steps", "5", "--warmup_steps", "99", "--max_length", "600"]) == 1
    shown = capfd.readouterr().out
    assert "error: `eval_steps: 5` (the command line) has no effect" in shown
    assert "error: `warmup_steps: 99` takes all of the 3 steps" in shown
    assert "error: `max_length: 600` is more than the 512 positions of the model" in shown
    assert "not measured: the model was not loaded" in shown
    assert not Path("out").exists()


def test_bad_input(run_file, capsys):
    assert check.run(["dpop", "--config", run_file, "--dataset_name", "nowhere.jsonl"]) == 1
    assert "`nowhere.jsonl` does not exist" in capsys.readouterr().err
    for argv, expected in (
        (["nothing"], "unknown method 'nothing'"),
        ([run_file.replace("run", "other")], "unknown method 'other.yaml'"),
        (["minor-dpo", "--config", run_file], "the YAML file names the method 'dpop'"),
        (["dpop", "--lerning_rate", "1"], "unknown option --lerning_rate"),
    ):
        with pytest.raises(SystemExit) as stop:
            if argv[0] == "minor-dpo":
                check.run(argv)
            else:
                main(["check", *argv])
        assert stop.value.code == 2
        assert expected in capsys.readouterr().err


def test_broken_files(capsys):
    Path("list.yaml").write_text("[1]")
    Path("bare.yaml").write_text("seed: 1")
    for file, code, expected in (("list.yaml", 1, "found list"), ("bare.yaml", 2, "has no key `method`")):
        with pytest.raises(SystemExit) as stop:
            main(["check", file])
        assert stop.value.code == code
        assert expected in capsys.readouterr().err


def test_earlier_results_are_an_error_here_too(run_file, capsys):
    Path("out").mkdir()
    Path("out/model.safetensors").touch()
    assert check.run(["dpop", "--config", run_file]) == 1
    assert "already holds the results of another run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["spin", "ld-align"])
def test_self_play(name, run_file, model_dir, capsys):
    tiny.prompt_completion_data().to_json("sft.jsonl")
    options = ["--model_name_or_path", model_dir, "--dataset_name", "sft.jsonl", "--output_dir", "out"]
    assert (
        check.run([name, *options, "--max_new_tokens", "6", "--per_device_train_batch_size", "2", "--json", "f.json"])
        == 0
    )
    found = json.loads(Path("f.json").read_text())
    assert found["loss"]["measured"] == pytest.approx(LN2)
    assert found["rows"][0][0]["name"] == "chosen"
    assert "answers of the model to the first prompts alone" in found["data"]["note"]
    assert not Path("out").exists()


def test_interrupted(run_file, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "inspect", stop)
    assert check.run(["dpop", "--config", run_file]) == 130


def test_colours_and_long_texts():
    segments = [["context", "a" * 700], ["trained", "b"], ["cut", "c"]]
    assert check._marked(*segments[0], colour=False) == f"{'a' * 300} [... 100 characters ...] {'a' * 300}"
    assert [check._marked(*part, colour=False) for part in segments[1:]] == ["⟦b⟧", "~~c~~"]
    assert check._marked("trained", "b", colour=True) == "\x1b[32mb\x1b[0m"


def test_named_references_score_a_few_rows_only(tokenizer):
    method = get_method("mrpo")
    for part in (tiny.model("llama", tokenizer, seed=3), tokenizer):
        part.save_pretrained("other")
    data = Dataset.from_list(tiny.preference_data().to_list() * 3)
    found = inspect(method, tokenizer, data=data, ref_models=["other"], model=None)
    assert found.data["looked_at"] == 4
    assert "score each row before training" in found.data["note"]
    assert found.plan["steps"] == 18
    assert found.data["dropped"]["number"] == 0


def test_config_class_is_checked(tokenizer):
    with pytest.raises(TypeError, match="needs a `IFTConfig`"):
        inspect_training(IFTTrainer, model="x", args=DPOPConfig("x", use_cpu=True, bf16=False), train_dataset=None)
