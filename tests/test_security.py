"""What docs/security.md promises: no pickles, no code of others, plain YAML, paths that stay inside, no secrets in files."""

import argparse
import ast
import builtins
import importlib
import json
import os
import pickle
import tarfile
from dataclasses import fields
from io import BytesIO
from pathlib import Path

import pytest
import study as tiny_study
import tiny
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig

from trl_ift import METHODS, IFTConfig, IFTTrainer, cli
from trl_ift.data.inference import load_model
from trl_ift.data.shards import write_file
from trl_ift.hub.card import build_model_card, library_versions
from trl_ift.preference.sae import load_sae
from trl_ift.redaction import redacted
from trl_ift.scripts.data import load_named
from trl_ift.scripts.tools import options_of_config
from trl_ift.scripts.train import read_config, report_error, usage_error
from trl_ift.stages import as_json
from trl_ift.study.judged import InferenceClientJudge
from trl_ift.study.plan import Study
from trl_ift.study.report import write_report
from trl_ift.study.run import _record_failure, cell_folder, write_results
from trl_ift.supervised.sft import PlainSFTConfig, PlainSFTTrainer


ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("trl_ift", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
TOKEN = "hf_" + "testTOKEN" * 4
KEY = "sk-proj-" + "testKEY1" * 4
PASSWORD = "hunter2hunter2"


# ---------------------------------------------------------------- the sources

_PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
# Who may compile source: the hook in TRL's own loss function
_MAY_EXECUTE = {"trl_ift/trl_internals.py"}


def faults(source: str, file: str = "") -> list[str]:
    """What in a source loads pickles, runs code of others, or reads YAML with tags."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"imports {name}" for name in names if name.split(".")[0] in _PICKLING]
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            continue
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            found += [
                "trusts remote code"
                for key, value in pairs
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and _is(value, True)
            ]
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if called == "torch.load" and not _is(given.get("weights_only"), True):
            found.append("torch.load without weights_only=True")
        if called in ("np.load", "numpy.load") and not _is(given.get("allow_pickle"), False):
            found.append("np.load without allow_pickle=False")
        if called in ("torch.save", "pd.read_pickle", "os.system", "os.popen") or called.endswith(".to_pickle"):
            found.append(called)
        if called.startswith("yaml.") and called.split(".")[1] in ("load", "load_all", "unsafe_load", "full_load"):
            found.append(called)
        if called in ("eval", "exec", "__import__") and file not in _MAY_EXECUTE:
            found.append(called)
        if _is(given.get("shell"), True):
            found.append("a shell")
        if _is(given.get("trust_remote_code"), True):
            found.append("trusts remote code")
        arguments = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        if "--trust_remote_code" in arguments and not (
            isinstance(given.get("action"), ast.Constant) and given["action"].value == "store_true"
        ):
            found.append("an option that trusts remote code without being given")
    return found


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources(path):
    file = str(path.relative_to(ROOT))
    assert faults(path.read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import cloudpickle as c",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(model, path)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "parser.add_argument('--trust_remote_code', default=True)",
        "frame.to_pickle(path)",
    ],
)
def test_the_scan_finds(source):
    assert faults(source)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_configs_trust_no_remote_code(method):
    defaults = {field.name: field.default for field in fields(method.config_class)}
    assert defaults["trust_remote_code"] is False


@pytest.mark.parametrize("tool", sorted(set(cli._TOOLS) - {"study", "demo"}))
def test_tools_trust_no_remote_code(tool):
    module = importlib.import_module(cli._TOOLS[tool][0])
    parser = module.make_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    assert not parser.get_default("trust_remote_code")


# ---------------------------------------------------------------- code in files


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return builtins.open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    """A path that must not come to exist."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.is_file()  # the bomb works
    path.unlink()
    yield path
    assert not path.exists()


def bomb(path: Path, marker: Path) -> Path:
    """A file that runs code when it is unpickled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(Bomb(marker)))
    return path


def zipped_bomb(path: Path, marker: Path) -> Path:
    """The same in the format of `torch.save`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(Bomb(marker), path)
    return path


def config(folder, **settings):
    return IFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", **settings)


@pytest.mark.parametrize("write", [bomb, zipped_bomb])
def test_weights_are_not_unpickled(write, model_dir, tmp_path, marker):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(model_dir).iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    write(folder / "pytorch_model.bin", marker)
    with pytest.raises(Exception, match=r"(?i)weights.only|pickle|load"):
        IFTTrainer(str(folder), config(tmp_path / "run"), train_dataset=tiny.text_data())


@pytest.mark.parametrize("write", [bomb, zipped_bomb])
def test_adapters_are_not_unpickled(write, model_dir, tmp_path, marker):
    LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    write(tmp_path / "adapter" / "adapter_model.bin", marker)
    with pytest.raises(Exception, match=r"(?i)weights.only|pickle|load"):
        load_model(model_dir, str(tmp_path / "adapter"), {})


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_checkpoints_are_not_unpickled(file, model_dir, tmp_path, marker):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    IFTTrainer(model_dir, config(tmp_path / "run", **settings), train_dataset=tiny.text_data()).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    zipped_bomb(checkpoint / file, marker)
    zipped_bomb(checkpoint / "training_args.bin", marker)
    again = IFTTrainer(model_dir, config(tmp_path / "run", **settings), train_dataset=tiny.text_data())
    with pytest.raises(Exception, match=r"(?i)weights.only|pickle"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_autoencoders_are_not_unpickled(tmp_path, marker):
    import numpy as np

    np.savez(tmp_path / "sae.npz", W_enc=np.array([Bomb(marker)], dtype=object), b_enc=np.zeros(1))
    with pytest.raises(ValueError, match="cannot be read as .npz: Object arrays cannot be loaded"):
        load_sae(tmp_path / "sae.npz")
    for name in ("sae.npz", "sae.safetensors"):
        bomb(tmp_path / name, marker)
        with pytest.raises(ValueError, match="cannot be read as"):
            load_sae(tmp_path / name)
    with pytest.raises(ValueError, match="is of no known kind"):
        load_sae(bomb(tmp_path / "sae.pt", marker))


@pytest.mark.parametrize("name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.parquet", "rows.jsonl", "rows.jsonl.gz"])
def test_data_files_are_not_unpickled(name, tmp_path, marker):
    with pytest.raises(ValueError, match="is of no known kind|cannot be read|begins with"):
        load_named(str(bomb(tmp_path / name, marker)))


def test_folders_of_data_run_no_code(tmp_path, marker):
    bomb(tmp_path / "pickled" / "rows.pkl", marker)
    with pytest.raises(FileNotFoundError, match=r"No \(supported\) data files found"):
        load_named(str(tmp_path / "pickled"))
    script = f"open({str(marker)!r}, 'w')"
    write_rows(tmp_path / "scripted" / "scripted.py", script)
    with pytest.raises(ValueError, match="cannot be read: RuntimeError: Dataset scripts are no longer supported"):
        load_named(str(tmp_path / "scripted"))
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "rows.tar", "w") as archive:
        for name in ("0.pth", "0.pkl", "0.pyd", "0.pickle"):
            data = pickle.dumps(Bomb(marker))
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, BytesIO(data))
    with pytest.raises(ValueError, match="cannot be read: UnpicklingError: Weights only load failed"):
        list(load_named(str(tmp_path / "packed"))["train"])


def write_rows(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_code_beside_a_model_is_not_run(model_dir, tmp_path, marker):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in Path(model_dir).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    own = {"model_type": "of_its_own", "architectures": ["OwnModel"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(settings | own))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')")
    for name, trust in (("dtype", "float32"), ("trust_remote_code", False)):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load_model(str(folder), None, {name: trust, "trust_remote_code": False})
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        IFTTrainer(str(folder), config(tmp_path / "run"), train_dataset=tiny.text_data())


# ---------------------------------------------------------------- YAML


@pytest.fixture
def tagged(tmp_path, marker):
    """A YAML file whose tag would run code, and says nothing else."""
    code = f"!!python/object/apply:builtins.open ['{marker}', 'w']"
    assert yaml.unsafe_load(code)
    marker.unlink()
    return write_rows(tmp_path / "tagged.yaml", f"output_dir: {code}\n")


def test_tags_in_options_are_refused(tagged, capsys):
    with pytest.raises(ValueError, match="is no YAML file of plain values: could not determine a constructor"):
        read_config(str(tagged))
    with pytest.raises(ValueError, match="is no YAML file of plain values"):
        options_of_config(["--config", str(tagged)], argparse.ArgumentParser())
    for command in ("dpo", "spin", "lobass", "select", "generate", "token-weights"):
        assert cli.main([command, "--config", str(tagged)]) == 1
        assert "is no YAML file of plain values" in capsys.readouterr().err


def test_tags_for_accelerate_are_refused(tagged, capsys):
    assert cli.main(["dpo", "--accelerate_config", str(tagged), "--output_dir", "x"]) == 1
    assert "accelerate is no YAML file of plain values" in capsys.readouterr().err


def test_tags_in_studies_are_refused(tagged):
    with pytest.raises(ValueError, match="is no YAML file: could not determine a constructor"):
        Study.load(tagged)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"[" * 800, b"- a", b""])
def test_odd_yaml(content, tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="odd.yaml"):
        read_config(str(path))
    with pytest.raises(ValueError, match="odd.yaml"):
        Study.load(path)


# ---------------------------------------------------------------- paths


def saved(folder: Path) -> Path:
    tiny.text_data().save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize(
    "outside", ["../secret/data-00000-of-00001.arrow", "/etc/passwd", "..", "a/../../b", "", 3, None]
)
def test_saved_datasets_stay_in_their_folder(outside, tmp_path):
    saved(tmp_path / "secret")
    folder = saved(tmp_path / "data")
    assert len(load_named(str(folder))["train"]) == 8
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": outside}]}))
    with pytest.raises(ValueError, match="state.json` names .*, which is no file in its folder"):
        load_named(str(folder))
    splits = write_rows(tmp_path / "splits" / "dataset_dict.json", json.dumps({"splits": [outside]}))
    with pytest.raises(ValueError, match=r"dataset_dict.json` names .*, which is no file in its folder"):
        load_named(str(splits.parent))


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", "null", "{bad", '{"_data_files": 3}', '{"splits": 3}', '{"_data_files": [1]}']
)
def test_damaged_saved_datasets(content, tmp_path):
    for name in ("state.json", "dataset_dict.json"):
        path = write_rows(tmp_path / name.removesuffix(".json") / name, content)
        with pytest.raises(ValueError, match=f"{name}` is damaged"):
            load_named(str(path.parent))


def test_writing_follows_no_links(tmp_path):
    treasure = write_rows(tmp_path / "treasure", "mine")
    folder = tmp_path / "shards"
    folder.mkdir()
    target = folder / "manifest.json"
    target.symlink_to(treasure)
    write_file(target, b"new")
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"
    # The name that is written first is known beforehand
    written = []
    replace = os.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (written.append(source), replace(source, target)))
        write_file(target, b"newer")
    written[0].symlink_to(treasure)
    write_file(target, b"newest")
    assert target.read_bytes() == b"newest"
    target.unlink()
    target.symlink_to(treasure)
    write_file(target, b"second", keep_existing=True)
    assert treasure.read_text() == "mine"


@pytest.fixture(scope="module")
def inputs(tokenizer, tmp_path_factory):
    return tiny_study.write_inputs(tmp_path_factory.mktemp("inputs"), tokenizer)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".", "..", ".x", "a\x00b", ""])
def test_names_in_studies_are_no_paths(name, inputs, tmp_path):
    model = {"model": inputs["model"]}
    for change in ({"starts": {name: model}}, {"methods": {name: {"method": "dpo"}}}):
        given = {"starts": {"plain": model}} | change
        with pytest.raises(ValueError, match="is to be part of a folder's"):
            Study(tiny_study.settings(inputs, tmp_path / "study", **given)).check()
    assert not (tmp_path / "study").exists()


# ---------------------------------------------------------------- tokens


SECRETS = (TOKEN, KEY, PASSWORD)
ADDRESS = f"https://user:{PASSWORD}@example.com/v1"


def test_redacted():
    given = {
        "hub_token": "short", "api_key": "x", "OPENAI_API_KEY": "x", "password": "x", "token": "$HF_TOKEN", "eos_token": "</s>",
        "max_tokens": 3, "text": f"a {TOKEN} b {KEY}", "url": ADDRESS, "deep": [{"use_auth_token": "x", "n": (1, TOKEN)}],
        "hf_hub": "hf_transfer", "token ": True, "mail": "me@example.com",
    }  # fmt: skip
    assert redacted(given) == {
        "hub_token": "***", "api_key": "***", "OPENAI_API_KEY": "***", "password": "***", "token": "$HF_TOKEN",
        "eos_token": "</s>", "max_tokens": 3, "text": "a hf_*** b sk-***", "url": "https://***@example.com/v1",
        "deep": [{"use_auth_token": "***", "n": (1, "hf_***")}], "hf_hub": "hf_transfer", "token ": True,
        "mail": "me@example.com",
    }  # fmt: skip
    assert as_json(given) == json.loads(json.dumps(redacted(given)))


def leaks(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in SECRETS)]


@pytest.mark.parametrize(
    ("config_class", "trainer_class"), [(IFTConfig, IFTTrainer), (PlainSFTConfig, PlainSFTTrainer)]
)
def test_a_training_writes_no_secrets(config_class, trainer_class, model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "run" / "logs"))
    args = config_class(
        str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="tensorboard", max_steps=1, save_steps=1, hub_token=TOKEN,
        run_name=f"run {TOKEN}", model_init_kwargs={"token": TOKEN, "proxies": {"https": ADDRESS}, "dtype": "float32"},
    )  # fmt: skip
    trainer = trainer_class(model_dir, args, train_dataset=tiny.text_data())
    trainer.train()
    trainer.save_model()
    if trainer_class is IFTTrainer:
        trainer.create_model_card(dataset_name=f"{ADDRESS}/{TOKEN}")
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    assert leaks(tmp_path / "run") == []
    # What the training itself uses is whole
    assert args.hub_token == args.model_init_kwargs["token"] == TOKEN


def test_a_study_writes_no_secrets(inputs, tmp_path):
    secret = {"model_init_kwargs": {"token": TOKEN, "api_key": KEY, "proxies": {"https": ADDRESS}}}
    settings = tiny_study.settings(
        inputs, tmp_path / "study", methods={"dpo": secret}, training={"bf16": False, **secret}
    )
    study = Study(settings)
    cell = study.cells()[-1]
    _record_failure(study, cell, f"HTTPError: 401 {TOKEN} {ADDRESS}", f"Traceback {KEY}")
    write_file(cell_folder(study, cell) / "settings.json", json.dumps(as_json(study.settings)).encode())
    results = write_results(study)
    write_report(results, study.output_dir)
    assert {path.name for path in study.output_dir.iterdir()} >= {"results.json", "report.html", "report.md"}
    assert leaks(tmp_path / "study") == []
    # A token is no part of what a training depends on
    assert [c.key for c in Study(settings).cells()] == [c.key for c in study.cells()]


def test_secrets_of_a_study_belong_elsewhere(inputs, tmp_path):
    question = {"question_id": 1, "category": "math", "turns": ["a", "b"]}
    questions = tiny_study.write_rows(tmp_path / "questions.jsonl", [question])
    for change in (
        {"training": {"hub_token": TOKEN}},
        {"evaluation": {"judged": {"api_key": KEY, "questions": questions}}},
    ):
        with pytest.raises(ValueError, match="hub_token|api_key") as caught:
            Study(tiny_study.settings(inputs, tmp_path, **change)).check()
        assert not any(secret in str(caught.value) for secret in SECRETS)


def test_addresses_of_judges_hold_no_password():
    with pytest.raises(ValueError, match="without user, password") as caught:
        InferenceClientJudge("m", ADDRESS)
    assert PASSWORD not in str(caught.value)
    assert TOKEN not in repr(InferenceClientJudge("m", "http://localhost:1/v1", TOKEN))


@pytest.mark.parametrize("debug", ["0", "1"])
def test_messages_show_no_secrets(debug, capsys, monkeypatch):
    monkeypatch.setenv("TRL_IFT_DEBUG", debug)
    assert report_error("trl-ift", ValueError(f"{ADDRESS} said 401 to {TOKEN}, {KEY}")) == 1
    with pytest.raises(SystemExit):
        usage_error("trl-ift", f"unexpected argument '{TOKEN}'")
    with pytest.raises(FileNotFoundError) as caught:
        load_named(f"{ADDRESS}/rows.jsonl")
    printed = "".join(capsys.readouterr()) + str(caught.value)
    assert "401" in printed
    assert not any(secret in printed for secret in SECRETS)


def test_cards_show_no_secrets():
    card = build_model_card(
        model_name=f"m {TOKEN}", method="DPO", trainer_name="T", method_parameters={"key": KEY, "url": ADDRESS},
        training_parameters={"x": TOKEN}, versions=library_versions(), dataset_names=[ADDRESS],
    )  # fmt: skip
    assert not any(secret in str(card) for secret in SECRETS)


def test_selections_show_no_secrets(tmp_path):
    from trl_ift.data.scoring import Scorer
    from trl_ift.data.selection import write_selection

    tokenizer = tiny.tokenizer()
    rows = Scorer(tiny.model("llama", tokenizer), tokenizer)(tiny.text_data().to_list())
    scores = Dataset.from_list([{"index": index, **row} for index, row in enumerate(rows)])
    settings = {"dataset": f"{ADDRESS}/rows.jsonl", "token": TOKEN}
    write_selection(tmp_path / "out", tiny.text_data(), scores, selection="length", k=2, settings=settings)
    assert leaks(tmp_path / "out") == []


@pytest.mark.parametrize(
    "name",
    [
        "acme/hf_llama_chat_finetune_v1", "hf_raise_for_status_of_all", "sk-learn-embeddings-v2", "abfs://train@acct.host/x",
        "ssh://git@host/repository", "https://host/x?max_tokens=3", "http://localhost:1/v1/me@x",
    ],
)  # fmt: skip
def test_ordinary_names_stay(name):
    assert redacted(name) == name


@pytest.mark.parametrize("name", ["X-API-Key", "wandb_token", "refresh_token", "secret_access_key", "private_key"])
def test_names_of_secrets(name):
    assert redacted({name: "x"}) == {name: "***"}
    assert redacted({"pad_token": "x", "image_token": "x"}) == {"pad_token": "x", "image_token": "x"}


def test_secrets_of_addresses():
    assert redacted("https://user:pa@ss@host/x?token=abc&a=1") == "https://***@host/x?token=***&a=1"
