"""Benchmarks of lm-eval on a model in memory: what is measured, on which documents, and what is refused before."""

import copy
import glob
import gzip
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trl_ift.study import harness
from trl_ift.study.harness import BENCHMARKS, check_tasks, run_harness
from trl_ift.study.measures import digest_of


huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="benchmarks need lm-eval")

DATA = Path(os.environ.get("TRL_IFT_TEST_DATA", Path(__file__).parent.parent.parent / "shared" / "data")) / "eval"

WORDS = ["bcdf", "gkmp", "fdcb", "pmkg", "bgck", "dmfp"]
PIQA = [
    {"goal": question, "sol1": answer, "sol2": rejected, "label": index % 2}
    for index, ((question, answer), rejected) in enumerate(zip(tiny.QUESTIONS, tiny.REJECTED, strict=True))
]
# `mc2` is the probability of the true answers. With answers of one length it tells any two models, and any two documents, apart
MC2 = [
    {"question": question, "mc2_targets": {"choices": random.Random(question).sample(WORDS, 3), "labels": [1, 0, 0]}}
    for question, _ in tiny.QUESTIONS
]
ARC = [
    {"question": question, "choices": {"text": [answer, "Or not."], "label": ["A", "B"]}, "answerKey": "A"}
    for question, answer in tiny.QUESTIONS
]
GSM8K = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}\n#### {2 * n}"} for n in range(1, 9)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    return folder


def make(family, tokenizer, seed=0):
    """A model whose probabilities are not all 0 and 1, with room for prompts in bytes."""
    model = tiny.model(family, tokenizer, seed, max_position_embeddings=8192)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    """Every test has to get it back as it was."""
    return make("llama", tokenizer)


@pytest.fixture
def local(tmp_path):
    """Write rows to files, and return the entry of `tasks` that reads them."""

    def write(task, split, rows, **more):
        files = {split: rows} if split else rows
        paths = {}
        for name, content in files.items():
            path = tmp_path / "data [1] *" / f"{task}-{name}.jsonl"  # no pattern
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
            paths[name] = str(path)
        return {"task": task, "data_files": paths} | more

    return write


@pytest.fixture
def mc2(local):
    return local("truthfulqa_mc2", "validation", MC2)


@pytest.fixture
def answered(monkeypatch):
    """Replace the model by given answers; returns the requests that were made of it."""
    requests = []

    def replace(answer):
        def answers(self, given, disable_tqdm=False):
            requests.extend(request.args for request in given)
            return [answer(*request.args) for request in given]

        for kind in ("loglikelihood", "generate_until"):
            monkeypatch.setattr(huggingface.HFLM, kind, answers)
        return requests

    return replace


def log_prob(model, tokenizer, prompt, answer):
    """log p(answer | prompt), from a forward of this one sequence."""
    prompt, answer = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, answer))
    with torch.no_grad():
        logits = model(torch.cat([prompt, answer], 1)).logits[0].double().log_softmax(-1)
    return logits[prompt.size(1) - 1 : -1].gather(1, answer.T).sum().item()


# ---------------------------------------------------------------- what is measured


def test_accuracies_are_those_of_the_models_log_probabilities(model, tokenizer, local):
    found = run_harness(
        model, tokenizer, [local("piqa", "validation", PIQA)], batch_size=3, metrics=["acc", "acc_norm"]
    )
    right = {"acc": [], "acc_norm": []}
    for row in PIQA:
        choices = [row["sol1"], row["sol2"]]
        scores = [log_prob(model, tokenizer, f"Question: {row['goal']}\nAnswer:", f" {choice}") for choice in choices]
        right["acc"].append(float(np.argmax(scores) == row["label"]))
        norm = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right["acc_norm"].append(float(np.argmax(norm) == row["label"]))
    assert {key: list(measure.items) for key, measure in found.items()} == {
        "lm_eval/piqa/acc": right["acc"],
        "lm_eval/piqa/acc_norm": right["acc_norm"],
    }
    assert right["acc"] != right["acc_norm"]  # else the test would not tell
    assert len(set(right["acc"])) == 2
    measure = found["lm_eval/piqa/acc_norm"]
    assert measure.value == pytest.approx(sum(right["acc_norm"]) / 8)
    assert (measure.title, measure.group, measure.unit, measure.better) == (
        "PIQA (acc_norm)", "benchmark", "share", "higher",
    )  # fmt: skip
    assert measure.documents == digest_of(PIQA)


def test_numbers_worked_out_by_hand(model, tokenizer, local, answered):
    choices = {"a short one": -12.0, "a considerably longer answer text": -14.0}
    choices |= {"w": -3.0, "x": -4.0, "y": -3.5, "z": -2.5}
    answered(lambda prompt, choice: (choices[choice.strip()], False))
    short, long = list(choices)[:2]
    piqa = local("piqa", "validation", [{"goal": "Which?", "sol1": short, "sol2": long, "label": 1}])
    targets = {"choices": list("wxyz"), "labels": [1, 1, 0, 0]}
    mc2 = local("truthfulqa_mc2", "validation", [{"question": "Which?", "mc2_targets": targets}])
    found = run_harness(model, tokenizer, [piqa, mc2], metrics=["acc", "acc_norm"])
    # acc: -12 > -14. acc_norm: -14/33 > -12/11
    assert found["lm_eval/piqa/acc"].items == (0.0,)
    assert found["lm_eval/piqa/acc_norm"].items == (1.0,)
    assert found["lm_eval/truthfulqa_mc2/acc"].value == pytest.approx(0.3775406688, abs=1e-10)


def test_agrees_with_lm_evals_own_command(model, tokenizer, local):
    """The shots included, which are drawn at random."""
    from lm_eval import simple_evaluate

    entry = local("winogrande", "validation", [
        {"sentence": f"{name} saw Ann, so _ was glad.", "option1": name, "option2": "Ann", "answer": str(1 + index % 2)}
        for index, name in enumerate(["Bob", "Cid", "Dan", "Eve", "Flo", "Guy", "Hal", "Ida", "Jo", "Kim"])
    ], num_fewshot=2)  # fmt: skip
    found = run_harness(model, tokenizer, [entry])
    (override,) = [
        harness._override(e, "winogrande", harness._leaves(e)["winogrande"]) for e in harness._entries([entry])
    ]
    theirs = simple_evaluate(
        model=huggingface.HFLM(model, tokenizer=tokenizer, batch_size=1),
        tasks=[{"group": "own", "task": [override | {"num_fewshot": 2}]}],
        task_manager=harness._task_manager(),
        bootstrap_iters=0,
    )
    measure = found["lm_eval/winogrande/acc"]
    assert list(measure.items) == [sample["acc"] for sample in theirs["samples"]["winogrande"]]
    assert measure.value == theirs["results"]["winogrande"]["acc,none"]
    assert 0 < measure.value < 1


def test_a_group_is_the_mean_over_the_documents_of_its_tasks(model, tokenizer, local, answered):
    subjects = [config["dataset_name"] for config in harness._leaves(harness._entries(["mmlu"])[0]).values()]
    assert len(subjects) == 57
    # Two questions of the first subject, answered wrong, and one of each of the others, answered right
    rows = [{"question": f"About {s}", "subject": s, "choices": ["1", "2", "3", "4"], "answer": 1} for s in subjects]
    rows.insert(9, rows[0] | {"question": f"Also about {subjects[0]}"})
    entry = local("mmlu", None, {"test": rows, "dev": [row | {"question": f"Shot {row['subject']}"} for row in rows]})

    def answer(prompt, choice):
        subject = re.findall(r"bout (\w+)\nA\.", prompt)[-1]
        return float(choice == (" A" if subject == subjects[0] else " B")), False

    requests = answered(answer)
    found = run_harness(model, tokenizer, [entry], num_fewshot=1)
    assert len(found) == 58
    assert next(iter(found)) == "lm_eval/mmlu/acc"
    assert found["lm_eval/mmlu/acc"].value == pytest.approx(56 / 58)
    assert sorted(found["lm_eval/mmlu/acc"].items) == [0.0] * 2 + [1.0] * 56
    assert found[f"lm_eval/mmlu_{subjects[0]}/acc"].items == (0.0, 0.0)
    assert found["lm_eval/mmlu_anatomy/acc"].title == "MMLU anatomy (acc)"
    assert found["lm_eval/mmlu/acc"].title == "MMLU (acc)"
    # Shots are of the subject
    for prompt, _ in requests:
        assert re.findall(r"Shot (\w+)", prompt) == re.findall(r"bout (\w+)\nA\.", prompt)


def test_a_group_needs_a_file_with_all_its_subjects(model, tokenizer, local):
    row = {"question": "Q", "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 1}
    with pytest.raises(ValueError, match="No row has the subject 'abstract_algebra'. For some of the subjects, name"):
        run_harness(model, tokenizer, [local("mmlu", "test", [row])])


def test_metrics_of_other_tasks_and_of_filters(model, tokenizer, local, answered):
    answered(lambda prompt, rest: "I say 2" if isinstance(rest, dict) else (-float(len(rest)), False))
    gsm8k, arc = local("gsm8k", "test", GSM8K[:3], num_fewshot=0), local("arc_easy", "test", ARC)
    assert list(run_harness(model, tokenizer, [arc])) == ["lm_eval/arc_easy/acc", "lm_eval/arc_easy/acc_norm"]
    assert list(run_harness(model, tokenizer, [gsm8k])) == ["lm_eval/gsm8k/exact_match,strict-match"]
    found = run_harness(model, tokenizer, [gsm8k], metrics=["exact_match"])
    assert {key: (measure.items, measure.title) for key, measure in found.items()} == {
        "lm_eval/gsm8k/exact_match,strict-match": ((0.0, 0.0, 0.0), "GSM8K (exact_match, strict-match)"),
        "lm_eval/gsm8k/exact_match,flexible-extract": ((1.0, 0.0, 0.0), "GSM8K (exact_match, flexible-extract)"),
    }
    assert list(run_harness(model, tokenizer, [gsm8k], metrics=["exact_match,flexible-extract"])) == [
        "lm_eval/gsm8k/exact_match,flexible-extract"
    ]


def test_only_means_over_documents_are_measured():
    better = {"perplexity": False, "brier": False, "bleu": True, "hit": True, "parts": True}
    task = SimpleNamespace(higher_is_better=lambda: better)
    rows = [
        {"perplexity": -1.0, "brier": 0.5, "bleu": 30.0, "hit": np.bool_(True), "parts": (1, 2)},
        {"perplexity": -3.0, "brier": 0.0, "bleu": 40.0, "hit": np.bool_(False), "parts": (1, 2)},
    ]
    samples = [row | {"doc_id": i, "doc": i, "filter": "none"} for i, row in reversed(list(enumerate(rows)))]
    values = {"perplexity": math.exp(2), "brier": 0.25, "bleu": 35.0, "hit": 0.5, "parts": 0.5}
    results = {
        "samples": {"own": samples},
        "results": {
            "own": {f"{name},none": value for name, value in values.items()}
            | {"alias": "own", "hit_stderr,none": "N/A"}
        },
    }
    found = harness._measures({"tasks": {"own": task}, "groups": {}}, results, None)
    assert {key: (m.items, m.unit, m.better) for key, m in found.items()} == {
        "lm_eval/own/brier": ((0.5, 0.0), "share", "lower"),
        "lm_eval/own/bleu": ((30.0, 40.0), "score", "higher"),
        "lm_eval/own/hit": ((1.0, 0.0), "share", "higher"),
    }
    assert found["lm_eval/own/hit"].documents == digest_of([0, 1])
    results["results"] = {"own": {"perplexity,none": math.exp(2)}}
    with pytest.warns(UserWarning, match="`own` has no metric that is a mean over documents"):
        assert harness._measures({"tasks": {"own": task}, "groups": {}}, results, None) == {}


def test_the_benchmarks_are_the_thirteen_of_the_paper():
    assert len(BENCHMARKS) == 13
    assert Counter(benchmark.group for benchmark in BENCHMARKS.values()) == {
        "dialogue": 1,
        "reasoning": 7,
        "mathematics": 1,
        "truthfulness": 1,
        "multi-task understanding": 1,
        "question answering": 2,
    }
    for name, benchmark in BENCHMARKS.items():
        if benchmark.metric is not None:
            (entry,) = harness._entries([name])
            assert harness._manager(entry) is harness._task_manager(), f"{name} needs all tasks to be indexed"
            metric, chosen = benchmark.metric.split(",")
            for config in harness._leaves(entry).values():
                assert metric in [known["metric"] for known in config["metric_list"]]
                filters = [known["name"] for known in config.get("filter_list", [{"name": "none"}])]
                assert chosen in filters
                assert config.get("num_fewshot") in (None, benchmark.shots)


# ---------------------------------------------------------------- prompts


def test_few_shots_of_gsm8k_come_from_its_training_file(model, tokenizer, local, answered):
    requests = answered(lambda prompt, options: "1 + 1 = 2\n#### 2")
    entry = local("gsm8k", None, {"test": GSM8K[:2], "train": GSM8K[2:]}, num_fewshot=2)
    found = run_harness(model, tokenizer, [entry])
    assert found["lm_eval/gsm8k/exact_match,strict-match"].items == (1.0, 0.0)
    for (prompt, _), row in zip(requests, GSM8K[:2], strict=True):
        *shots, question = prompt.split("\n\n")
        assert question == f"Question: {row['question']}\nAnswer:"
        known = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in GSM8K[2:]]
        assert len(set(shots)) == 2
        assert set(shots) <= set(known)


def test_a_document_is_never_among_its_own_shots(model, tokenizer, local, answered):
    """`arc_challenge` evaluates its test split, of which lm-eval by itself does not leave the document out."""
    requests = answered(lambda prompt, choice: (0.0, False))
    run_harness(model, tokenizer, [local("arc_challenge", "test", ARC, num_fewshot=7)])
    assert len(requests) == 16
    for index, (prompt, _) in enumerate(requests):
        questions = re.findall("Question: (.*)", prompt)
        assert sorted(questions) == sorted(row["question"] for row in ARC)
        assert questions[-1] == ARC[index // 2]["question"]


def test_shots_by_default_by_argument_and_by_entry(model, tokenizer, local, answered, mc2):
    requests = answered(lambda prompt, choice: (0.0, False))
    entry = local("openbookqa", "test", [
        {"question_stem": f"STEM {i}", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"} for i in range(5)
    ])  # fmt: skip

    def shots(entry, **options):
        requests.clear()
        run_harness(model, tokenizer, [entry], **options)
        return {prompt.count("STEM") - 1 for prompt, _ in requests}

    assert shots(entry) == {BENCHMARKS["openbookqa"].shots} == {1}
    assert shots(entry, num_fewshot=3) == {3}
    assert shots(entry | {"num_fewshot": 2}, num_fewshot=3) == {2}
    assert shots(entry | {"num_fewshot": 0}, num_fewshot=3) == {0}
    run_harness(model, tokenizer, [mc2], num_fewshot=3)
    assert requests[-1][0].count("Q: ") == 7  # its own six, and the question


def test_chat_template(model, tokenizer, local, answered):
    requests = answered(lambda prompt, choice: (0.0, False))
    entry = local("piqa", "validation", PIQA, limit=1, num_fewshot=1)
    run_harness(model, tokenizer, [entry], apply_chat_template=True)
    assert [turn.split("\n")[0] for turn in requests[0][0].split("<|im_start|>")[1:]] == [
        "system", "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="`apply_chat_template=True`, but the tokenizer has no chat template"):
        run_harness(model, bare, [entry], apply_chat_template=True)


# ---------------------------------------------------------------- limit


def test_limit_draws_documents_at_random(model, tokenizer, mc2):
    whole = run_harness(model, tokenizer, [mc2])["lm_eval/truthfulqa_mc2/acc"].items
    assert min(abs(one - other) for one, other in itertools.combinations(whole, 2)) > 1e-3

    def drawn(**options):
        measure = run_harness(model, tokenizer, [mc2 | options.pop("entry", {})], **options)[
            "lm_eval/truthfulqa_mc2/acc"
        ]
        rows = [min(range(8), key=lambda row: abs(whole[row] - item)) for item in measure.items]
        assert rows == sorted(rows)
        assert measure.documents == digest_of([MC2[row] for row in rows])
        assert measure.items == pytest.approx([whole[row] for row in rows], abs=1e-5)  # other batches
        return rows

    three = drawn(limit=3)
    assert len(three) == 3
    assert three != [0, 1, 2]
    assert drawn(limit=3) == three
    assert set(three) < set(drawn(limit=5))
    assert len({tuple(drawn(limit=3, seed=seed)) for seed in range(4)}) > 1
    assert drawn(limit=5, entry={"limit": 3}) == three
    assert drawn(limit=100) == list(range(8))


def test_limit_is_the_same_for_all_models_and_differs_between_tasks(tokenizer, model, local):
    other = make("qwen2", tokenizer, seed=5)
    tasks = [local("piqa", "validation", PIQA), local("arc_easy", "test", ARC)]
    random.seed(0)
    ours = run_harness(model, tokenizer, tasks, limit=3)
    random.seed(1)
    theirs = run_harness(other, tokenizer, tasks, limit=3)
    assert {key: m.documents for key, m in ours.items()} == {key: m.documents for key, m in theirs.items()}
    named = SimpleNamespace(eval_docs=range(1000))
    draws = harness._draw({"one": named, "two": named}, 10, 0)
    assert draws["one"] != draws["two"]
    # Every part of the data is drawn from
    assert max(draws["one"]) > 500 > min(draws["one"])


# ---------------------------------------------------------------- the model


@pytest.fixture
def adapted(tokenizer):
    return get_peft_model(
        make("llama", tokenizer), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )


def value(model, tokenizer, entry, **options):
    return run_harness(model, tokenizer, [entry], **options)["lm_eval/truthfulqa_mc2/acc"].items


@pytest.mark.parametrize("with_adapter", [False, True])
def test_in_memory_as_saved_and_loaded_again(model, adapted, tokenizer, mc2, tmp_path, with_adapter):
    chosen = adapted if with_adapter else model
    chosen.save_pretrained(tmp_path / "model")
    if with_adapter:
        again = PeftModel.from_pretrained(make("llama", tokenizer), tmp_path / "model")
    else:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    chosen.train()
    items = value(chosen, tokenizer, mc2)
    assert items == value(again, tokenizer, mc2)
    if with_adapter:
        with adapted.disable_adapter():
            assert value(adapted, tokenizer, mc2) == value(model, tokenizer, mc2) != items
    chosen.eval()


def test_the_model_is_given_back_as_it_was(adapted, tokenizer, local, mc2):
    add_fused_lm_head(adapted.get_base_model())
    adapted.train()
    adapted.get_base_model().model.layers[0].eval()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    side = tokenizer.padding_side

    def state():
        weights = {name: tensor.clone() for name, tensor in adapted.state_dict(keep_vars=True).items()}
        attributes = [sorted(vars(module)) for module in adapted.modules()]
        return weights, attributes, [m.training for m in adapted.modules()], adapted.get_base_model().forward

    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    before = state()
    found = run_harness(adapted, tokenizer, [mc2, local("gsm8k", "test", GSM8K[:1], num_fewshot=0)])
    after = state()
    assert len(found) == 2
    assert before[1:] == after[1:]
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert all(p.grad is None for p in adapted.parameters())
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, None)


def test_a_failure_gives_the_model_back(model, tokenizer, mc2, answered):
    answered(lambda prompt, choice: 1 / 0)
    model.train()
    with pytest.raises(ZeroDivisionError):
        run_harness(model, tokenizer, [mc2])
    assert model.training
    assert "tie_weights" not in vars(model)
    model.eval()


def test_the_fused_head_changes_nothing(tokenizer, model, mc2):
    patched = copy.deepcopy(model)
    add_fused_lm_head(patched)
    forward = patched.forward
    assert value(patched, tokenizer, mc2) == value(model, tokenizer, mc2)
    assert patched.forward == forward


def test_the_mixed_precision_of_a_trainer_is_left_out(tokenizer, model, mc2):
    trained = copy.deepcopy(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        trained = Accelerator(cpu=True, mixed_precision="bf16").prepare(trained)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    forward = trained.forward
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(trained(ids).logits, model(ids).logits)
    assert value(trained, tokenizer, mc2) == value(model, tokenizer, mc2)
    assert trained.forward == forward


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head_that_is_trained_stays_untied(tokenizer, mc2):
    model = make("llama-tied", tokenizer)
    tied = value(model, tokenizer, mc2)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    assert value(model, tokenizer, mc2) == tied
    head = model.get_output_embeddings().modules_to_save["default"].weight
    with torch.no_grad():
        head.mul_(-1)
    before = head.clone()
    assert value(model, tokenizer, mc2) != tied
    assert torch.equal(model.get_output_embeddings().modules_to_save["default"].weight, before)


# ---------------------------------------------------------------- what is refused


def test_entries_that_are_refused(local, tmp_path):
    piqa = local("piqa", "validation", PIQA)
    folder = re.escape(str(tmp_path))

    def refused(error, match, *tasks):
        with pytest.raises(error, match=match):
            check_tasks(list(tasks))

    with pytest.raises(TypeError, match=r"`tasks` must be a list of names or mappings, got str: write `\['gsm8k'\]`"):
        check_tasks("gsm8k")
    refused(TypeError, r"`tasks\[0\]` is 3. Expected the name of a task, or a mapping", 3)
    refused(TypeError, r"`tasks\[1\]` is {'limit': 3}. Expected the name of a task", piqa, {"limit": 3})
    refused(ValueError, r"`tasks\[0\]` has the key 'shots'. Known keys are 'task', 'data_files'", piqa | {"shots": 3})
    refused(ValueError, r"`tasks\[0\]\['limit'\]=0` is out of range: it must lie in \[1, inf\)", piqa | {"limit": 0})
    refused(TypeError, r"`tasks\[0\]\['limit'\]` must be an integer, got 0.5", piqa | {"limit": 0.5})
    refused(ValueError, r"`tasks\[0\]\['num_fewshot'\]=-1` is out of range", piqa | {"num_fewshot": -1})
    refused(ValueError, r"The task `piqa` is in `tasks\[0\]` and in `tasks\[1\]`. Drop one", piqa, piqa)
    refused(ValueError, r"`tasks\[0\]`: lm-eval has no MT-Bench: its answers are judged", "mt_bench")

    refused(
        TypeError,
        r"`tasks\[0\]\['data_files'\]` must map the name of a split to a file",
        {"task": "piqa", "data_files": {"validation": ["x"]}},
    )
    refused(
        ValueError,
        rf"`tasks\[0\]`: there is no file `{folder}/none.jsonl`. Correct `data_files`",
        {"task": "piqa", "data_files": {"validation": f"{tmp_path}/none.jsonl"}},
    )
    refused(
        ValueError,
        r"`tasks\[0\]\['data_files'\]` has the splits 'test'. piqa evaluates 'validation', and also knows .*'train'",
        local("piqa", "test", PIQA),
    )
    refused(ValueError, r"gsm8k evaluates 'test', and also", local("gsm8k", "train", GSM8K))
    refused(ValueError, r"has the splits 'test', 'tset'", local("gsm8k", None, {"test": GSM8K, "tset": GSM8K}))
    refused(
        ValueError,
        r"piqa-validation.jsonl` lacks the column 'goal'; its columns are \['mc2_.*\], and piqa reads 'goal'",
        local("piqa", "validation", MC2),
    )
    refused(ValueError, "lacks the column 'input'", local("bbh_cot_fewshot_navigate", "test", MC2))
    refused(ValueError, "lacks the column 'choices'", local("mmlu_anatomy", "test", MC2))
    row = {"question": "Q", "choices": ["1", "2", "3", "4"], "answer": 1}
    check_tasks([local("mmlu_anatomy", "test", [row])])
    refused(ValueError, "lacks the column 'subject'", local("mmlu", "test", [row]))
    refused(ValueError, "must be a JSON object, one for each document", local("boolq", "validation", []))
    (tmp_path / "text.jsonl").write_text("question\n")
    refused(
        ValueError,
        r"text.jsonl` does not hold JSON lines \(Expecting",
        {"task": "gsm8k", "data_files": {"test": tmp_path / "text.jsonl"}},
    )
    refused(
        ValueError,
        r"`tasks\[0\]`: 'bbh' stands for several tasks, .* one by one, each with its files: bbh_cot_fewshot_boolean",
        local("bbh", "test", [{"input": "1", "target": "1"}]),
    )
    refused(
        ValueError,
        r"`tasks\[0\]`: num_fewshot=5, but truthfulqa_mc2 has a prompt of its own and takes no shots. Drop `num_fewshot`",
        local("truthfulqa_mc2", "validation", MC2, num_fewshot=5),
    )


def test_unknown_names_are_found_out_without_an_index_of_all_tasks(monkeypatch):
    quick = harness._task_manager()
    monkeypatch.setattr(harness, "_task_manager", lambda everything=False: 1 / 0 if everything else quick)
    with pytest.raises(
        ValueError, match=r"`tasks\[0\]`: lm-eval has no task or group 'arc_chalenge'. Did you mean .*'arc_challenge'"
    ):
        check_tasks(["arc_chalenge"])


def test_tasks_beyond_the_benchmarks():
    """Of which lm-eval has to index all; a tag has members in several folders."""
    (tag, lambada) = harness._entries(["math_word_problems", "lambada_openai"])
    assert {"gsm8k", "aime"} <= set(harness._leaves(tag))
    assert list(harness._leaves(lambada)) == ["lambada_openai"]
    with pytest.raises(
        ValueError, match=r"`tasks\[0\]`: the data of lambada_openai \(EleutherAI/lambada_openai on the Hub\) are not"
    ):
        check_tasks(["lambada_openai"])
    # Part of many names, and none itself
    with pytest.raises(ValueError, match="lm-eval has no task or group 'lambada_open'. Did you mean 'lambada_openai'"):
        check_tasks(["lambada_open"])


def test_offline_the_hub_is_what_is_in_the_cache(model, tokenizer, local, cache, answered):
    match = (
        r"`tasks\[0\]`: the data of gsm8k \(openai/gsm8k on the Hub\) are not in the cache, and HF_HUB_OFFLINE or "
        r"HF_DATASETS_OFFLINE keeps them from being fetched. Give local files: {'task': ..., 'data_files': {SPLIT: FILE}}, or"
    )
    with pytest.raises(ValueError, match=match):
        check_tasks(["gsm8k"])
    with pytest.raises(ValueError, match=r"`tasks\[0\]`: the data of mmlu_abstract_algebra \(cais/mmlu on the Hub\)"):
        check_tasks(["mmlu"])
    files = local("gsm8k", None, {"test": GSM8K[:2], "train": GSM8K[2:]})["data_files"]
    datasets.load_dataset(
        "json",
        data_files={name: glob.escape(file) for name, file in files.items()},
        cache_dir=str(cache / "json-cache"),
    )
    (folder,) = (cache / "json-cache" / "json").glob("default-*/0.0.0/*/")
    hub = cache / "openai___gsm8k" / "main" / "0.0.0" / folder.name
    hub.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, hub / file.name.replace("json-", "gsm8k-"))
    info = json.loads((hub / "dataset_info.json").read_text()) | {"config_name": "main", "dataset_name": "gsm8k"}
    (hub / "dataset_info.json").write_text(json.dumps(info))
    answered(lambda prompt, options: "#### 2")
    try:
        found = run_harness(model, tokenizer, ["gsm8k"])
    finally:
        shutil.rmtree(cache / "openai___gsm8k")
    assert found["lm_eval/gsm8k/exact_match,strict-match"].items == (1.0, 0.0)


def test_a_hub_that_cannot_be_reached(model, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    match = r"`tasks\[0\]`: the data of gsm8k cannot be loaded \(ConnectionError: Couldn't reach the Hub\). Give local files: {"
    with pytest.raises(ValueError, match=match):
        run_harness(model, tokenizer, ["gsm8k"])


def test_files_whose_values_are_wrong(model, tokenizer, local):
    entry = local("arc_challenge", "test", [row | {"answerKey": "E"} for row in ARC])
    with pytest.raises(
        ValueError, match=r"`tasks\[0\]`: arc_challenge cannot be built from .*arc_challenge-test.jsonl. ValueError: "
    ):
        run_harness(model, tokenizer, [entry])


def test_options_are_checked_before_the_model_runs(model, tokenizer, local, answered):
    requests = answered(lambda *_: 1 / 0)

    def refused(error, match, *tasks, **options):
        with pytest.raises(error, match=match):
            run_harness(model, tokenizer, list(tasks), **options)

    piqa = local("piqa", "validation", PIQA)
    refused(ValueError, "`batch_size=0` is out of range", piqa, batch_size=0)
    refused(ValueError, "`max_length=1` is out of range", piqa, max_length=1)
    refused(ValueError, "`limit=0` is out of range", piqa, limit=0)
    refused(ValueError, "`num_fewshot=-1` is out of range", piqa, num_fewshot=-1)
    refused(TypeError, r"`metrics='acc'` must be a list of names: `metrics=\['acc'\]`", piqa, metrics="acc")
    refused(
        ValueError, r"`metrics=\['f1'\]`: piqa has none of these. Its metrics are acc, acc_norm", piqa, metrics=["f1"]
    )
    refused(
        ValueError,
        r"`tasks\[0\]`: piqa with 8 shots, but there are 7 documents to take them from. Lower `num_fewshot`",
        piqa,
        num_fewshot=8,
    )
    bbh = local("bbh_cot_fewshot_navigate", "test", [{"input": "1", "target": "Yes"}])
    refused(ValueError, "bbh_cot_fewshot_navigate with 4 shots, but there are 3 documents", bbh | {"num_fewshot": 4})
    match = "answers of bbh_cot_fewshot_navigate have up to 1024 tokens, which leaves no room .* answer have {} tokens"
    refused(ValueError, match.format(1024), bbh, max_length=1024)
    assert not requests
    # The tiny models have 512 positions by default
    with pytest.raises(ValueError, match=match.format(512)):
        run_harness(tiny.model("llama", tokenizer), tokenizer, [bbh])


def test_lm_eval_is_not_installed(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    harness._task_manager.cache_clear()
    with pytest.raises(
        ImportError, match=r'lm-eval, which is not installed. Install it with `pip install "trl-ift\[eval\]"`'
    ):
        check_tasks(["piqa"])


# ---------------------------------------------------------------- the screen


def test_prompts_that_were_cut_are_told(model, tokenizer, mc2):
    with pytest.warns(
        UserWarning, match="`truthfulqa_mc2`: some prompts are longer than 100 tokens and lost their beginning"
    ):
        run_harness(model, tokenizer, [mc2], max_length=100)


def test_only_our_progress_is_shown(local, tmp_path, cache):
    script = (
        "import sys; import tiny; from trl_ift.study.harness import run_harness; assert 'lm_eval' not in sys.modules\n"
        "import json, datasets; datasets.config.HF_DATASETS_CACHE = sys.argv[2]; tokenizer = tiny.tokenizer()\n"
        "model = tiny.model('llama', tokenizer, max_position_embeddings=8192); print('START', file=sys.stderr, flush=True)\n"
        "print(list(run_harness(model, tokenizer, json.loads(sys.argv[1]))))\n"
    )
    tasks = [local("piqa", "validation", PIQA), local("gsm8k", "test", GSM8K[:1], num_fewshot=0)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    del environment["TQDM_DISABLE"]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(tasks), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['lm_eval/piqa/acc_norm', 'lm_eval/gsm8k/exact_match,strict-match']\n"
    shown = re.split(r"[\r\n]+", done.stderr.split("START")[1].strip())
    assert all(line.startswith(("lm-eval piqa: ", "lm-eval gsm8k: ")) for line in shown), shown
    assert any("100%" in line and "16/16" in line for line in shown), shown  # two answers to eight questions


# ---------------------------------------------------------------- real data


def real(name):
    path = DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no real data: {path} does not exist; TRL_IFT_TEST_DATA names its folder")
    return str(path)


REAL = {
    "arc_challenge": ({"test": "arc_challenge"}, "acc_norm"),
    "piqa": ({"validation": "piqa"}, "acc_norm"),
    "openbookqa": ({"test": "openbookqa"}, "acc_norm"),
    "boolq": ({"validation": "boolq"}, "acc"),
    "winogrande": ({"validation": "winogrande"}, "acc"),
    "truthfulqa_mc1": ({"validation": "truthfulqa_mc"}, "acc"),
    "truthfulqa_mc2": ({"validation": "truthfulqa_mc"}, "acc"),
    "gsm8k": ({"test": "gsm8k_test", "train": "gsm8k_fewshot"}, "exact_match,strict-match"),
    "bbh_cot_fewshot_sports_understanding": ({"test": "bbh_sports_understanding"}, "exact_match,get-answer"),
}


@pytest.mark.parametrize("task", REAL)
def test_real_data(model, tokenizer, task, monkeypatch):
    files, metric = REAL[task]
    files = {split: real(name) for split, name in files.items()}
    generated = []
    decode = huggingface.HFLM.tok_decode
    monkeypatch.setattr(
        huggingface.HFLM, "tok_decode", lambda *a, **k: generated.append(decode(*a, **k)) or generated[-1]
    )
    found = run_harness(
        model, tokenizer, [{"task": task, "data_files": files, "num_fewshot": None}], limit=2, max_length=8192
    )
    assert list(found) == [f"lm_eval/{task}/{metric}"]
    (measure,) = found.values()
    with gzip.open(next(iter(files.values())), "rt") as lines:
        documents = len({digest_of(json.loads(line)) for line in lines})
    assert len(measure.items) == 2 < documents
    assert all(0 <= item <= 1 for item in measure.items)
    if "exact_match" in metric:
        assert any(len(text) > 50 for text in generated)


def test_real_subjects(model, tokenizer, tmp_path):
    def subject(name):
        with gzip.open(real(name), "rt") as lines:
            rows = [row for row in map(json.loads, lines) if row["subject"] == "anatomy"]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    files = {"test": subject("mmlu"), "dev": subject("mmlu_dev")}
    found = run_harness(model, tokenizer, [{"task": "mmlu_anatomy", "data_files": files}], max_length=8192)
    assert len(found["lm_eval/mmlu_anatomy/acc"].items) == 12
