"""Completions: what is sampled, scored and kept, across batches, interruptions and processes; fingerprints; the command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import generation_killed
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset, load_dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from trl_ift import IFTConfig, IFTTrainer
from trl_ift.cli import main
from trl_ift.data import generation, inference
from trl_ift.data.generation import generate_completions, load_completions, model_fingerprint, read_manifest
from trl_ift.scripts.data import load_named


COLUMNS = [
    "prompt", "completion", "prompt_ids", "completion_ids", "ref_logps", "num_tokens", "truncated", "prompt_index",
    "sample_index", "policy",
]  # fmt: skip
PROMPTS = Dataset.from_list([{"prompt": row["prompt"]} for row in tiny.prompt_completion_data()])


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRL_IFT_DEBUG", raising=False)


@pytest.fixture
def generate(tmp_path, tokenizer):
    """`generate_completions` with short completions and the shared tokenizer, each call into a folder of its own."""
    folders = iter(range(100))

    def call(model, dataset=PROMPTS, output_dir=None, **options):
        output_dir = output_dir or tmp_path / f"run-{next(folders)}"
        options = {"max_new_tokens": 12, "processing_class": tokenizer} | options
        return generate_completions(model, dataset, output_dir, **options)

    return call


def lively(tokenizer, family="llama", **overrides):
    """A model with likely and unlikely tokens: Xavier weights alone give nearly equal logits."""
    model = tiny.model(family, tokenizer, **overrides)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)
    return model


def lora(model, **options):
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4} | options
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def log_softmax_of(model, row):
    """Log-probabilities (tokens of the completion, V) in float64."""
    ids = row["prompt_ids"] + row["completion_ids"]
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return logits[len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)


# ---------------------------------------------------------------- the samples


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox", "qwen3-moe"])
def test_rows_and_log_probs(family, tokenizer, generate):
    model = lively(tokenizer, family)
    rows = generate(model, num_completions=3, batch_tokens=100, shard_size=3)
    assert rows.column_names == COLUMNS
    assert [(r["prompt_index"], r["sample_index"]) for r in rows] == [(p, s) for p in range(8) for s in range(3)]
    assert set(rows["policy"]) == {model_fingerprint(model)}
    for row in rows:
        assert row["prompt"] == PROMPTS[row["prompt_index"]]["prompt"]
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert row["num_tokens"] == len(row["completion_ids"])
        expected = log_softmax_of(model, row).gather(-1, torch.tensor(row["completion_ids"])[:, None]).sum()
        assert row["ref_logps"] == pytest.approx(expected.item(), rel=1e-5)
    assert len({tuple(ids) for ids in rows["completion_ids"]}) == len(rows)  # no seed is used twice


def test_greedy_equals_generate_one_by_one(tokenizer, generate):
    """Neither batching nor the padding on the left changes anything."""
    model = lively(tokenizer, "qwen2")
    rows = generate(model, temperature=0, max_new_tokens=20, score=False)
    assert rows.column_names == [column for column in COLUMNS if column != "ref_logps"]
    assert len({len(ids) for ids in rows["prompt_ids"]}) > 3
    for row in rows:
        ids = torch.tensor([row["prompt_ids"]])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert row["completion_ids"] == alone[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_eos_is_kept_iff_generated(pad_is_eos, tokenizer, tmp_path, generate):
    model, most = lively(tokenizer), 10
    model.generation_config.eos_token_id = list(range(40, 70))  # beside the tokenizer's
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    own.pad_token = "<|im_end|>" if pad_is_eos else None
    rows = generate(model, output_dir=tmp_path, num_completions=8, max_new_tokens=most, processing_class=own)
    ends = {own.eos_token_id, *range(40, 70)}
    for row in rows:
        *before, last = row["completion_ids"]
        assert not ends & set(before)
        assert row["truncated"] == (last not in ends)
        assert row["num_tokens"] == most if row["truncated"] else row["num_tokens"] <= most
    assert {row["num_tokens"] for row in rows if not row["truncated"]} >= {1, 2}
    assert 0 < sum(rows["truncated"]) < len(rows)
    totals = read_manifest(tmp_path)["totals"]
    assert totals.pop("tokens_per_second") > 0
    tokens = sum(map(len, rows["completion_ids"]))
    cut = sum(rows["truncated"])
    assert totals == {"rows": 64, "tokens": tokens, "truncated": cut, "prompts": 8, "skipped": 0}


def test_eos_only_of_the_tokenizer(tokenizer, generate):
    model = lively(tokenizer)
    model.generation_config.eos_token_id = None
    generate(model, PROMPTS.take(1), max_new_tokens=2)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="Set `tokenizer.eos_token`"):
        generate(model, PROMPTS.take(1), processing_class=own)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 20}, {"top_p": 0.5, "temperature": 1.5}], ids=str
)
def test_frequencies_are_those_of_the_model(options, tokenizer, generate):
    """Chi-square of 4000 first tokens, within 5 standard deviations; the model's own settings do not leak in."""
    model = lively(tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, top_p=0.1, temperature=9.0, repetition_penalty=5.0, min_new_tokens=5, num_beams=2,
        suppress_tokens=list(range(100)), eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    number = 4000
    rows = generate(
        model, PROMPTS.take(1), num_completions=number, max_new_tokens=1, batch_tokens=10**6, score=False, **options
    )
    scores = model(input_ids=torch.tensor(rows[:1]["prompt_ids"])).logits[0, -1].double()
    scores /= options.get("temperature", 1.0)
    probs, order = scores.softmax(-1).sort(descending=True)
    kept = torch.arange(len(probs)) < options.get("top_k", len(probs))
    kept &= probs.cumsum(0) - probs < options.get("top_p", 1.0)
    probs = torch.zeros_like(scores).scatter(0, order, probs * kept / (probs * kept).sum())

    counts = torch.bincount(torch.tensor(rows["completion_ids"])[:, 0], minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    expected = probs * number
    often = expected >= 5
    cells = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    cells, expected = cells[expected > 0], expected[expected > 0]
    freedom = len(cells) - 1
    assert freedom > 5
    assert ((cells - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_decoding(tokenizer, generate):
    chat = generate(lively(tokenizer), tiny.conversational_data(), max_new_tokens=30)
    for row in chat:
        assert row["prompt"] == tiny.conversational_data()[row["prompt_index"]]["prompt"]
        template = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        assert row["prompt_ids"] == template["input_ids"]
        text = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        assert row["completion"] == [{"role": "assistant", "content": text}]


def test_leading_space_of_sentencepiece(generate, monkeypatch):
    """A completion that starts with a space keeps it, though decoded alone it would lose it."""
    words = ["<unk>", "</s>", "▁blue", "▁is", "▁sky"]
    spaced = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    spaced.pre_tokenizer, spaced.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    own = PreTrainedTokenizerFast(tokenizer_object=spaced, eos_token="</s>", pad_token="</s>")
    assert own.decode([3, 2]) == "is blue"
    monkeypatch.setattr(generation, "transformers_sampler", lambda *args: lambda prompts, seed: [[3, 2, 1]])
    row = generate(tiny.model("llama", own), Dataset.from_list([{"prompt": "sky"}]), processing_class=own)[0]
    assert row["prompt_ids"] == [4]
    assert row["completion_ids"] == [3, 2, 1]
    assert row["completion"] == " is blue"


def test_tools_and_template_arguments(tokenizer, generate):
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    own.chat_template = "{{ tools[0].name }} {{ mood }} {{ messages[0].content }}"
    prompt = [{"role": "user", "content": "Four."}]
    row = {"prompt": prompt, "tools": json.dumps([{"name": "clock"}]), "chat_template_kwargs": {"mood": "glad"}}
    rows = generate(lively(tokenizer), Dataset.from_list([row]), processing_class=own)
    assert rows[0]["prompt_ids"] == own("clock glad Four.")["input_ids"]


def test_implicit_prompts(tokenizer, generate):
    """A preference dataset without prompts; its other columns are ignored."""
    both = [
        {"chosen": f"{question} yes", "rejected": f"{question} no", "score": 1.0} for question in PROMPTS["prompt"]
    ]
    rows = generate(lively(tokenizer), Dataset.from_list(both))
    explicit = generate(lively(tokenizer))
    assert rows["prompt"] == explicit["prompt"]
    assert rows["completion_ids"] == explicit["completion_ids"]


# ---------------------------------------------------------------- the model of the caller


def test_callers_model_is_given_back(tokenizer, generate):
    model = lively(tokenizer)
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    generation_config = model.generation_config
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = generate(model)
    assert torch.equal(torch.rand(4), expected)
    assert "forward" not in vars(model)
    assert model.training
    assert not model.model.layers[0].training
    assert not model.config.use_cache
    assert model.generation_config is generation_config

    def fail(*args):
        raise RuntimeError

    model.forward = own = model.forward
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(generation, "sequence_log_probs", fail)
        generate(model)
    assert vars(model)["forward"] is own
    assert model.training
    assert generate(model)[:] == first[:]


def test_model_of_a_trainer(tokenizer, tmp_path, generate):
    """TRL's patched forward generates as the plain one, and goes on training."""
    model = lively(tokenizer)
    plain = generate(model)
    trainer = IFTTrainer(
        model=model,
        args=IFTConfig(tmp_path / "t", use_cpu=True, bf16=False, report_to="none", max_steps=1, disable_tqdm=True),
        train_dataset=tiny.prompt_completion_data(),
        processing_class=tokenizer,
    )
    forward = trainer.model.forward
    assert generate(trainer.model)[:] == plain[:]
    assert trainer.model.forward == forward
    trainer.train()
    assert set(generate(trainer.model)["policy"]) != set(plain["policy"])


@torch.no_grad()
def test_adapters_take_part(tokenizer, generate):
    base = lively(tokenizer)
    plain = generate(base)
    torch.manual_seed(1)
    model = lora(base, init_lora_weights=False, target_modules="all-linear")
    rows = generate(model)
    assert rows["policy"][0] != plain["policy"][0]
    assert rows["completion_ids"] != plain["completion_ids"]
    for row in rows:
        expected = log_softmax_of(model, row).gather(-1, torch.tensor(row["completion_ids"])[:, None]).sum()
        assert row["ref_logps"] == pytest.approx(expected.item(), rel=1e-5)
    with model.disable_adapter():
        assert generate(model)[:] == plain[:]
    with pytest.raises(ValueError, match="prompt-learning PEFT .PromptTuningConfig."):
        generate(get_peft_model(lively(tokenizer), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)))


def test_adapter_by_name(model_dir, tmp_path, generate):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    named = generate(model_dir, adapter=str(tmp_path / "adapter"))
    assert named[:] == generate(tuned)[:]
    with pytest.raises(ValueError, match="has no `adapter_config.json`"):
        generate(model_dir, adapter=model_dir)


def test_4bit_model_stays_trainable(model_dir, generate):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    rows = generate(model_dir, PROMPTS.take(2), quantization_config=config)
    assert rows["policy"][0] != generate(model_dir, PROMPTS.take(2))["policy"][0]
    model = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=config)
    assert generate(model, PROMPTS.take(2))[:] == rows[:]
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)


# ---------------------------------------------------------------- fingerprints


def test_fingerprint_of_copies(tokenizer, tmp_path):
    model = tiny.model("llama-tied", tokenizer)
    found = model_fingerprint(model)
    assert len(found) == 16
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == found
    untied = AutoModelForCausalLM.from_pretrained(tmp_path)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.clone())
    assert len(list(untied.parameters())) == len(list(model.parameters())) + 1
    assert model_fingerprint(untied) == found
    assert model_fingerprint(tiny.model("llama-tied", tokenizer, seed=1)) != found


def test_fingerprint_changes_with_each_weight(tokenizer):
    model = tiny.model("qwen3-moe", tokenizer)
    seen = {model_fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.mul_(1.5)
        seen.add(model_fingerprint(model))
    assert len(seen) == len(list(model.parameters())) + 1
    for column in range(16):  # more elements than are looked at, but some of each column
        with torch.no_grad():
            model.get_input_embeddings().weight[:, column] += 1.0
        seen.add(model_fingerprint(model))
    assert len(seen) == len(list(model.parameters())) + 17


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_fingerprint_of_adapters(family, options, tokenizer):
    base = model_fingerprint(tiny.model(family, tokenizer))
    model = lora(tiny.model(family, tokenizer), **options)
    assert model_fingerprint(model) == base
    model.add_adapter("ref", LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    assert model_fingerprint(model) == base

    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B.default" in name)[0, 0] = 1.0
    trained = model_fingerprint(model)
    assert trained != base
    with model.disable_adapter():
        assert model_fingerprint(model) == base
    model.set_adapter("ref")
    assert model_fingerprint(model) not in (base, trained)
    model.delete_adapter("ref")
    model.set_adapter("default")
    assert model_fingerprint(model) == trained


def test_fingerprint_of_saved_modules(tokenizer):
    """A trained copy of a module stands for the original, as if that had been trained."""
    model, plain = lora(tiny.model("llama", tokenizer), modules_to_save=["lm_head"]), tiny.model("llama", tokenizer)
    base = model_fingerprint(model)
    with torch.no_grad():
        for head in (model.base_model.model.lm_head.modules_to_save["default"], plain.lm_head):
            head.weight += 1.0
    assert model_fingerprint(model) == model_fingerprint(plain) != base


# ---------------------------------------------------------------- shards, resuming, processes


def counted(monkeypatch):
    """Return a list that grows with each call of `generate`."""
    calls, original = [], generation.transformers_sampler

    def counting(*args):
        sample = original(*args)
        return lambda prompts, seed: calls.append(seed) or sample(prompts, seed)

    monkeypatch.setattr(generation, "transformers_sampler", counting)
    return calls


def test_folder(tokenizer, tmp_path, generate, monkeypatch):
    calls = counted(monkeypatch)
    folder = tmp_path / "out"
    rows = generate(lively(tokenizer), output_dir=folder, shard_size=3)
    assert sorted(os.listdir(folder)) == [*(f"completions-0000{i}.parquet" for i in range(3)), "manifest.json"]
    assert len(calls) == len(set(calls)) == 3
    for loaded in (
        load_completions(folder),
        load_named(str(folder))["train"],
        load_dataset("parquet", data_files=f"{folder}/completions-*.parquet", split="train"),
    ):
        assert loaded[:] == rows[:]
        assert loaded.features == rows.features

    # finished shards are kept, lost ones are made anew, and a complete folder is only read
    manifest = (folder / "manifest.json").read_text()
    for path in (folder / "completions-00001.parquet", folder / "manifest.json"):
        path.unlink()
    (folder / "manifest.json").write_text(json.dumps(json.loads(manifest) | {"complete": False}))
    with pytest.raises(ValueError, match="Run it again with the same arguments to finish"):
        load_completions(folder)
    assert generate(lively(tokenizer), output_dir=folder, shard_size=3)[:] == rows[:]
    assert len(calls) == 4
    generate(lively(tokenizer), output_dir=folder, shard_size=3)
    assert len(calls) == 4
    with pytest.raises(ValueError, match="holds no completions"):
        load_completions(tmp_path)


def test_streams_give_the_same(tokenizer, tmp_path, generate):
    options = {"shard_size": 3, "num_completions": 2}
    whole = generate(lively(tokenizer), tiny.conversational_data(), **options)
    stream = tiny.conversational_data().to_iterable_dataset()
    assert generate(lively(tokenizer), stream, output_dir=tmp_path / "out", **options)[:] == whole[:]
    assert read_manifest(tmp_path / "out")["settings"]["prompts_digest"] is None

    def rows():
        yield from tiny.conversational_data()
        yield {"prompt": [{"role": "user", "content": "Four.", "name": "Ann"}]}

    unknown = IterableDataset.from_generator(rows)
    assert generate(lively(tokenizer), unknown.take(8), **options)[:] == whole[:]
    with pytest.raises(ValueError, match=r"row 8: a message has the keys \['name'\]"):
        generate(lively(tokenizer), unknown, **options)


def test_seeds(tokenizer, generate):
    """Another shard gives other samples for the same prompt, and so does another seed."""
    same = Dataset.from_list([{"prompt": "Name a colour."}] * 2)
    rows = generate(lively(tokenizer), same, shard_size=1)
    assert rows["completion_ids"][0] != rows["completion_ids"][1]
    other = generate(lively(tokenizer), same, shard_size=1, seed=1)
    assert rows["completion_ids"][0] != other["completion_ids"][0]


def test_long_prompts_are_skipped(tokenizer, generate):
    model = lively(tokenizer, max_position_embeddings=24)
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS["prompt"]]
    with pytest.warns(UserWarning, match=r"Skipped \d of 8 prompts: these prompts are longer than 12 tokens"):
        rows = generate(model, shard_size=1)
    assert set(rows["prompt_index"]) == {i for i, length in enumerate(lengths) if length <= 12}
    with pytest.warns(UserWarning, match="longer than 7 tokens"):
        rows = generate(model, max_prompt_length=7)
    assert set(rows["prompt_index"]) == {i for i, length in enumerate(lengths) if length <= 7}
    assert 0 < len(rows) < 8
    with pytest.raises(ValueError, match="All 8 prompts are longer than 1 tokens"):
        generate(model, max_prompt_length=1)
    with pytest.raises(ValueError, match="`max_new_tokens=24` leaves no room"):
        generate(model, max_new_tokens=24)


def test_other_settings_are_refused(tokenizer, tmp_path, generate, monkeypatch):
    folder = tmp_path / "out"
    generate(lively(tokenizer), output_dir=folder)
    calls = counted(monkeypatch)
    other_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    other_model = lively(tokenizer, seed=1)
    for options, shown in (
        ({"temperature": 0.7, "seed": 1}, r"made with temperature=1.0 \(now 0.7\), seed=0 \(now 1\). Choose another"),
        ({"dataset": PROMPTS.take(7)}, r"prompts=8 \(now 7\), prompts_digest="),
        ({"dataset": PROMPTS.select(range(7, -1, -1))}, "made with prompts_digest="),
        ({"processing_class": other_tokenizer}, "made with tokenizer="),
        ({"model": other_model}, f"made with policy='.*' .now '{model_fingerprint(other_model)}'."),
        ({"model": lively(tokenizer).bfloat16()}, r"made with dtype='float32' \(now 'bfloat16'\)"),
    ):
        with pytest.raises(ValueError, match=shown):
            generate(**{"model": lively(tokenizer), "output_dir": folder} | options)
    assert not calls

    manifest = read_manifest(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"versions": manifest["versions"] | {"TRL": "0.1"}}))
    with pytest.warns(UserWarning, match=r"made with TRL 0.1 \(now "):
        generate(lively(tokenizer), output_dir=folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="did not write"):
        generate(lively(tokenizer), output_dir=folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"holds data of other origin \(completions-00000.parquet;"):
        generate(lively(tokenizer), output_dir=folder)


def test_settings_are_compared_before_the_model_loads(model_dir, tmp_path, generate, monkeypatch):
    generate(model_dir, output_dir=tmp_path / "out")

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(inference, "create_model_from_path", load)
    with pytest.raises(ValueError, match=r"top_k=0 \(now 5\)"):
        generate(model_dir, output_dir=tmp_path / "out", top_k=5)


@pytest.mark.slow
def test_killed_and_restarted(model_dir, tmp_path):
    """SIGKILL between the writing of a shard and its move into place: the ids are those of an uninterrupted run."""
    script = Path(generation_killed.__file__)
    killed = subprocess.run([sys.executable, str(script), model_dir, str(tmp_path / "killed")], stderr=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    found = {path.name for path in (tmp_path / "killed").iterdir()}
    (scratch,) = found - {"manifest.json", "completions-00000.parquet"}
    assert scratch.startswith(".completions-00001.parquet.")
    assert scratch.endswith(".tmp")
    data, options = tiny.conversational_data(), generation_killed.OPTIONS
    went_on = generate_completions(model_dir, data, tmp_path / "killed", **options)
    whole = generate_completions(model_dir, data, tmp_path / "whole", **options)
    assert went_on[:] == whole[:]
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("killed", "whole")]
    assert names[0] == names[1]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"num_completions": 0}, ValueError, "`num_completions=0` is out of range"),
        ({"num_completions": 2.0}, TypeError, "`num_completions` must be an integer"),
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens=0` is out of range"),
        ({"max_prompt_length": 0}, ValueError, "`max_prompt_length=0` is out of range"),
        ({"temperature": -0.1}, ValueError, "`temperature=-0.1` is out of range"),
        ({"temperature": float("nan")}, ValueError, "`temperature=nan` is out of range"),
        ({"top_p": 0}, ValueError, "`top_p=0` is out of range: it must lie in (0, 1]"),
        ({"top_p": 1.1}, ValueError, "`top_p=1.1` is out of range"),
        ({"top_k": -1}, ValueError, "`top_k=-1` is out of range"),
        ({"repetition_penalty": 0}, ValueError, "`repetition_penalty=0` is out of range"),
        ({"batch_tokens": 0}, ValueError, "`batch_tokens=0` is out of range"),
        ({"shard_size": 0}, ValueError, "`shard_size=0` is out of range"),
        ({"backend": "jax"}, ValueError, "Choose one of: 'transformers', 'vllm'"),
        ({"backend": "vllm"}, ImportError, "pip install vllm"),
        ({"backend": "vllm", "adapter": "a"}, ValueError, "without adapter and quantization"),
        ({"vllm_kwargs": {}}, ValueError, "`vllm_kwargs` has no effect"),
        ({"temperature": 0, "num_completions": 2}, ValueError, "Set `num_completions=1`, or a `temperature` above 0"),
        ({"dataset": Dataset.from_list([])}, ValueError, "`dataset` is empty"),
        ({"dataset": [{"prompt": "a"}]}, TypeError, "`dataset` is a list; expected a `Dataset`"),
        ({"dataset": tiny.messages_data()}, ValueError, "has the columns ['messages']. Expected 'prompt'"),
        ({"dataset": Dataset.from_list([{"prompt": "a"}, {"prompt": None}])}, TypeError, "row 1: the prompt must be"),
        ({"dataset": Dataset.from_list([{"prompt": ""}])}, TypeError, "row 0: the prompt must be"),
        ({"dataset": Dataset.from_list([{"prompt": 3}])}, TypeError, "row 0: the prompt must be"),
        ({"dataset": Dataset.from_list([{"prompt": ["a"]}])}, TypeError, "row 0: the prompt must be"),
        ({"dataset": Dataset.from_list([{"prompt": "a", "image": 1}])}, ValueError, "vision dataset"),
        ({"model": 3}, TypeError, "`model` is a int"),
        ({"model": "./nowhere/model"}, OSError, "nowhere"),
    ],
    ids=str,
)
def test_bad_input_before_the_model_loads(options, error, expected, model_dir, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(inference, "create_model_from_path", load)
    with pytest.raises(error) as caught:
        generate_completions(**{"model": model_dir, "dataset": PROMPTS, "output_dir": tmp_path / "out"} | options)
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_combinations_with_an_instance(tokenizer, generate):
    with pytest.raises(ValueError, match="Apply them when you load it"):
        generate(lively(tokenizer), model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="loads the model itself"):
        generate(lively(tokenizer), backend="vllm")
    with pytest.raises(ValueError, match="tokenizer as `processing_class`"):
        generate(lively(tokenizer), processing_class=None)


def test_vllm_arguments(tokenizer, model_dir, monkeypatch, generate):
    """What is asked of vLLM, with a stand-in for it that answers with an EOS and a token behind it."""
    import types

    asked = {}

    class LLM:
        def __init__(self, **options):
            asked["llm"] = options

        def generate(self, prompts, parameters, use_tqdm):
            asked["prompts"], asked["sampling"] = prompts, parameters
            output = types.SimpleNamespace(token_ids=(9, tokenizer.eos_token_id, 9))
            return [types.SimpleNamespace(outputs=[output])] * len(prompts)

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=dict))
    monkeypatch.setattr(generation, "find_spec", lambda name: True)
    rows = generate(model_dir, num_completions=2, backend="vllm", batch_tokens=10, vllm_kwargs={"enforce_eager": True})
    assert set(map(tuple, rows["completion_ids"])) == {(9, tokenizer.eos_token_id)}
    assert asked["llm"]["model"] == model_dir
    assert asked["llm"]["enforce_eager"]
    assert len(asked["prompts"]) == 16
    assert len({parameters["seed"] for parameters in asked["sampling"]}) == 16
    assert asked["sampling"][0]["top_k"] == -1


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.conversational_data().to_json("data.jsonl")
    required = ["--model_name_or_path", model_dir, "--dataset_name", "data.jsonl", "--output_dir", "out"]
    return ["generate", *required, "--max_new_tokens", "12"]


def test_command(command, capsys, model_dir):
    assert main([*command, "--num_completions", "2", "--max_rows", "3", "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert "6 completions of 3 prompts (0 skipped), 7" in text
    assert "Written to out." in text
    rows = load_completions("out")
    expected = generate_completions(
        model_dir,
        tiny.conversational_data().take(3),
        "python",
        num_completions=2,
        max_new_tokens=12,
        model_init_kwargs={"dtype": torch.bfloat16},
    )
    assert rows[:] == expected[:]
    assert main([*command, "--num_completions", "2", "--max_rows", "3", "--dtype", "bfloat16"]) == 0


def test_command_with_a_stream_and_a_file_of_options(command, capsys):
    Path("run.yaml").write_text("seed: 3\nno_score: true\ndataset_streaming: true\nload_in_4bit: false\ntop_k: 9\n")
    assert main([*command, "--config", "run.yaml", "--top_k", "5", "--max_rows", "2"]) == 0
    settings = read_manifest("out")["settings"]
    assert (settings["seed"], settings["top_k"], settings["score"], settings["prompts"]) == (3, 5, False, None)
    assert len(load_completions("out")) == 2


def test_command_help_and_errors(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    assert "--max_prompt_length" in capsys.readouterr().out
    Path("typo.yaml").write_text("temprature: 1")
    Path("list.yaml").write_text("- 1")
    for argv in (["--temperat", "1"], ["--temperature", "hot"], ["--config", "typo.yaml"], ["--num_processes", "0"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, *argv])
        assert stop.value.code == 2
        assert capsys.readouterr().err.startswith("trl-ift generate: error: ")
    for argv, expected in (
        (["--temperature", "-1"], "`temperature=-1.0` is out of range"),
        (["--dataset_split", "test"], "has no split 'test'; it has: 'train'"),
        (["--dataset_name", "./none.jsonl"], "does not exist"),
        (["--max_rows", "0"], "`max_rows=0` is out of range"),
        (["--model_name_or_path", "./none"], "none"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "list.yaml"], "expected `option: value` lines"),
    ):
        assert main([*command, *argv]) == 1
        error = capsys.readouterr().err
        assert error.count("trl-ift generate: error: ") == 1
        assert expected in error
        assert "Traceback" not in error
    assert not Path("out").exists()


def test_interrupted_command(command, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generation, "sequence_log_probs", interrupt)
        assert main(command) == 130
    assert "are kept in out; to go on, run the same again" in capsys.readouterr().err
    assert main(command) == 0


@pytest.mark.slow
def test_two_processes_give_the_same(command, capfd):
    options = ["--shard_size", "2", "--num_completions", "2"]
    assert main([*command, *options, "--num_processes", "2"]) == 0
    assert capfd.readouterr().out.count("Written to out.") == 1
    assert main([*command, *options, "--output_dir", "one"]) == 0
    assert load_completions("out")[:] == load_completions("one")[:]
