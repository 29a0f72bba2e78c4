"""What a study refuses before anything is trained, what it says it will cost, and its measures as metrics."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import yaml
from study import read_rows, settings, write_inputs, write_rows

from trl_ift import checks as library_checks
from trl_ift.cli import main
from trl_ift.study import costs, run
from trl_ift.study.checks import check_settings
from trl_ift.study.evaluate import StartScores
from trl_ift.study.plan import Study, StudyError


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer):
    return write_inputs(tmp_path_factory.mktemp("inputs"), tokenizer)


@pytest.fixture
def refused(inputs, tmp_path):
    """Call with changed sections: the message of the refusal."""

    def check(**changes):
        study = Study(settings(inputs, tmp_path / "out", **changes))
        with pytest.raises(StudyError) as error:
            check_settings(study)
        return str(error.value)

    return check


def test_a_study_that_is_right(inputs, tmp_path):
    check_settings(Study(settings(inputs, tmp_path / "out")))


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"evaluation": {"kl": {"max_new_tokens": 0}}}, "`evaluation.kl.max_new_tokens: 0` must be an integer of at"),
            ({"evaluation": {"answers": {"max_new_tokens": 1.5}}}, "`evaluation.answers.max_new_tokens: 1.5` must be"),
            ({"evaluation": {"pairs": {}, "batch_tokens": "x"}}, "`evaluation.batch_tokens: 'x'` must be an integer"),
            ({"evaluation": {"pairs": {}, "batch_tokens": 0}}, "`evaluation.batch_tokens: 0` must be an integer"),
            ({"evaluation": {"pairs": {}, "max_length": 1}}, "`evaluation.max_length: 1` must be an integer of at least 2"),
            ({"evaluation": {"pairs": {}, "seed": -1}}, "`evaluation.seed: -1` must be an integer of at least 0"),
            ({"evaluation": {"pairs": {}, "seed": True}}, "`evaluation.seed: True` must be an integer"),
            ({"evaluation": {"batch_tokens": 8}}, "`evaluation` measures nothing"),
            ({"samples": {"max_new_tokens": 0}}, "`samples.max_new_tokens: 0` must be"),
            ({"seeds": []}, r"`seeds: \[\]` must list integers from 0"),
            ({"seeds": [-1]}, r"`seeds: \[-1\]` must list integers"),
            ({"seeds": [True]}, r"`seeds: \[True\]` must list integers"),
            ({"seeds": ["a"]}, r"`seeds: \['a'\]` must list integers"),
            ({"seeds": [2**32]}, "must list integers from 0 to 4294967295"),
            ({"methods": {"a/b": {"method": "dpo"}}}, "`methods`: the name 'a/b' is to be part of a folder's"),
            ({"methods": {".b": {"method": "dpo"}}}, r"`methods`: the name '.b' .* with no '.' in front"),
            ({"methods": {1: {"method": "dpo"}}}, "`methods`: the name 1 .* Put it in quotes"),
            ({"methods": {"dpo": {"per_device_train_batch_size": 0}}}, "`methods.dpo.per_device_train_batch_size: 0` must"),
            ({"methods": {"kto": {"per_device_train_batch_size": "4"}}}, "per_device_train_batch_size: '4'` must be an int"),
            ({"training": {"gradient_accumulation_steps": 1.5}}, "`training.gradient_accumulation_steps: 1.5` must be"),
            ({"training": {"report_to": "no_such_tracker"}}, "`training.report_to` names the tracker 'no_such_tracker'"),
            ({"training": {"report_to": ["codecarbon"]}}, "names the tracker 'codecarbon', which is not installed here"),
            ({"methods": {"dpo": {"report_to": 3}}}, "`methods.dpo.report_to` names the tracker 3"),
            ({"peft": None, "model": {"load_in_4bit": True}}, "`model.load_in_4bit` without `peft:`: quantized weights"),
            ({"model": {"load_in_4bit": True, "load_in_8bit": True}}, "exclude each other"),
            ({"model": {"load_in_4bit": "yes"}}, "`model.load_in_4bit: 'yes'` must be true or false"),
            ({"model": {"dtype": "bf16"}}, "`model.dtype: 'bf16'` is not known. Choose one of: auto, bfloat16"),
            ({"peft": True}, "`peft: True` must hold options of LoraConfig"),
            ({"peft": {"r": 0}}, "`peft.r: 0` must be an integer of at least 1"),
            ({"peft": {"lora_alpha": 0}}, "`peft.lora_alpha: 0` must be a number above 0"),
            ({"peft": {"lora_dropout": 1.0}}, "`peft.lora_dropout: 1.0` must be a number from 0 to below 1"),
            ({"peft": {"task_type": "CAUSAL_LM"}}, "`peft.task_type` is set by the study itself"),
            ({"peft": {"rank": 4}}, "`peft.rank` is no option of LoraConfig"),
            ({"evaluation": {"lm_eval": {"tasks": ["x"], "limits": 3}}}, "unknown key 'limits'. Known: tasks, limit, num_f"),
            ({"evaluation": {"lm_eval": {"tasks": ["x"], "limit": 0}}}, "`evaluation.lm_eval.limit: 0` must be"),
            ({"evaluation": {"lm_eval": {"tasks": ["x"], "batch_size": "auto"}}}, "batch_size: 'auto'` must be an integer"),
        ],
    )  # fmt: skip
    def test_values(self, refused, changes, message):
        assert re.search(message, refused(**changes))

    @pytest.mark.parametrize(
        ("sft", "message"),
        [
            ({"rows": 0}, "`starts.a.sft.rows: 0` must be an integer of at least 1"),
            ({"rows": 2.5}, "`starts.a.sft.rows: 2.5` must be"),
            ({"budget": {"steps": 0}}, "`starts.a.sft.budget: {'steps': 0}` trains nothing"),
            ({"budget": {"epochs": 0}}, "trains nothing"),
            ({"training": ["x"]}, "`starts.a.sft.training`: expected `name: value` lines, found list"),
            ({"training": {"max_steps": 3}}, "`starts.a.sft.training.max_steps` is set by the study itself"),
            (
                {"training": {"gradient_accumulation_steps": 0}},
                "`starts.a.sft.training.gradient_accumulation_steps: 0`",
            ),
            (
                {"training": {"max_length": 4}},
                "the prompt has . tokens, which fill `starts.a.sft.training.max_length: 4`",
            ),
        ],
    )
    def test_sft_of_starts(self, refused, inputs, sft, message):
        assert re.search(message, refused(starts={"a": {"model": inputs["model"], "sft": sft}}))

    def test_starts(self, refused, inputs):
        assert "`starts`: the name '../x'" in refused(starts={"../x": {"model": inputs["model"]}})
        assert "`starts.a.chat: 'yes'` must be true or false" in refused(
            starts={"a": {"model": inputs["model"], "chat": "yes"}}
        )

    def test_bitsandbytes_is_needed(self, inputs, tmp_path, monkeypatch):
        monkeypatch.setattr(library_checks, "find_spec", lambda name: None)
        study = Study(settings(inputs, tmp_path / "out", model={"load_in_4bit": True}))
        with pytest.raises(ImportError, match="bitsandbytes is not installed"):
            check_settings(study)

    def test_the_folder_is_a_file(self, inputs, tmp_path):
        (tmp_path / "file").write_text("")
        for output_dir in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(StudyError, match=r"`output_dir: .*file` is a file. Name a folder"):
                check_settings(Study(settings(inputs, output_dir)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"max_new_tokens": 0}, "`evaluation.tasks.add.max_new_tokens: 0` must be an integer of at least 1"),
            ({"options": {"seed": 1}}, "`evaluation.tasks.add.options` is read with `reasoning_gym` only"),
            ({"data": None, "reasoning_gym": "chain_sum", "answer": "x"}, "`evaluation.tasks.add.answer` is read with `data`"),
        ],
    )  # fmt: skip
    def test_tasks(self, refused, inputs, change, message):
        task = {"name": "add", "data": inputs["task"]} | change
        task = {name: value for name, value in task.items() if value is not None}
        assert message in refused(evaluation={"tasks": [task]})


class TestJudged:
    @pytest.fixture
    def files(self, tmp_path):
        questions = [
            {"question_id": i, "category": "writing", "turns": ["Name one.", "Another."], "reference": None}
            for i in range(2)
        ]
        prompt = {"name": "single-v1", "system_prompt": "", "prompt_template": "{question} {answer}"}
        return {
            "questions": write_rows(tmp_path / "questions.jsonl", questions),
            "prompts": write_rows(tmp_path / "prompts.jsonl", [prompt]),
        }

    @pytest.mark.parametrize(
        ("judge", "change", "message"),
        [
            ("none", {"rows": 3}, r"`evaluation.judged.rows: 3`, but `.*` has 2 questions. Lower it"),
            ("none", {"rows": 0}, "`evaluation.judged.rows: 0` must be an integer"),
            ("none", {"max_new_tokens": 0}, "`evaluation.judged.max_new_tokens: 0` must be"),
            ("none", {"questions": "none.jsonl"}, "`evaluation.judged.questions`: there is no file `none.jsonl`"),
            ("local", {"model": "x", "prompts": "none.jsonl"}, "`evaluation.judged.prompts`: there is no file"),
            ("replay", {"judgments": "none.jsonl"}, "`evaluation.judged.judgments`: there is no file"),
            ("none", {"model": "x"}, "`evaluation.judged.model` is not read by `judge: none`, only by client, local, replay"),
            ("local", {"model": "x", "base_url": "http://a"}, "`evaluation.judged.base_url` is not read by `judge: local`"),
            ("client", {"model": "x", "judgments": "x"}, "is not read by `judge: client`, only by replay"),
            ("client", {"model": "x", "base_url": "localhost:8000"}, "`base_url` must be the address of a server"),
        ],
    )  # fmt: skip
    def test_settings(self, refused, files, judge, change, message):
        used = files if judge != "none" else {"questions": files["questions"]}
        assert re.search(message, refused(evaluation={"judged": used | {"judge": judge} | change}))

    def test_the_judge_has_to_answer(self, inputs, files, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append((self.path, self.headers.get("authorization")))
                self.send_response(401)
                self.end_headers()

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        judged = files | {"judge": "client", "model": "judge", "base_url": url}
        study = Study(settings(inputs, tmp_path / "out", evaluation={"judged": judged}))
        check_settings(study)
        assert asked == [("/v1/models", None)]
        server.shutdown()
        server.server_close()
        with pytest.raises(
            StudyError, match=rf"`evaluation.judged.base_url: {url}` does not answer .*Start the server"
        ):
            check_settings(study)
        monkeypatch.setattr(run, "is_finished", lambda study, cell: True)
        check_settings(study)  # all is judged

    def test_offline(self, inputs, files, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        judged = files | {"judge": "client", "model": "judge", "base_url": "http://127.0.0.1:9/v1"}
        with pytest.raises(StudyError, match="`HF_HUB_OFFLINE` is set"):
            check_settings(Study(settings(inputs, tmp_path / "out", evaluation={"judged": judged})))


class TestData:
    def refusal(self, inputs, tmp_path, part, change, **changes):
        rows = read_rows(inputs[part])
        rows = change(rows)
        changed = inputs | {part: write_rows(tmp_path / "rows.jsonl", rows)}
        with pytest.raises(StudyError) as error:
            check_settings(Study(settings(changed, tmp_path / "out", **changes)))
        return str(error.value)

    def test_mixed_kinds(self, inputs, tmp_path):
        def messages(rows):
            return [
                row | {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
                for row in rows
            ]

        text = self.refusal(inputs, tmp_path, "train", messages)
        assert "'prompt' holds text, 'chosen' holds messages" in text
        assert "Expected texts throughout, or messages throughout" in text
        # In the chat template all become messages
        starts = {"a": {"model": inputs["model"], "chat": True}}
        data = {"train": str(tmp_path / "rows.jsonl"), "test": inputs["test"]}
        check_settings(Study(settings(inputs, tmp_path / "out", data=data, starts=starts)))

    def test_no_texts(self, inputs, tmp_path):
        def numbers(rows):
            return [{"prompt": row["prompt"], "completion": 3} for row in rows]

        text = self.refusal(inputs, tmp_path, "sft", numbers)
        assert "row 0: column 'completion' must hold a text or a list of {'role', 'content'} messages, found 3" in text

    def test_blank_answers(self, inputs, tmp_path):
        text = self.refusal(inputs, tmp_path, "sft", lambda rows: [*rows[:5], rows[5] | {"completion": " \n"}])
        assert "the answer in column 'completion' is blank: ' \\n'" in text
        text = self.refusal(
            inputs, tmp_path, "train", lambda rows: [*rows[:20], rows[20] | {"reference": ""}], methods=["tpo"]
        )
        assert "`data.train`" in text
        assert "the answer in column 'reference' is blank" in text

    def test_too_few_prompts_for_kto(self, inputs, tmp_path):
        def one_prompt(rows):
            return [row | {"prompt": "Why?", "chosen": f" {i}"} for i, row in enumerate(rows)]

        text = self.refusal(inputs, tmp_path, "train", one_prompt, methods=["dpo", "kto"])
        assert text.startswith("`methods.kto`, 8 pairs, seed 0: KTO: 8 pairs of 1 prompts cannot be ordered")
        study = Study(settings(inputs | {"train": str(tmp_path / "rows.jsonl")}, tmp_path / "out", methods=["dpo"]))
        check_settings(study)

    def test_a_limit_of_one_method(self, refused, inputs):
        methods = {"sft": None, "dpo": {"max_length": 12}, "cpo": {"max_length": 13}}
        text = refused(methods=methods)
        assert re.search(r"`data.train`, row \d+: for the start 'plain' the prompt has \d+ tokens, which fill", text)
        assert "`methods.dpo.max_length: 12`" in text


# ---------------------------------------------------------------- costs


@pytest.fixture
def timed(monkeypatch):
    """Measurements are recorded and not made: `(model, method, micro-batches)`; each is two seconds a step."""
    made = []

    def two_steps(study, start, method, config, data, more):
        made.append((start.name, method.name, len(data) // config.per_device_train_batch_size))
        return {"step_seconds": 2.0 if "other" not in start.model else 5.0, "step_tokens": 10.0}

    monkeypatch.setattr(costs, "_two_steps", two_steps)
    return made


class TestCosts:
    @pytest.fixture
    def other(self, inputs, tmp_path, tokenizer):
        import tiny

        folder = tmp_path / "other"
        tiny.model("llama", tokenizer, seed=1).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def test_two_whole_steps_are_timed(self, inputs, tmp_path, monkeypatch):
        """With accumulation too, and with fewer rows than that takes."""
        pytest.importorskip("tensorboard")
        from transformers import Trainer

        training = settings(inputs, tmp_path)["training"] | {
            "gradient_accumulation_steps": 5, "report_to": "tensorboard", "save_strategy": "steps", "save_steps": 1,
        }  # fmt: skip
        starts = {"plain": {"model": inputs["model"]}}
        study = Study(settings(inputs, tmp_path / "out", training=training, methods=["kto", "dpo"], starts=starts))
        batches, trainers = [], []
        step = Trainer.training_step
        monkeypatch.setattr(
            Trainer, "training_step", lambda self, *args: (batches.append(1), trainers.append(self), step(self, *args))[2]
        )  # fmt: skip
        found = costs.measure_costs(study)
        assert set(found) == {"kto", "dpo"}
        assert len(batches) == 2 * 2 * 5
        for trainer in trainers:
            assert trainer.args.report_to == []
            assert trainer.args.save_strategy == "no"
            assert not any("TensorBoard" in type(c).__name__ for c in trainer.callback_handler.callbacks)
        assert [path.name for path in study.output_dir.iterdir()] == ["costs.json"]

    def test_what_is_measured_again(self, inputs, tmp_path, timed, other):
        base = settings(inputs, tmp_path / "out", methods=["dpo"])
        costs.measure_costs(Study(base))
        costs.measure_costs(Study(base | {"sizes": [16], "name": "x"}))
        assert timed == [("plain", "dpo", 2)]
        costs.measure_costs(Study(base | {"starts": {"plain": {"model": other}}}))  # the same name, another model
        rows = [row | {"chosen": row["chosen"] + " More."} for row in read_rows(inputs["train"])]
        data = base["data"] | {"train": write_rows(tmp_path / "longer.jsonl", rows)}
        costs.measure_costs(Study(base | {"data": data}))
        assert timed == [("plain", "dpo", 2)] * 3

    def test_each_start_has_the_costs_of_its_model(self, inputs, tmp_path, timed, other):
        starts = {"plain": {"model": inputs["model"]}, "again": {"model": inputs["model"]}, "big": {"model": other}}
        study = Study(settings(inputs, tmp_path / "out", starts=starts, methods=["dpo"], sizes=[16]))
        text = costs.describe_plan(study)
        assert timed == [("plain", "dpo", 2), ("big", "dpo", 2)]
        # 4 steps of 2, 2 and 5 seconds
        assert re.search(r"^dpo +pairs +4 +32 +120 +2.00 / 5.00 +36 s$", text, re.M)
        assert "(s a step: with the model of plain / big)" in text
        assert "Still to train: 3 cells, 120 tokens, about 36 s." in text

    def test_sft_and_what_is_there(self, inputs, tmp_path, timed):
        study = Study(settings(inputs, tmp_path / "out", methods=["dpo"], sizes=[16], seeds=[0, 1]))
        text = costs.describe_plan(study)
        assert ("sft", "sft", 2) in timed
        # 8 rows in batches of 4: two steps for each of two seeds
        assert "SFT of starts: 2 still to do, about 8 s." in text
        assert "for 1 cells each; 0 of 2 are there" in text
        assert "Together: about 40 s (without the evaluation)" in text
        stage = study.output_dir / "stages" / f"sft-{study.start_key(study.starts['sft'], 1)}"
        stage.mkdir(parents=True)
        (stage / "stage.json").write_text("{}")
        # A cell that is trained and not yet evaluated, and one whose evaluation was timed
        first, second = [cell for cell in study.cells() if cell.arm is not None][:2]
        for cell, file, content in ((first, "train.json", {}), (second, "cell.json", {"evaluation_seconds": 3.0})):
            folder = run.cell_folder(study, cell)
            folder.mkdir(parents=True)
            (folder / file).write_text(json.dumps(content))
        text = costs.describe_plan(study)
        assert "SFT of starts: 1 still to do, about 4 s." in text
        assert "for 1 cells each; 1 of 2 are there" in text
        assert "Shared results that are there, of earlier settings too: 1 x sft." in text
        assert "Still to train: 3 cells, 120 tokens, about 24 s." in text
        assert "Evaluation: 3 s a cell, about 21 s for 7 cells." in text
        assert "Together: about 49 s." in text

    def test_sampling(self, inputs, tmp_path, timed, monkeypatch):
        starts = {"plain": {"model": inputs["model"]}}
        methods = {"dpo": None, "spin": None, "mpo": {"reg_weight": 0.0}}
        study = Study(settings(inputs, tmp_path / "out", methods=methods, starts=starts))
        text = costs.describe_plan(study)
        assert re.search(r"Answers to sample: 16, at most about \d+ s \(timed in a batch of 8\)", text)
        assert "16 answers of each start, once a seed, for spin at all sizes" in text
        known = json.loads((study.output_dir / "costs.json").read_text())
        (answer,) = [cost["answer_seconds"] for cost in known.values() if "answer_seconds" in cost]
        assert answer > 0
        monkeypatch.setattr(costs, "load_trained", lambda *args: pytest.fail("measured again"))
        stage = study.output_dir / "stages" / "samples-x"
        stage.mkdir(parents=True)
        (stage / "stage.json").write_text(json.dumps({"start": "plain", "seed": 0, "prompts": 8}))
        assert "Answers to sample: 8, at" in costs.describe_plan(study)
        (stage / "stage.json").write_text(
            json.dumps({"start": "plain", "seed": 0, "prompts": 8, "samples": {"max_new_tokens": 9}})
        )
        assert "Answers to sample: 16, at" in costs.describe_plan(study)  # of other settings


# ---------------------------------------------------------------- the command


class TestCommand:
    @pytest.fixture
    def file(self, inputs, tmp_path):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(settings(inputs, tmp_path / "out")))
        return str(path)

    @pytest.mark.parametrize("number", ["0", "-1", "x"])
    def test_workers(self, file, capsys, number):
        with pytest.raises(SystemExit) as error:
            main(["study", "run", file, "--executor", "ray", f"--num_workers={number}"])
        assert error.value.code == 2
        assert "must be an integer of at least 1" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--num_workers", "3"], "--num_workers 3 has no effect with --executor in-process"),
            (["--executor", "ray", "--print-commands"], "--print-commands and --executor ray exclude each other"),
        ],
    )
    def test_options_that_exclude_each_other(self, file, capsys, monkeypatch, options, message):
        monkeypatch.setattr(run, "run_study", lambda *args: pytest.fail("ran"))
        monkeypatch.setattr(run, "print_commands", lambda *args: pytest.fail("ran"))
        assert main(["study", "run", file, *options]) == 1
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(("options", "workers"), [([], 2), (["--num_workers", "3"], 3)])
    def test_workers_are_passed_on(self, file, monkeypatch, options, workers):
        called = []
        monkeypatch.setattr(run, "run_study", lambda *args: called.append(args[2:]) or {"cells": []})
        assert main(["study", "run", file, "--executor", "ray", *options]) == 0
        assert called == [("ray", workers)]


# ---------------------------------------------------------------- metrics


class TestMetrics:
    @pytest.fixture(autouse=True)
    def _evaluate(self):
        pytest.importorskip("evaluate")

    @pytest.mark.parametrize("name", ["PreferenceAccuracy", "ForwardKL", "ExactNumber", "AnswerLength", "TextNLL"])
    def test_nothing_to_compute_from(self, name):
        from trl_ift.study import metrics

        with pytest.raises(ValueError, match=f"{name}: there are no predictions"):
            getattr(metrics, name)().compute(predictions=[], references=[])
        with pytest.raises(ValueError, match=f"{name}: there are no predictions"):
            getattr(metrics, name)().compute()
        metric = getattr(metrics, name)()
        metric.add_batch(predictions=[], references=[])
        with pytest.raises(ValueError, match=f"{name}: there are no predictions"):
            metric.compute()

    def test_samples_of_two_lengths(self):
        from trl_ift.study.metrics import ForwardKL

        with pytest.raises(
            ValueError, match="Sample 1 has 1 log-probabilities in `predictions` and 2 in `references`"
        ):
            ForwardKL().compute(predictions=[[1.0], [1.0]], references=[[1.0], [1.0, 2.0]])

    def test_lengths_and_texts_are_those_of_the_study(self, inputs, tmp_path, monkeypatch):
        from trl_ift.study import evaluate as module
        from trl_ift.study.metrics import AnswerLength, TextNLL

        held_out = module.HeldOut(answer_prompts=("a", "b"), neutral=("One text.", "Another, longer text."))
        answers = [{"num_tokens": 3, "truncated": False}, {"num_tokens": 8, "truncated": True}]
        monkeypatch.setattr(module, "_greedy", lambda *args: answers)
        start = StartScores((), (), ())
        measured = module.evaluate_part("answers", None, None, held_out, start, tmp_path)
        found = AnswerLength().compute(predictions=[3, 8], references=[False, True])
        assert found == {name: measure.value for name, measure in measured.items()}
        assert found == {"answer_length": 5.5, "cut_answers": 0.5}
        found = TextNLL().compute(predictions=[6.0, 2.0], references=[2, 6])
        assert found == {"neutral_nll": 1.0}  # 8 nats of 8 tokens
        metric = TextNLL()
        metric.add_batch(predictions=[6.0], references=[2])
        metric.add_batch(predictions=[2.0], references=[6])
        assert metric.compute() == found
        with pytest.raises(ValueError, match="`references` holds 0; expected numbers of tokens"):
            TextNLL().compute(predictions=[6.0], references=[0])
        with pytest.raises(ValueError, match="`predictions` holds -1; expected numbers of tokens"):
            AnswerLength().compute(predictions=[-1], references=[False])

    def test_texts_of_a_model(self, inputs):
        """The same number as the study's, from the sums and tokens of a model."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from trl_ift.study import evaluate as module
        from trl_ift.study.metrics import TextNLL

        model = AutoModelForCausalLM.from_pretrained(inputs["model"])
        tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
        texts = ("One text.", "Another, longer text.")
        measured = module.evaluate_part(
            "neutral", model, tokenizer, module.HeldOut(neutral=texts), StartScores((), (), ()), None
        )["neutral_nll"]
        batch = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        tokens = [ids.shape[1] - 1 for ids in batch]
        sums = [model(ids, labels=ids).loss.item() * number for ids, number in zip(batch, tokens, strict=True)]
        found = TextNLL().compute(predictions=sums, references=tokens)["neutral_nll"]
        assert found == pytest.approx(measured.value, abs=1e-5)
