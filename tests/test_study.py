"""The study: its file, its grid, its cells, and the traps of comparing TRL's trainers."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import study_killed
import tiny
import torch
import yaml
from datasets import Dataset
from safetensors.torch import save_file
from study import read_rows, settings, write_inputs, write_rows
from trl import KTOConfig, KTOTrainer

from trl_ift.cli import main
from trl_ift.registry import METHODS
from trl_ift.study import run as module
from trl_ift.study.costs import measure_costs
from trl_ift.study.evaluate import PARTS, StartScores, evaluate_part, forward_kl, is_right, pair_measures
from trl_ift.study.measures import Measure, mean_of
from trl_ift.study.methods import KNOWN, as_chat, get_study_method, training_rows, unpaired_rows
from trl_ift.study.plan import Study, StudyError, model_identity
from trl_ift.study.run import collect_results, load_trained, make_trainer, print_commands, run_cell, run_study
from trl_ift.trl_internals import FusedCausalLMOutput


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer):
    return write_inputs(tmp_path_factory.mktemp("inputs"), tokenizer)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A study that was run to its end, and its results."""
    study = Study(settings(inputs, tmp_path_factory.mktemp("study") / "out"))
    return study, run_study(study)


def by_label(results, start="plain", size=16):
    return {c["method"]: c for c in results["cells"] if c["start"] == start and c["size"] in (size, 0)}


def values(cell):
    return {name: measure["value"] for name, measure in cell["measures"].items()}


# ---------------------------------------------------------------- methods


def test_public_names():
    import trl_ift.study as package

    assert all(callable(getattr(package, name)) for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


def test_rows_of_lists():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "reference": "d"}]
    lists = training_rows("lists", rows, 4, 0)
    assert list(lists) == [{"prompt": "a", "completions": ["b", "c"], "rewards": [1.0, 0.0]}]


def test_every_registered_method_is_known():
    assert {method.name for method in METHODS if method.kind != "reward"} <= set(KNOWN)
    assert {"sft", "dpo", "ipo", "kto", "cpo", "orpo", "simpo"} <= set(KNOWN)
    with pytest.raises(ValueError, match="'eurus-reward' trains a reward model, which answers nothing"):
        get_study_method("eurus-reward")
    for method in KNOWN.values():
        assert method.trainer_class.__name__ == method.trainer
        assert method.config_class.__name__ == method.config


def test_unknown_method():
    with pytest.raises(ValueError, match=r"Unknown method 'dpoo'. Did you mean 'dpo'\? Known methods: sft, "):
        get_study_method("dpoo")


def pairs(prompts, each=1):
    return [
        {"prompt": f"p{i}", "chosen": f"c{i}-{k}", "rejected": f"r{i}-{k}"}
        for i in range(prompts)
        for k in range(each)
    ]


class TestUnpairedRows:
    @pytest.mark.parametrize(("prompts", "each", "batch"), [(20, 1, 8), (17, 3, 8), (9, 2, 4), (40, 5, 16), (5, 1, 4)])
    def test_labels_and_neighbours(self, prompts, each, batch):
        rows = pairs(prompts, each)
        found = unpaired_rows(rows, batch, seed=3)
        assert sorted(r["completion"] for r in found) == sorted(r[k] for r in rows for k in ("chosen", "rejected"))
        assert all(row["label"] == row["completion"].startswith("c") for row in found)
        for first in range(0, len(found), batch):
            part = found[first : first + batch]
            assert {row["label"] for row in part} == {True, False}
            # The KL partner of a row is the answer before it, in the circle of its batch
            assert all(row["prompt"] != before["prompt"] for row, before in zip(part, [part[-1], *part], strict=False))

    def test_seed(self):
        rows = pairs(20)
        assert unpaired_rows(rows, 8, 0) == unpaired_rows(rows, 8, 0) != unpaired_rows(rows, 8, 1)

    def test_too_few_prompts(self):
        with pytest.raises(
            ValueError, match="6 pairs of 1 prompts cannot be ordered so that no two answers of one prompt"
        ):
            unpaired_rows(pairs(1, 6), 4, 0)

    def test_left_to_itself_trl_makes_batches_of_one_label(self, inputs, tmp_path):
        """The trap that `unpaired_rows` is for; when TRL mends it, this says so."""
        args = KTOConfig(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none")
        data = Dataset.from_list(pairs(8))
        labels = KTOTrainer(inputs["model"], args=args, train_dataset=data).train_dataset["label"]
        assert list(labels) == [True] * 8 + [False] * 8

    def test_the_trainer_keeps_the_order(self, inputs, tmp_path):
        study = Study(settings(inputs, tmp_path))
        arm, start = study.arms["kto"], study.starts["plain"]
        config = study.config(arm, 16, 0, str(tmp_path))
        assert config.per_device_train_batch_size == 8  # rows: 4 pairs
        data = training_rows("unpaired", study.rows_of(start, 16, 0), 4, 0)
        trainer = make_trainer(study, start, arm.method, start.model, config, data)
        for batch in trainer.get_train_dataloader():
            assert batch["label"][::2] == [True] * 4 or list(batch["label"][::2]) == [True] * 4
            assert not any(batch["label"][1::2])


@pytest.mark.parametrize("chat", [False, True])
def test_cpo_sees_the_tokens_that_dpo_sees(chat, inputs, tmp_path):
    """Left to themselves, TRL's CPO and ORPO prepend a beginning-of-sequence token, and append an end to chat answers."""
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    for file in Path(inputs["model"]).glob("*"):
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    starts = {"plain": {"model": str(folder), "chat": chat}}
    study = Study(settings(inputs, tmp_path / "out", starts=starts, methods=["dpo", "cpo", "orpo", "simpo"]))
    start, found = study.starts["plain"], {}
    for label, arm in study.arms.items():
        data = training_rows("pairs", study.rows_of(start, 4, 0), 4, 0)
        config = study.config(arm, 4, 0, str(tmp_path / label))
        trainer = make_trainer(study, start, arm.method, start.model, config, data)
        batch = next(iter(trainer.get_train_dataloader()))
        if label == "dpo":
            ids, labels = batch["input_ids"], batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            mask = batch["attention_mask"]
        else:
            joined = trainer.concatenated_inputs(batch, padding_value=trainer.processing_class.pad_token_id)
            ids, labels, mask = (joined[f"concatenated_{name}"] for name in ("input_ids", "labels", "attention_mask"))
        found[label] = sorted(
            (row[m.bool()].tolist(), target[m.bool()].tolist())
            for row, target, m in zip(ids, labels, mask, strict=True)
        )
    assert found["cpo"] == found["orpo"] == found["simpo"] == found["dpo"]


@pytest.mark.parametrize("label", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize("peft", [None, {"r": 4}], ids=["full", "lora"])
def test_the_reference_of_an_sft_start_is_the_sft_model(label, peft, inputs, tmp_path):
    """Of a model in memory TRL would load the reference from where that model once came from."""
    study = Study(settings(inputs, tmp_path, methods=[label], peft=peft))
    start, arm = study.starts["sft"], study.arms[label]
    source = module.ensure_start(study, start, 0)
    kind = arm.method.kind
    config = study.config(arm, 8, 0, str(tmp_path / "model"))
    config.learning_rate = 0.0
    data = training_rows(kind, study.rows_of(start, 8, 0), 4, 0)
    trainer = make_trainer(study, start, arm.method, source, config, data)
    trainer.train()
    logged = [e for e in trainer.state.log_history if "rewards/chosen" in e]
    assert logged
    assert all(abs(entry[name]) < 1e-5 for entry in logged for name in ("rewards/chosen", "rewards/rejected"))
    before = load_trained(study, study.starts["plain"], inputs["model"], None)[0].state_dict()
    after = load_trained(study, start, source, None)[0].state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if getattr(trainer, "ref_model", None) is not None:
        reference = trainer.accelerator.unwrap_model(trainer.ref_model).state_dict()
        assert all(torch.equal(reference[name], after[name]) for name in after)


def test_as_chat():
    row = {"prompt": "Q: Why?\nA:", "chosen": " So.", "rejected": [{"role": "assistant", "content": "x"}]}
    assert as_chat(row) == {
        "prompt": [{"role": "user", "content": "Q: Why?\nA:"}],
        "chosen": [{"role": "assistant", "content": "So."}],
        "rejected": [{"role": "assistant", "content": "x"}],
    }


# ---------------------------------------------------------------- the plan


def test_a_model_is_known_by_its_content(inputs, tmp_path):
    """A folder that is moved is the same model; one changed byte of large weights makes another one."""
    known = []
    for name, byte in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        weights = bytearray(5 * 2**20)  # above the size that is read whole
        weights[-1] = byte
        (folder / "model.safetensors").write_bytes(weights)
        known.append(model_identity(str(folder)))
    assert known[0] == known[1] != known[2]
    with pytest.raises(StudyError, match="The model `no/such-model` is no folder, and cannot be found on the Hub"):
        model_identity("no/such-model")


class TestGrid:
    def test_subsets_are_nested(self, inputs, tmp_path):
        study = Study(settings(inputs, tmp_path))
        assert study.subset(8, 0) == study.subset(16, 0)[:8]
        assert study.subset(8, 0) != study.subset(8, 1)

    def test_cells(self, inputs, tmp_path):
        study = Study(settings(inputs, tmp_path, seeds=[0, 1]))
        cells = study.cells()
        # 2 starts x 3 methods x 2 sizes x 2 seeds, one untrained start without SFT, two with
        assert len(cells) == 24 + 3
        assert len({cell.id for cell in cells}) == len({cell.key for cell in cells}) == 27
        assert [cell.seed for cell in cells[3:]] == [0] * 12 + [1] * 12  # one seed after another

    def keys(self, inputs, tmp_path, **changes):
        study = Study(settings(inputs, tmp_path, **changes))
        return {(c.start.name, c.label, c.size, c.seed): c.key for c in study.cells()}

    def changed(self, inputs, tmp_path, **changes):
        before, after = self.keys(inputs, tmp_path), self.keys(inputs, tmp_path, **changes)
        return {cell for cell in before if before[cell] != after.get(cell)}

    def test_what_changes_nothing(self, inputs, tmp_path):
        base = settings(inputs, tmp_path)
        training = base["training"] | {
            "logging_steps": 7,
            "save_strategy": "steps",
            "save_steps": 3,
            "report_to": "none",
        }
        assert not self.changed(inputs, tmp_path / "elsewhere")
        assert not self.changed(inputs, tmp_path, training=training, name="other")
        assert not self.changed(inputs, tmp_path, evaluation={"pairs": {"rows": 3}})
        assert not self.changed(
            inputs, tmp_path, sizes=[8, 16, 24], seeds=[0, 1], methods=["sft", "dpo", "kto", "ipo", "tpo"]
        )

    def test_samples_of_small_sizes_do_not_depend_on_larger_ones(self, inputs, tmp_path):
        def keys(sizes):
            return self.keys(inputs, tmp_path, methods=["spin", "mpo"], sizes=sizes)

        first, larger, between = keys([8, 16]), keys([8, 16, 24]), keys([8, 12, 16])
        assert all(larger[cell] == key for cell, key in first.items())
        changed = {cell for cell, key in first.items() if between[cell] != key}
        assert {cell[2] for cell in changed} == {16}  # their prompts are sampled in other batches

    def test_a_method_changes_its_own_cells(self, inputs, tmp_path):
        methods = {"sft": None, "dpo": {"beta": 0.3}, "kto": None}
        assert {cell[1] for cell in self.changed(inputs, tmp_path, methods=methods)} == {"dpo"}

    def test_the_sft_of_a_start_changes_its_cells(self, inputs, tmp_path):
        starts = settings(inputs, tmp_path)["starts"]
        starts["sft"] = {"model": inputs["model"], "sft": {"rows": 9}}
        changed = self.changed(inputs, tmp_path, starts=starts)
        assert {cell[0] for cell in changed} == {"sft"}
        assert ("sft", "start", 0, 0) in changed

    @pytest.mark.parametrize(
        "changes",
        [
            {"peft": {"r": 8}},
            {"peft": None},
            {"model": {"dtype": "bfloat16"}},
            {"training": {"per_device_train_batch_size": 2, "max_length": 128, "bf16": False}},
        ],
    )
    def test_what_changes_all(self, inputs, tmp_path, changes):
        assert len(self.changed(inputs, tmp_path, **changes)) >= 12

    def test_data_change_the_subsets_they_are_in(self, inputs, tmp_path):
        study = Study(settings(inputs, tmp_path))
        rows = [dict(row) for row in study.rows]
        last = study.subset(16, 0)[-1]
        rows[rows.index(last)]["chosen"] = " Something else."
        data = {"train": write_rows(tmp_path / "other.jsonl", rows), "test": inputs["test"], "sft": inputs["sft"]}
        assert {cell[2] for cell in self.changed(inputs, tmp_path, data=data)} == {16}

    def test_the_model_is_known_by_its_content(self, inputs, tmp_path):
        import shutil

        moved = shutil.copytree(inputs["model"], tmp_path / "moved")
        starts = {"plain": {"model": str(moved)}, "sft": {"model": str(moved), "sft": {"rows": 8}}}
        assert not self.changed(inputs, tmp_path, starts=starts)
        weights = next(Path(moved).glob("*.safetensors"))
        data = bytearray(weights.read_bytes())
        data[-3] ^= 1
        weights.write_bytes(bytes(data))
        assert len(self.changed(inputs, tmp_path, starts=starts)) == 14

    @pytest.mark.parametrize(
        ("budget", "steps"),
        [
            ({"epochs": 1}, {"sft": 4, "dpo": 4, "kto": 4, "tpo": 4}),
            ({"epochs": 2.5}, {"sft": 10, "dpo": 10, "kto": 10, "tpo": 10}),
            ({"steps": 7}, {"sft": 7, "dpo": 7, "kto": 7, "tpo": 7}),
            ({"sequences": 48}, {"sft": 12, "dpo": 6, "kto": 6, "tpo": 4}),
        ],
    )
    def test_budget(self, inputs, tmp_path, budget, steps):
        """Batches of 4 pairs of 16: a pair is one sequence for SFT, two for DPO and KTO, three for TPO."""
        study = Study(settings(inputs, tmp_path, methods=list(steps), budget=budget))
        assert {label: study.steps(arm, 16) for label, arm in study.arms.items()} == steps
        assert all(study.config(arm, 16, 0, "x").max_steps == steps[label] for label, arm in study.arms.items())

    def test_variables_of_the_environment(self, inputs, tmp_path, monkeypatch):
        monkeypatch.setenv("STUDY_MODEL", inputs["model"])
        starts = {"plain": {"model": "${STUDY_MODEL}"}}
        study = Study(settings(inputs, tmp_path, starts=starts))
        assert study.starts["plain"].model == inputs["model"]
        assert study.settings["starts"] == starts
        monkeypatch.delenv("STUDY_MODEL")
        with pytest.raises(StudyError, match="the environment variable STUDY_MODEL, which is not set"):
            Study(settings(inputs, tmp_path, starts=starts))


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": ["dpoo"]}, r"Unknown method 'dpoo'. Did you mean 'dpo'\?"),
            ({"methods": ["dpo", "dpo"]}, "`methods` lists 'dpo' twice"),
            ({"methods": {"start": None}}, "this name is that of the untrained start"),
            (
                {"methods": {"dpo": {"bta": 1}}},
                r"`methods.dpo.bta` is no option of PreferenceConfig. Did you mean `beta`\?",
            ),
            ({"methods": {"dpo": {"beta": -1}}}, "`methods.dpo`: `beta=-1` is out of range"),
            ({"methods": {"dpo": {"seed": 1}}}, "`methods.dpo.seed` is set by the study itself"),
            ({"methods": {}}, "lacks `methods:`"),
            (
                {"training": {"beta": 0.1}},
                "`training.beta` is no option of SFTConfig. Options of one method belong under it",
            ),
            ({"training": {"max_steps": 3}}, "`training.max_steps` is set by the study itself"),
            ({"training": {"hub_token": "x"}}, "`training.hub_token` is set by the study itself, or not for it"),
            ({"sizes": []}, "must list numbers of preference pairs"),
            ({"sizes": [0]}, "must list numbers of preference pairs"),
            ({"sizes": [999]}, r"`sizes` asks for 999 pairs, but `data.train` \(.*\) has 26. Lower it"),
            ({"sizes": [8, 8]}, "`sizes` lists 8 twice"),
            ({"budget": {"epochs": 1, "steps": 2}}, "must be one of `epochs`, `steps` and `sequences`"),
            ({"budget": {"steps": -1}}, "`budget.steps=-1` is out of range"),
            ({"extra": 1}, "unknown key 'extra'"),
            ({"evaluation": {"pair": {}}}, r"evaluation: unknown key 'pair'. Did you mean `pairs`\?"),
            ({"evaluation": {"pairs": {"rows": 99}}}, r"`evaluation.pairs.rows: 99`, but `data.test` .* has 10 rows"),
            ({"evaluation": {"tasks": [{"name": "x"}]}}, "needs either `data` .* or `reasoning_gym`"),
            ({"evaluation": {"tasks": [{"name": "a b", "data": "x"}]}}, "expected letters, digits"),
            ({"evaluation": {"lm_eval": {"tasks": ["no_such_task_at_all"]}}}, "no_such_task_at_all"),
            ({"evaluation": {"judged": {"judge": "client"}}}, "names no `questions` file"),
            ({"peft": {"rank": 4}}, "`peft.rank` is no option of LoraConfig"),
            ({"peft": {"target_modules": ["lm_head"]}}, "'lm_head'"),
            ({"starts": {"a": {"modl": "x"}}}, r"starts.a: unknown key 'modl'. Did you mean `model`\?"),
            ({"starts": {"a": {"chat": True}}}, "`starts.a` names no `model`"),
            ({"model": {"dtyp": "x"}}, r"unknown key 'dtyp'. Did you mean `dtype`\?"),
            ({"seeds": 3}, "`seeds: 3` must be a list"),
            ({"evaluation": {"neutral": {"column": "text"}}}, "`evaluation.neutral` names no `data`"),
            ({"evaluation": {"lm_eval": {"limit": 3}}}, "`evaluation.lm_eval` names no `tasks`"),
            (
                {"evaluation": {"tasks": [{"name": "x", "reasoning_gym": "no_such_dataset"}]}},
                "`evaluation.tasks.x`: reasoning-gym cannot make 'no_such_dataset' with",
            ),
        ],
    )
    def test_settings(self, inputs, tmp_path, changes, message):
        with pytest.raises((ValueError, TypeError), match=message):
            Study(settings(inputs, tmp_path, **changes)).check()

    def test_data_without_a_name(self, inputs, tmp_path):
        data = {name: inputs[name] for name in ("test", "sft")}
        with pytest.raises(StudyError, match="`data:` names no `train` dataset. Add `data: {train: FILE}`"):
            _ = Study(settings(inputs, tmp_path, data=data)).rows
        with pytest.raises(
            StudyError, match=r"`data.train` .* names no dataset. Add `name`: a file, a folder or a Hub id"
        ):
            _ = Study(settings(inputs, tmp_path, data=data | {"train": {"split": "train"}})).rows
        data = {name: inputs[name] for name in ("train", "sft")}
        with pytest.raises(StudyError, match="`evaluation.pairs` needs held-out rows. Add `data: {test: FILE}`"):
            _ = Study(settings(inputs, tmp_path, data=data)).held_out

    def test_rows_of_an_sft_start(self, inputs, tmp_path):
        starts = {"sft": {"model": inputs["model"], "sft": {"rows": 13}}}
        with pytest.raises(StudyError, match=r"`starts.sft.sft.rows: 13`, but `data.sft` \(.*\) has 12. Lower it"):
            Study(settings(inputs, tmp_path, starts=starts)).check()

    def test_pairs_of_equal_answers(self, inputs, tmp_path):
        rows = [row | {"rejected": row["chosen"]} for row in read_rows(inputs["train"])]
        changed = inputs | {"train": write_rows(tmp_path / "equal.jsonl", rows)}
        with pytest.raises(StudyError, match=r"No row of `data.train` .* has two different answers"):
            _ = Study(settings(changed, tmp_path)).rows

    def test_a_column_that_is_not_there(self, inputs, tmp_path):
        rows = [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in read_rows(inputs["train"])]
        changed = inputs | {"train": write_rows(tmp_path / "no.jsonl", rows)}
        with pytest.raises(
            StudyError, match="lacks the column 'rejected'; its columns are .'chosen', 'prompt'.. Rename"
        ):
            _ = Study(settings(changed, tmp_path)).rows

    def test_judges_need_their_settings(self, inputs, tmp_path):
        question = {"question_id": 1, "category": "writing", "turns": ["Write a line.", "Another."]}
        judged = {"questions": write_rows(tmp_path / "questions.jsonl", [question]), "judge": "client"}
        with pytest.raises(StudyError, match="`evaluation.judged.judge: client` needs `model`"):
            Study(settings(inputs, tmp_path, evaluation={"judged": judged})).check()

    def test_starts(self, inputs, tmp_path):
        starts = {"a": {"model": str(tmp_path)}}
        with pytest.raises(ValueError, match=r"has no `config.json`"):
            Study(settings(inputs, tmp_path, starts=starts)).check()
        data = {"train": inputs["train"], "test": inputs["test"]}
        with pytest.raises(StudyError, match="A start has `sft:`, but `data:` names no `sft` dataset"):
            Study(settings(inputs, tmp_path, data=data))

    def test_gold_answers(self, inputs, tmp_path):
        rows = [{k: v for k, v in r.items() if k != "reference"} for r in read_rows(inputs["train"])]
        test = [{k: v for k, v in r.items() if k != "reference"} for r in read_rows(inputs["test"])]
        data = {"train": write_rows(tmp_path / "x.jsonl", rows), "sft": inputs["sft"]}
        data["test"] = write_rows(tmp_path / "test.jsonl", test)  # held-out pairs need none
        changes = {"methods": ["tpo"]}
        with pytest.raises(
            StudyError, match=r"has no column 'reference', the gold answer that triples need.*gold: chosen"
        ):
            Study(settings(inputs, tmp_path, data=data, **changes)).check()
        study = Study(settings(inputs, tmp_path, data=data | {"gold": "chosen"}, **changes))
        study.check()
        assert all(row["reference"] == row["chosen"] for row in study.rows)

    @pytest.mark.parametrize("where", ["test", "task", "neutral", "neutral answer", "sft"])
    def test_rows_that_are_trained_and_tested(self, inputs, tmp_path, where):
        where, _, column = where.partition(" ")
        prompt = read_rows(inputs["train"])[0]["chosen" if column else "prompt"]
        rows = {
            "test": [{"prompt": f" {prompt.upper()} ", "chosen": " a", "rejected": " b", "reference": " c"}],
            "task": [{"question": prompt, "answer": "1"}],
            "neutral": [{"text": prompt}],
            "sft": [{"prompt": "27: Where do fish live?", "completion": " x"}] * 8,  # a prompt of the test rows
        }[where]
        changed = inputs | {where: write_rows(tmp_path / "rows.jsonl", rows)}
        changes = {"evaluation": {"pairs": {}}} if where == "test" else {}
        if where == "sft":
            rows[0]["prompt"] = read_rows(inputs["test"])[0]["prompt"]
            changed["sft"] = write_rows(tmp_path / "rows.jsonl", rows)
        with pytest.raises(
            StudyError, match=r"rows of `.*` are in the training data too, e.g. in `data\.(train|sft)`"
        ):
            Study(settings(changed, tmp_path, **changes)).check()

    def test_two_cells_of_one_folder(self, inputs, tmp_path):
        methods = {"dpo": None, "again": {"method": "dpo", "beta": 0.1}}
        with pytest.raises(
            StudyError, match="'plain, dpo, 8 pairs, seed 0' and 'plain, again, 8 pairs, seed 0' are the same"
        ):
            Study(settings(inputs, tmp_path, methods=methods)).check()

    def test_held_out_prompts_without_room(self, inputs, tmp_path):
        evaluation = {"pairs": {}, "max_length": 12}
        with pytest.raises(StudyError, match=r"`data.test` .*the prompt fills `evaluation.max_length: 12`"):
            Study(settings(inputs, tmp_path, evaluation=evaluation)).check()

    def test_splits(self, inputs, tmp_path):
        folder = tmp_path / "data"
        folder.mkdir()
        rows = read_rows(inputs["train"])
        write_rows(folder / "train.jsonl", rows[:5])
        write_rows(folder / "validation.jsonl", rows[5:8])
        data = {"train": str(folder), "test": str(folder), "sft": inputs["sft"]}
        study = Study(settings(inputs, tmp_path, data=data))
        assert (len(study.rows), len(study.test_rows)) == (5, 3)
        data["train"] = {"name": str(folder), "split": "train_prefs"}
        with pytest.raises(StudyError, match=r"has no split 'train_prefs'; it has: 'train', 'validation'"):
            _ = Study(settings(inputs, tmp_path, data=data)).rows

    def test_prompts_without_room(self, inputs, tmp_path):
        training = settings(inputs, tmp_path)["training"] | {"max_length": 12}
        with pytest.raises(StudyError, match=r"the prompt fills `training.max_length: 12`"):
            Study(settings(inputs, tmp_path, training=training)).check()

    def test_data_limits(self, inputs, tmp_path):
        data = settings(inputs, tmp_path)["data"]
        assert 0 < len(Study(settings(inputs, tmp_path, data=data | {"max_tokens": 30})).rows) < 26
        assert (
            len(Study(settings(inputs, tmp_path, data=data | {"max_tokens": 9})).sft_rows) == 10
        )  # "Say 10:" is longer
        with pytest.raises(
            StudyError,
            match="No row of `data.train` .* has at most `data.max_tokens: 2` tokens",
        ):
            _ = Study(settings(inputs, tmp_path, data=data | {"max_tokens": 2})).rows

    def test_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="There is no study file"):
            Study.load(tmp_path / "none.yaml")
        (tmp_path / "x.yaml").write_text("a: [")
        with pytest.raises(StudyError, match="is no YAML file"):
            Study.load(tmp_path / "x.yaml")
        (tmp_path / "y.yaml").write_text("- 1")
        with pytest.raises(StudyError, match="expected `name: value` lines, found list"):
            Study.load(tmp_path / "y.yaml")

    @pytest.mark.parametrize("part", ["train", "test", "sft", "neutral", "task"])
    def test_empty_files(self, inputs, tmp_path, part):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(ValueError, match=r"empty.jsonl has no rows"):
            Study(settings(inputs | {part: str(tmp_path / "empty.jsonl")}, tmp_path)).check()

    def test_a_cell_that_is_not_there(self, inputs, tmp_path):
        with pytest.raises(ValueError, match="The study has no cell 'x'"):
            run_study(Study(settings(inputs, tmp_path)), cells=["x"])


# ---------------------------------------------------------------- measures


class TestMeasures:
    def test_pairs(self):
        """The card's pair: r_w = 3, r_l = -5."""
        start = StartScores((-45.0, -45.0), (-50.0, -50.0), ())
        found = pair_measures([-42.0, -45.0], [-55.0, -50.0], start)
        assert found["reward_margin"].items == (8.0, 0.0)
        assert found["preference_accuracy"].items == (1.0, 0.5)  # one that did not change counts half
        assert (found["chosen_drift"].value, found["rejected_drift"].value) == (1.5, -2.5)

    def test_forward_kl_is_unbiased(self):
        start, model = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([0.2, 0.5, 0.3]).double().log()
        exact = (start.exp() * (start - model)).sum().item()
        found = sum(
            p * forward_kl([a], [b]) for p, a, b in zip(start.exp(), start.tolist(), model.tolist(), strict=True)
        )
        assert found == pytest.approx(exact, abs=1e-12)
        assert forward_kl([-1.0, -2.0], [-1.0, -2.0]) == 0.0

    def test_weighted_mean(self):
        measure = mean_of([1.0, 4.0], "x", "y", "nats", weights=[3, 1], documents=["a", "b"])
        assert measure.value == 1.75
        assert Measure.from_json(json.loads(json.dumps(measure.to_json()))) == measure
        assert mean_of([], "x", "y", "nats").to_json()["value"] is None

    @pytest.mark.parametrize(
        ("reply", "answer", "match", "right"),
        [
            ("It is 1,204.", "1204", "number", True),
            ("3 or 4", "3", "number", False),
            ("none", "3", "number", False),
            ("... #### 12", "#### 12", "number", True),
            (" Yes \n", "yes", "text", True),
            ("Yes, it is", "yes", "text", False),
        ],
    )
    def test_is_right(self, reply, answer, match, right):
        assert is_right(reply, answer, match) is right

    def test_metrics_of_evaluate(self):
        evaluate = pytest.importorskip("evaluate")
        from trl_ift.study.metrics import ExactNumber, ForwardKL, PreferenceAccuracy

        found = PreferenceAccuracy().compute(predictions=[[-42.0, -55.0]], references=[[-45.0, -50.0]])
        assert found == {
            "preference_accuracy": 1.0, "reward_margin": 8.0, "chosen_drift": 3.0, "rejected_drift": -5.0
        }  # fmt: skip
        kl = ForwardKL().compute(predictions=[[-1.0, -2.0]], references=[[-1.5, -1.0]])["forward_kl"]
        assert kl == pytest.approx(forward_kl([-1.5, -1.0], [-1.0, -2.0]))
        both = evaluate.combine([ExactNumber(), ExactNumber()]).compute(
            predictions=["so 4", "5"], references=["4", "6"]
        )
        assert set(both.values()) == {0.5}
        with pytest.raises(ValueError, match="`predictions` holds a row of 1 numbers; expected two"):
            PreferenceAccuracy().compute(predictions=[[1.0]], references=[[0.0, 0.0]])


# ---------------------------------------------------------------- running it


class TestRun:
    def test_results(self, finished):
        study, results = finished
        assert [cell["status"] for cell in results["cells"]] == ["done"] * 14
        for cell in results["cells"]:
            assert set(cell["measures"]) == {
                "preference_accuracy", "reward_margin", "chosen_drift", "rejected_drift", "forward_kl", "answer_length",
                "cut_answers", "neutral_nll", "task/add",
            }  # fmt: skip
            assert (study.output_dir / cell["config"]).is_file()
            samples = read_rows(study.output_dir / cell["samples"])
            assert len(samples) == 8
        assert json.loads((study.output_dir / "results.json").read_text()) == results
        cell = by_label(results)["dpo"]
        assert cell["train"]["steps"] == 4
        assert cell["train"]["sequences"] == 32
        assert cell["train"]["peak_memory_bytes"] > 1e7
        assert [entry["step"] for entry in cell["train"]["history"]] == [1, 2, 3, 4]
        assert values(cell)["reward_margin"] > 0

    def test_no_pickles_and_no_paths(self, finished):
        study, _ = finished
        names = {path.name for path in study.output_dir.rglob("*") if path.is_file()}
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
        record = next(study.output_dir.glob("cells/plain-dpo-*/cell.json")).read_text()
        assert json.loads(record)["config"]["beta"] == 0.1
        results = collect_results(study)
        assert results["starts"]["plain"]["model"] == "model"

    def test_start_is_measured_against_itself(self, finished):
        for start in ("plain", "sft"):
            found = values(by_label(finished[1], start)["start"])
            assert found["preference_accuracy"] == 0.5
            assert found["reward_margin"] == found["chosen_drift"] == found["forward_kl"] == 0.0

    def test_shared_stages_ran_once(self, finished):
        study, _ = finished
        stages = [path.parent.name.split("-")[0] for path in study.output_dir.glob("stages/*/stage.json")]
        assert sorted(stages) == ["heldout", "heldout", "sft"]

    def test_tokens_are_counted(self, finished, tokenizer):
        study, results = finished
        rows = study.subset(16, 0)

        def length(row, answer):
            return len(tokenizer(row["prompt"] + row[answer])["input_ids"]) + 1  # and its end

        chosen, rejected = (sum(length(row, name) for row in rows) for name in ("chosen", "rejected"))
        cells = by_label(results)
        assert cells["sft"]["train"]["tokens"] == chosen
        assert cells["dpo"]["train"]["tokens"] == chosen + rejected

    def test_nothing_is_repeated(self, finished, monkeypatch):
        study, results = finished
        for name in ("train", "_evaluate", "score_start"):
            monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("ran again"))
        assert run_study(Study(study.settings)) == results

    def test_the_same_twice(self, finished, inputs, tmp_path):
        """Equal but for times and memory."""
        study, results = finished
        other = Study(study.settings | {"output_dir": str(tmp_path / "out"), "sizes": [8], "methods": ["dpo"]})
        again = {cell["id"]: cell for cell in run_study(other)["cells"]}
        first = {cell["id"]: cell for cell in results["cells"]}
        assert len(again) == 4
        for name, cell in again.items():
            assert cell["measures"] == first[name]["measures"]
            if cell["train"]:
                changing = {"seconds", "tokens_per_second", "peak_memory_bytes"}
                mine, theirs = (
                    {k: v for k, v in c["train"].items() if k not in changing} for c in (cell, first[name])
                )
                for record in (mine, theirs):
                    record["history"] = [
                        {k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k}
                        for e in record["history"]
                    ]
                assert mine == theirs

    def test_another_evaluation_trains_nothing(self, finished, monkeypatch, inputs):
        study, results = finished
        monkeypatch.setattr(module, "train", lambda *args, **kwargs: pytest.fail("trained again"))
        evaluated = []
        evaluate = module._evaluate
        monkeypatch.setattr(
            module, "_evaluate", lambda study, cell, part, *more: (
                evaluated.append((cell.id, part)), evaluate(study, cell, part, *more)
            )[1]
        )  # fmt: skip
        changed = Study(
            study.settings
            | {"evaluation": study.settings["evaluation"] | {"answers": {"rows": 2, "max_new_tokens": 3}}}
        )
        cell = next(cell for cell in changed.cells() if cell.label == "dpo")
        run_study(changed, cells=[cell.id])
        assert evaluated == [(cell.id, "answers")]
        assert (
            by_label(collect_results(study), size=8)["dpo"]["measures"] == by_label(results, size=8)["dpo"]["measures"]
        )

    def test_zero_steps_equal_the_start(self, inputs, tmp_path):
        methods = {name: {"budget": {"steps": 0}} for name in ("dpo", "sft")}
        study = Study(settings(inputs, tmp_path / "out", methods=methods, sizes=[8]))
        results = run_study(study)
        for start in ("plain", "sft"):
            cells = by_label(results, start, 8)
            for label in methods:
                assert cells[label]["measures"] == cells["start"]["measures"]

    @pytest.mark.parametrize("peft", [None, {"r": 4}], ids=["full", "lora"])
    def test_memory_and_disk_agree(self, inputs, tmp_path, peft, monkeypatch):
        """A model that was just trained, and the one that is loaded from its folder; flags and weights stay."""
        study = Study(settings(inputs, tmp_path / "out", methods=["dpo"], sizes=[8], peft=peft))
        cell = next(cell for cell in study.cells() if cell.label == "dpo" and cell.start.name == "plain")
        trainers = []
        make = module.make_trainer
        monkeypatch.setattr(module, "make_trainer", lambda *a, **k: trainers.append(make(*a, **k)) or trainers[-1])
        assert run_cell(study, cell) == "done"
        model = trainers[-1].model
        model.train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        scores = module.ensure_start_scores(study, cell.start, 0)
        tokenizer = trainers[-1].processing_class
        for part in PARTS:
            found = evaluate_part(part, model, tokenizer, study.held_out, scores, tmp_path / part)
            stored = json.loads(module._part_file(study, cell, part).read_text())["measures"]
            assert {name: m.to_json() for name, m in found.items()} == json.loads(json.dumps(stored))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.training

    def test_all_methods(self, inputs, tmp_path, tokenizer):
        """Everything that is registered, from a start with a chat template."""
        starts = {"chat": {"model": inputs["model"], "chat": True}}
        training = settings(inputs, tmp_path)["training"] | {"max_length": 256}
        for part in (tiny.model("llama", tokenizer, seed=9), tokenizer):
            part.save_pretrained(tmp_path / "other")
        sae = {"W_enc": torch.randn(16, 64), "b_enc": torch.zeros(64), "threshold": torch.zeros(64)}
        save_file(sae, tmp_path / "sae.safetensors")
        methods = {name: {} for name in KNOWN} | {"mrpo": {"ref_models": [str(tmp_path / "other")]}}
        methods["fpo"] = {"sae_path": str(tmp_path / "sae.safetensors"), "sae_layer": 0}
        methods["self-supervised-po"] = {"spo_levels": 2}
        study = Study(settings(inputs, tmp_path / "out", methods=methods, sizes=[8], starts=starts, training=training))
        results = run_study(study)
        cells = by_label(results, "chat", 8)
        assert set(cells) == {*KNOWN, "start"}
        assert not {label: cell["error"] for label, cell in cells.items() if cell["status"] != "done"}
        assert all(cell["train"]["steps"] == 2 for label, cell in cells.items() if label != "start")
        margins = {label: values(cell)["reward_margin"] for label, cell in cells.items()}
        assert margins.pop("soft-label-po") == margins["dpo"]  # pairs have no soft labels
        assert len(set(margins.values())) == len(margins), "two methods did the same"

    def test_methods_that_need_more_than_pairs(self, inputs, tmp_path):
        study = Study(settings(inputs, tmp_path, methods="all"))
        assert {"dpo", "exo", "ulma", "tis-dpo"} <= set(study.arms)
        assert not {"mrpo", "fpo", "eurus-reward"} & set(study.arms)
        with pytest.raises(ValueError, match="`methods.mrpo` needs `ref_models`, which a study cannot make of pairs"):
            Study(settings(inputs, tmp_path, methods=["dpo", "mrpo"]))

    @pytest.mark.parametrize("options", [{"ld_alpha": 0.5}, {"sync_ref_model": True}])
    def test_references_that_cannot_be_stored(self, inputs, tmp_path, options):
        starts = {"plain": {"model": inputs["model"]}}
        study = Study(
            settings(inputs, tmp_path / "out", methods={"dpo": options}, sizes=[8], peft=None, starts=starts)
        )
        assert {cell["error"] for cell in run_study(study)["cells"]} == {None}
        assert not list(study.output_dir.glob("stages/reference-*"))

    def test_partial_batches_and_epochs(self, inputs, tmp_path, tokenizer):
        """10 rows in batches of 4, two epochs and one step: 24 rows."""
        methods = {"sft": {"budget": {"steps": 7}}}
        study = Study(
            settings(
                inputs, tmp_path / "out", methods=methods, sizes=[10], starts={"plain": {"model": inputs["model"]}}
            )
        )
        train = by_label(run_study(study), size=10)["sft"]["train"]
        assert (train["steps"], train["sequences"]) == (7, 24)
        a_row = sum(len(tokenizer(row["prompt"] + row["chosen"])["input_ids"]) + 1 for row in study.subset(10, 0)) / 10
        assert train["tokens"] == round(24 * a_row)

    def test_degraded_answers_are_charged(self, inputs, tmp_path, tokenizer):
        """Four sequences a pair, and one level of each answer a step."""
        methods = {
            "spo": {"method": "self-supervised-po", "spo_levels": 2, "budget": {"sequences": 32}},
            "dpo": {"budget": {"sequences": 32}},
        }
        study = Study(
            settings(
                inputs, tmp_path / "out", methods=methods, sizes=[8], starts={"plain": {"model": inputs["model"]}}
            )
        )
        start, arm = study.starts["plain"], study.arms["spo"]
        assert (study.steps(arm, 8), study.steps(study.arms["dpo"], 8)) == (2, 4)
        data = training_rows(arm.method.kind, study.rows_of(start, 8, 0), 4, 0)
        config = study.config(arm, 8, 0, str(tmp_path))
        trainer = make_trainer(study, start, arm.method, start.model, config, data)
        trainer.state.global_step = 2
        expected = 0.0
        for row in trainer.train_dataset:
            prompt = len(row["prompt_ids"])
            expected += 2 * prompt + len(row["chosen_ids"]) + len(row["rejected_ids"])
            for side in ("chosen", "rejected"):
                if levels := row[f"degraded_{side}_rows"]:
                    assert len(levels) == 2
                    expected += sum(prompt + len(level["completion_ids"]) for level in levels) / 2
        assert module.count_tokens(trainer) == round(expected)

    def test_tokens_of_kto_are_those_of_dpo(self, finished):
        cells = by_label(finished[1])
        assert cells["kto"]["train"]["tokens"] == cells["dpo"]["train"]["tokens"]
        assert cells["kto"]["train"]["sequences"] == cells["dpo"]["train"]["sequences"]

    def test_reference_log_probs_are_shared(self, inputs, tmp_path, monkeypatch):
        """Without adapters: computed once for the largest subset, and what each trainer would compute for itself."""
        study = Study(settings(inputs, tmp_path / "out", methods=["dpo", "ipo"], peft=None))
        run_study(study)
        stages = list(study.output_dir.glob("stages/reference-*/stage.json"))
        assert len(stages) == 2  # a start
        monkeypatch.setattr(module, "_with_reference", lambda study, cell, source, config, data: data)
        other = Study(study.settings | {"output_dir": str(tmp_path / "other")})
        for mine, theirs in zip(run_study(other)["cells"], collect_results(study)["cells"], strict=True):
            assert values(mine) == pytest.approx(values(theirs), abs=1e-5)


class TestFailures:
    def test_a_failed_cell_does_not_stop_the_others(self, inputs, tmp_path, monkeypatch, capsys):
        study = Study(
            settings(
                inputs,
                tmp_path / "out",
                sizes=[8],
                methods=["sft", "dpo"],
                starts={"plain": {"model": inputs["model"]}},
            )
        )
        train = module.train_cell

        def failing(study, cell, *args):
            if cell.label == "sft":
                raise RuntimeError("no <luck>")
            return train(study, cell, *args)

        monkeypatch.setattr(module, "train_cell", failing)
        cells = by_label(run_study(study), size=8)
        assert {label: cell["status"] for label, cell in cells.items()} == {
            "start": "done",
            "sft": "failed",
            "dpo": "done",
        }
        assert cells["sft"]["error"] == "RuntimeError: no <luck>"
        assert "Failed: plain, sft, 8 pairs, seed 0: RuntimeError: no <luck>" in capsys.readouterr().out
        record = json.loads((study.output_dir / cells["sft"]["folder"] / "failed.json").read_text())
        assert "in failing" in record["traceback"]
        monkeypatch.undo()
        assert {c["status"] for c in run_study(study)["cells"]} == {"done"}

    def test_divergence(self, inputs, tmp_path):
        methods = {"dpo": {"learning_rate": 1e30}}
        starts = {"plain": {"model": inputs["model"]}}
        study = Study(settings(inputs, tmp_path / "out", sizes=[8], methods=methods, starts=starts))
        error = by_label(run_study(study), size=8)["dpo"]["error"]
        assert re.search("is no finite number: the training diverged. Lower its learning rate", error)

    def test_weights_that_are_gone(self, inputs, tmp_path):
        """They are not taken for those of the start."""
        base = settings(
            inputs, tmp_path / "out", methods=["dpo"], sizes=[8], starts={"plain": {"model": inputs["model"]}}
        )
        study = Study(base)
        cell = study.cells()[1]
        assert run_cell(study, cell) == "done"
        (module.cell_folder(study, cell) / "model" / "adapter_model.safetensors").unlink()
        other = Study(base | {"evaluation": {"pairs": {"rows": 3}}})
        assert run_cell(other, cell) == "failed"
        error = json.loads((module.cell_folder(study, cell) / "failed.json").read_text())["error"]
        assert re.search("The weights of the cell are gone from .*To train it again, delete .*train.json", error)

    def test_rows_that_a_trainer_drops(self, inputs, tmp_path, monkeypatch):
        study = Study(
            settings(
                inputs, tmp_path / "out", methods=["dpo"], sizes=[8], starts={"plain": {"model": inputs["model"]}}
            )
        )
        rows = study.rows_of

        def with_equal_answers(*args):
            found = [dict(row) for row in rows(*args)]
            found[0]["rejected"] = found[0]["chosen"]
            return found

        monkeypatch.setattr(study, "rows_of", with_equal_answers)
        cell = study.cells()[1]
        assert run_cell(study, cell) == "failed"
        error = json.loads((module.cell_folder(study, cell) / "failed.json").read_text())["error"]
        assert "the trainer has dropped 1 of 8 rows" in error

    def test_equal_and_empty_answers_are_left_out(self, inputs, tmp_path, capsys):
        rows = read_rows(inputs["train"])
        rows[0]["rejected"], rows[1]["chosen"] = rows[0]["chosen"] + " ", "  "
        data = {"train": write_rows(tmp_path / "x.jsonl", rows), "test": inputs["test"], "sft": inputs["sft"]}
        assert len(Study(settings(inputs, tmp_path, data=data)).rows) == 24
        assert "2 of 26 rows are left out: equal or empty answers" in capsys.readouterr().out

    def test_less_memory_for_the_evaluation(self, inputs, tmp_path, monkeypatch):
        """After a lack of memory, smaller batches go on, with answers of their own."""
        base = settings(
            inputs, tmp_path / "out", methods=["dpo"], sizes=[8], starts={"plain": {"model": inputs["model"]}}
        )
        study = Study(base)
        cell, generate = study.cells()[1], module._evaluate

        def failing(study, cell, part, *args):
            generate(study, cell, part, *args)
            if part == "answers":
                raise RuntimeError("out of memory")

        monkeypatch.setattr(module, "_evaluate", failing)
        assert run_cell(study, cell) == "failed"
        monkeypatch.undo()
        smaller = Study(base | {"evaluation": base["evaluation"] | {"batch_tokens": 512}})
        assert smaller.cells()[1] == cell
        assert run_cell(smaller, cell) == "done"

    def test_a_tracker_that_fails(self, inputs, tmp_path, monkeypatch, capsys):
        def failing(*args):
            raise OSError("no network")

        monkeypatch.setattr(module, "_track", failing)
        study = Study(settings(inputs, tmp_path / "out", methods=["dpo"], sizes=[8], evaluation={"pairs": {}}))
        assert run_cell(study, study.cells()[0]) == "done"
        assert "were not logged: OSError: no network" in capsys.readouterr().out

    def test_interrupt(self, inputs, tmp_path, monkeypatch, capsys):
        def interrupted(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "train_cell", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_study(Study(settings(inputs, tmp_path / "out", sizes=[8], methods=["dpo"])))
        assert "to go on, run the same again" in capsys.readouterr().out

    @pytest.mark.parametrize("save", ["no", "steps"])
    def test_stopped_before_the_end_is_recorded(self, inputs, tmp_path, monkeypatch, save):
        """The weights are there, but not the record of the training: it is made again, or ended from its checkpoint."""
        base = settings(
            inputs, tmp_path / "out", methods=["dpo"], sizes=[8], starts={"plain": {"model": inputs["model"]}}
        )
        study = Study(base | {"training": base["training"] | {"save_strategy": save, "save_steps": 1}})
        cell, write_file = study.cells()[1], module.write_file

        def stopped(path, data):
            if path.name == "train.json":
                raise KeyboardInterrupt
            write_file(path, data)

        monkeypatch.setattr(module, "write_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_cell(study, cell)
        assert (module.cell_folder(study, cell) / "model" / "adapter_model.safetensors").is_file()
        monkeypatch.undo()
        assert run_cell(study, cell) == "done"
        other = Study(base | {"output_dir": str(tmp_path / "other")})
        assert run_cell(other, cell) == "done"
        assert module._measures_of(study, cell) == module._measures_of(other, cell)

    @pytest.mark.slow
    def test_killed_and_run_again(self, finished, tmp_path):
        """SIGKILL in a training: finished cells are not repeated, and the results are those of an uninterrupted study."""
        study, results = finished
        changes = {"training": study.settings["training"] | {"save_strategy": "steps", "save_steps": 1}}
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(study.settings | changes | {"output_dir": str(tmp_path / "out")}))
        command = [sys.executable, study_killed.__file__, str(file)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "5"], capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        first = re.findall("^training (.*)", done.stdout, re.M)
        assert len(first) == 6
        done = subprocess.run([*command, "-1"], capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        second = re.findall("^training (.*)", done.stdout, re.M)
        assert second[0] == first[-1]
        assert "Going on from checkpoint-" in done.stdout
        assert sorted(first[:-1] + second) == sorted(c["id"] for c in results["cells"] if c["method"] != "start")
        again = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [c["measures"] for c in again["cells"]] == [c["measures"] for c in results["cells"]]

    @pytest.mark.slow
    def test_two_processes_share_a_study(self, finished, tmp_path):
        study, results = finished
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(study.settings | {"output_dir": str(tmp_path / "out")}))
        command = [sys.executable, study_killed.__file__, str(file), "-1"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
            for _ in range(2)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0], outputs
        trained = [cell for output in outputs for cell in re.findall("^training (.*)", output, re.M)]
        assert sorted(trained) == sorted(c["id"] for c in results["cells"] if c["method"] != "start")
        again = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [c["measures"] for c in again["cells"]] == [c["measures"] for c in results["cells"]]


class TestExecutors:
    def test_commands(self, finished, inputs, tmp_path):
        study, _ = finished
        assert print_commands(study, "study.yaml") == []
        other = Study(study.settings | {"output_dir": str(tmp_path)})
        commands = print_commands(other, "my study.yaml")
        assert len(commands) == 14
        assert commands[0] == f"trl-ift study run 'my study.yaml' --cells {other.cells()[0].id}"

    @pytest.mark.slow
    def test_ray(self, finished, tmp_path):
        ray = pytest.importorskip("ray")
        study, results = finished
        other = Study(study.settings | {"output_dir": str(tmp_path / "out"), "sizes": [8]})
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        )
        try:
            found = {c["id"]: c for c in run_study(other, executor="ray", num_workers=2)["cells"]}
        finally:
            ray.shutdown()
        first = {c["id"]: c for c in results["cells"]}
        assert len(found) == 8
        for name, cell in found.items():
            assert cell["status"] == "done"
            assert cell["measures"] == first[name]["measures"]

    def test_settings_for_other_folders(self, inputs, tmp_path, monkeypatch):
        monkeypatch.chdir(Path(inputs["train"]).parent)
        monkeypatch.setenv("NAME", "model")
        written = settings(inputs, "out", starts={"plain": {"model": "$NAME"}})
        written["data"] = {name: Path(path).name for name, path in written["data"].items()}
        for folder in ("tiny", "add"):  # of the name of the study, and of a task
            Path(folder).mkdir(exist_ok=True)
        study = Study(written)
        keys = [cell.key for cell in study.cells()]
        # Files of a benchmark are known by their content, wherever they are named from
        judged = {"judge": "replay", "questions": Path(inputs["train"]).name}
        part = [
            study.evaluation | {"judged": judged},
            study.evaluation | {"judged": judged | {"questions": inputs["train"]}},
        ]
        found = []
        for study.evaluation in part:
            found.append(study.part_key("judged", study.starts["plain"]))
        assert found[0] == found[1]
        study.evaluation = part[0] | {"judged": judged | {"questions": Path(inputs["test"]).name}}
        assert study.part_key("judged", study.starts["plain"]) != found[0]
        moved = study.absolute_settings()
        assert (moved["name"], moved["evaluation"]["tasks"][0]["name"]) == ("tiny", "add")
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("NAME")
        assert [cell.key for cell in Study(moved).cells()] == keys
        assert Path(moved["output_dir"]) == Path(inputs["train"]).parent / "out"

    def test_unknown(self, finished):
        with pytest.raises(ValueError, match="`executor='slurm'` is not known"):
            run_study(finished[0], executor="slurm")


class TestCommand:
    @pytest.fixture
    def file(self, finished, tmp_path):

        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(finished[0].settings))
        return str(path)

    def test_plan(self, file, finished, capsys):
        assert main(["study", "plan", file, "--list"]) == 0
        text = capsys.readouterr().out
        assert "2 starts x 3 methods x 2 sizes x 1 seeds = 12 cells, and 2 untrained starts. 14 are finished." in text
        assert re.search(r"^kto +unpaired +2 / 4 +16 / 32 +0 +\d+\.\d\d +0 s$", text, re.M)
        assert "the start 'sft' is fine-tuned on 8 rows once a seed, for 6 cells each" in text
        assert text.count("  finished") == 14
        assert not list(finished[0].output_dir.glob("unused"))

    def test_costs_are_measured_once(self, finished, monkeypatch):
        study, _ = finished
        first = measure_costs(study)
        assert set(first) == {"sft", "dpo", "kto"}
        assert all(cost["step_seconds"] > 0 and cost["step_tokens"] > 0 for cost in first.values())
        from trl_ift.study import costs

        monkeypatch.setattr(costs, "_two_steps", lambda *args: pytest.fail("measured again"))
        assert measure_costs(Study(study.settings)) == first

    def test_run_and_report(self, file, finished, capsys):
        pytest.importorskip("matplotlib")
        assert main(["study", "run", file]) == 0
        assert "14 of 14 cells are finished." in capsys.readouterr().out
        assert main(["study", "report", file]) == 0
        text = capsys.readouterr().out
        assert "report.html" in text
        assert "dpo" in text
        assert (finished[0].output_dir / "report.md").is_file()

    def test_report_before_any_run(self, inputs, tmp_path, capsys):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(settings(inputs, tmp_path / "out")))
        assert main(["study", "report", str(path)]) == 1
        assert "There are no cells in" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_print_commands(self, file, capsys):
        assert main(["study", "run", file, "--print-commands"]) == 0
        assert capsys.readouterr().out.strip() == ""

    def test_failed_cells_fail_the_command(self, inputs, tmp_path, capsys, monkeypatch):

        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(settings(inputs, tmp_path / "out", methods=["dpo"], sizes=[8])))
        monkeypatch.setattr(module, "train_cell", lambda *args: 1 / 0)
        assert main(["study", "run", str(path)]) == 1
        assert "2 cells failed; they are tried again by the next run" in capsys.readouterr().err

    def test_bad_input(self, tmp_path, capsys):
        assert main(["study", "plan", str(tmp_path / "none.yaml")]) == 1
        assert "There is no study file" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["study", "go"])


def test_trackers(inputs, tmp_path):
    """The trackers that TRL logs the training to get the measures too."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base = settings(inputs, tmp_path / "out", methods=["dpo"], sizes=[8], starts={"plain": {"model": inputs["model"]}})
    study = Study(base | {"training": base["training"] | {"report_to": "tensorboard"}})
    cell = study.cells()[1]
    assert run_cell(study, cell) == "done"
    found = {}
    for file in (study.output_dir / "trackers").rglob("events.*"):
        events = EventAccumulator(str(file.parent)).Reload()
        found |= {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    stored = values(next(c for c in collect_results(study)["cells"] if c["id"] == cell.id))
    assert found == {name: pytest.approx(value, abs=1e-6) for name, value in stored.items()}


def test_the_file_of_the_documentation():
    page = (Path(__file__).parent.parent / "docs" / "study.md").read_text()
    text = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]
    study = Study(yaml.safe_load(text))
    assert {label: arm.method.name for label, arm in study.arms.items()} == {
        "sft": "sft", "dpo": "dpo", "dpo-strong": "dpo", "kto": "kto", "mpo": "mpo"
    }  # fmt: skip
    assert study.peft_config().r == 16
    assert study.config(study.arms["kto"], 1000, 0, "x").per_device_train_batch_size == 8


def test_the_study_of_the_benchmark(monkeypatch, inputs):
    file = Path(__file__).parent.parent / "benchmarks" / "study" / "study.yaml"
    for name in ("MODEL", "DATA", "OUTPUT"):
        monkeypatch.setenv(name, inputs["model"])
    study = Study.load(file)
    assert {"sft", "ift", "dpo", "ipo", "kto", "cpo", "mpo", "tpo"} <= set(study.arms)
    assert study.steps(study.arms["dpo"], 128) == 16


class TestBenchmarks:
    """lm-evaluation-harness and judged dialogue as parts of a cell."""

    def test_lm_eval(self, inputs, tmp_path):
        pytest.importorskip("lm_eval")
        rows = [
            {"goal": f"Open door {i}", "sol1": "Turn the key.", "sol2": "Eat it.", "label": i % 2} for i in range(6)
        ]
        task = {"task": "piqa", "data_files": {"validation": write_rows(tmp_path / "piqa.jsonl", rows)}}
        base = settings(
            inputs, tmp_path / "out", methods=["dpo"], sizes=[8], starts={"plain": {"model": inputs["model"]}}
        )
        study = Study(base | {"evaluation": {"pairs": {"rows": 4}, "lm_eval": {"tasks": [task], "limit": 4}}})
        results = run_study(study)
        for cell in results["cells"]:
            assert cell["status"] == "done", cell["error"]
            measure = cell["measures"]["lm_eval/piqa/acc_norm"]
            assert len(measure["items"]) == 4
        documents = {cell["measures"]["lm_eval/piqa/acc_norm"]["documents"] for cell in results["cells"]}
        assert len(documents) == 1  # the same for all cells
        # Other documents: evaluated anew, not trained
        rows[0]["goal"] = "Open another door"
        write_rows(tmp_path / "piqa.jsonl", rows)
        assert {cell["status"] for cell in collect_results(Study(study.settings))["cells"]} == {"missing"}

    @pytest.mark.parametrize("judge", ["none", "local"])
    def test_judged(self, inputs, tmp_path, judge):
        questions = [
            {"question_id": i, "category": c, "turns": [f"Name a {c}.", "And another."], "reference": None}
            for i, c in enumerate(["math", "writing"], 81)
        ]
        names = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")
        fields = "{question} {answer} {question_1} {answer_1} {question_2} {answer_2} {ref_answer_1} {ref_answer_2}"
        prompts = [
            {"name": name, "type": "single", "system_prompt": "", "prompt_template": fields, "output_format": "[[rating]]",
             "description": "", "category": "general"}
            for name in names
        ]  # fmt: skip
        for prompt in prompts:
            used = [f for f in fields.split() if ("_" in f) == ("multi" in prompt["name"])]
            used = [f for f in used if "ref" not in f or "math" in prompt["name"]]
            prompt["prompt_template"] = " ".join(used)
        judged = {
            "questions": write_rows(tmp_path / "questions.jsonl", questions),
            "max_new_tokens": 4,
            "judge": judge,
        }
        if judge != "none":
            judged |= {"prompts": write_rows(tmp_path / "prompts.jsonl", prompts), "model": inputs["model"]}
        base = settings(
            inputs, tmp_path / "out", methods=["dpo"], sizes=[8], starts={"plain": {"model": inputs["model"]}}
        )
        study = Study(base | {"evaluation": {"judged": judged}})
        study.check()
        cell = study.cells()[0]
        assert run_cell(study, cell) == "done", (study.output_dir / "cells" / cell.id / "failed.json").read_text()
        found = collect_results(study)["cells"][0]["measures"]
        assert found["answers/tokens"]["value"] > 0
        assert not [name for name in found if name.startswith("mt_bench") and judge == "none"]
        if judge == "local":
            assert found["mt_bench/unrated"]["value"] == 1.0  # it is no judge
            assert found["mt_bench/score"]["value"] is None


class TestCard:
    """One pair worked out by hand: log pi -42 and -55, reference -45 and -50, 20 and 25 tokens."""

    class Model:
        """Stands in for a model: gives the log-probabilities that it was told, in float64, spread over the labels."""

        def __init__(self, *sums):
            self.sums = list(sums)

        def __call__(self, input_ids=None, labels=None, **_):
            mask = labels[:, 1:] != -100
            total = torch.tensor(self.sums.pop(0), dtype=torch.float64)
            log_probs = torch.where(mask, (total / mask.sum(1))[:, None], 0.0).requires_grad_()
            zeros = torch.zeros_like(log_probs)
            return FusedCausalLMOutput(
                log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=mask, label_mask=mask,
                log_sum_sq_probs=zeros,
            )  # fmt: skip

    @pytest.fixture(scope="class")
    def trainers(self, inputs, tmp_path_factory):
        folder = tmp_path_factory.mktemp("card")
        study = Study(settings(inputs, folder / "out", methods=["dpo", "ipo", "kto", "cpo"]))
        start, found = study.starts["plain"], {}
        for label, arm in study.arms.items():
            config = study.config(arm, 8, 0, str(folder / label))
            data = training_rows(arm.method.kind, study.rows_of(start, 8, 0), 4, 0)
            found[label] = make_trainer(study, start, arm.method, start.model, config, data)
        return found

    def batch(self, lengths=(20, 25)):
        width = 30
        mask = torch.zeros(2, width, dtype=torch.long)
        for row, length in enumerate(lengths):
            mask[row, 2 : 2 + length] = 1
        ids = torch.full((2, width), 5)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}

    @pytest.mark.parametrize(("label", "loss"), [("dpo", 0.3711006659), ("ipo", 21.6225)])
    def test_pairs(self, trainers, label, loss):
        trainer = trainers[label]
        assert trainer.beta == 0.1
        batch = self.batch() | {
            "ref_chosen_logps": torch.tensor([-45.0], dtype=torch.float64),
            "ref_rejected_logps": torch.tensor([-50.0], dtype=torch.float64),
        }
        trainer.precompute_ref_logps = trainer._reference_checked = True  # it is not the start here
        found = trainer._compute_loss(self.Model([-42.0, -55.0]), batch, False)
        assert found.item() == pytest.approx(loss, abs=1e-9)

    def test_kto(self, trainers):
        trainer = trainers["kto"]
        batch = self.batch() | {
            "label": torch.tensor([True, False]),
            "ref_logps": torch.tensor([-45.0, -50.0], dtype=torch.float64),
            "ref_KL_logps": torch.tensor([-10.0, -10.0], dtype=torch.float64),
        }
        batch |= {f"KL_{name}": batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}
        trainer.precompute_ref_logps = True
        model = self.Model([-9.3, -9.3], [-42.0, -55.0])  # KL 0.7
        assert trainer._compute_loss(model, batch, False).item() == pytest.approx(0.4019944851, abs=1e-9)
        # The two terms, each in a mean over two rows
        for weights, term in (((1.0, 0.0), 0.4427521454), ((0.0, 1.0), 0.3612368249)):
            trainer.desirable_weight, trainer.undesirable_weight = weights
            model = self.Model([-9.3, -9.3], [-42.0, -55.0])
            assert trainer._compute_loss(model, batch, False).item() == pytest.approx(term / 2, abs=1e-9)

    def test_cpo(self, trainers):
        trainer = trainers["cpo"]
        chosen, rejected = (torch.tensor([value], dtype=torch.float64) for value in (-42.0, -55.0))
        losses = trainer.cpo_loss(chosen, rejected)[0]
        assert losses.item() == pytest.approx(0.2410084538, abs=1e-9)
        assert (losses + trainer.cpo_alpha * -chosen / 20).item() == pytest.approx(2.3410084538, abs=1e-9)
