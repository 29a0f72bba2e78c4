"""Encoders without training, codes of datasets in shards, weighted pairs, and the command.

As a script, `test_weigh.py FOLDER MODEL_DIR` is one of two processes that tests launch. A fork of the first one is killed
(SIGKILL) when the second shard of codes is written but not yet in place.
"""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, load_dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from trl_ift.data import inference, shards
from trl_ift.data.generation import generate_completions
from trl_ift.data.pairs import build_pairs
from trl_ift.latent import encoders, weigh
from trl_ift.latent.encoders import (
    Encoder,
    PolicyHiddenState,
    Sample,
    SentenceEncoder,
    encode_tokens,
    token_ids,
    whole_token_ids,
)
from trl_ift.latent.weigh import (
    encode_dataset,
    load_codes,
    load_weighted_pairs,
    main,
    pair_distances,
    weigh_pairs,
)
from trl_ift.latent.weights import WeightNormalizer, effective_sample_size, latent_distance, rank_correlation
from trl_ift.scripts import tools


PAIRS = tiny.preference_data()
CHAT = tiny.conversational_preference_data()
# All questions with all answers, of many lengths
SAMPLES = [Sample(question, f" {answer}") for question, _ in tiny.QUESTIONS for _, answer in tiny.QUESTIONS][::3]
CHAT_SAMPLES = [
    Sample([{"role": "user", "content": s.prompt}], [{"role": "assistant", "content": s.completion}]) for s in SAMPLES
]


# That of the letters and of these few pairs
pytestmark = pytest.mark.filterwarnings(
    "ignore:The rank correlation of the weights", "ignore:The weights of all 8 pairs"
)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("TRL_IFT_DEBUG", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def llama(tokenizer):
    """A model that drops out in training. It is shared: encoders have to give it back as it was."""
    return tiny.model("llama", tokenizer, attention_dropout=0.5)


@pytest.fixture(scope="module")
def bert_tokenizer():
    """A tokenizer that puts special tokens around a text, without a chat template."""
    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[(name, made.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")],
    )
    made.chat_template = None
    return made


def bert_config(tokenizer, **options):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes | options)


@pytest.fixture(scope="module")
def bert(bert_tokenizer):
    torch.manual_seed(0)
    return BertModel(bert_config(bert_tokenizer)).eval()


@pytest.fixture
def sentence(bert, bert_tokenizer):
    """`SentenceEncoder` of the shared model."""
    return lambda **options: SentenceEncoder(bert, **{"processing_class": bert_tokenizer} | options)


@pytest.fixture
def policy(llama, tokenizer):
    """`PolicyHiddenState` of the shared model."""
    return lambda **options: PolicyHiddenState(llama, **{"processing_class": tokenizer} | options)


@pytest.fixture
def no_loading(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(inference, "create_model_from_path", load)


class Counting(Encoder):
    """An encoder of letters, which notes what it encodes. `slip` is added to each code, times its place in the batch."""

    latent_dim = 3

    def __init__(self, version=1, slip=0.0):
        self.version, self.slip, self.calls = version, slip, []

    def describe(self):
        return {"kind": "counting", "version": self.version, "letters": ("a", "e")}

    def encode(self, samples):
        texts = [encoders.text_of(sample.completion) for sample in samples]
        self.calls.append(texts)
        codes = [[self.version * len(text), text.count("a"), text.count("e")] for text in texts]
        return torch.tensor(codes, dtype=torch.float32) + self.slip * torch.arange(len(texts))[:, None]


def contents(folder):
    """The bytes of all files below a folder but the manifests."""
    folder = Path(folder)
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def texts(value):
    return value if isinstance(value, str) else value[0]["content"]


def assert_equal(found, expected):
    assert found.column_names == expected.column_names
    assert found.features == expected.features
    for column in expected.column_names:
        assert found[column][:] == expected[column][:]


# ---------------------------------------------------------------- encoders: the codes


@torch.no_grad()
def double_codes(model, sequences, pooling="mean"):
    """Codes in float64, one sample at a time, without padding."""
    model = copy.deepcopy(model).double().eval()
    body = model.base_model if hasattr(model, "lm_head") else model
    body = model.gpt_neox if hasattr(model, "gpt_neox") else body
    found = []
    for prompt, answer in sequences:
        hidden = body(input_ids=torch.tensor([prompt + answer])).last_hidden_state[0]
        found.append(hidden[0] if pooling == "cls" else hidden[len(prompt) :].mean(0))
    return torch.stack(found).numpy()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox"])
@pytest.mark.parametrize("samples", [SAMPLES, CHAT_SAMPLES], ids=["text", "chat"])
def test_policy_hidden_states(family, samples, tokenizer):
    model = tiny.model(family, tokenizer)
    encoder = PolicyHiddenState(model, processing_class=tokenizer, batch_tokens=200)
    codes = encoder.encode(samples)
    assert (codes.shape, codes.dtype) == ((len(samples), 16), torch.float32)
    assert (codes.device.type, codes.requires_grad, encoder.latent_dim) == ("cpu", False, 16)
    sequences = []
    for sample in samples:
        prompt, answer = sample.prompt, texts(sample.completion)
        if isinstance(prompt, str):
            prompt = tokenizer(prompt)["input_ids"]
        else:
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        sequences.append((prompt, tokenizer(answer)["input_ids"]))
    assert len({len(p) + len(a) for p, a in sequences}) > 10
    np.testing.assert_allclose(codes, double_codes(model, sequences), rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"pooling": "cls"}, {"with_prompt": True}], ids=str)
@pytest.mark.parametrize("samples", [SAMPLES, CHAT_SAMPLES], ids=["text", "chat"])
def test_sentence_encoder(options, samples, bert, bert_tokenizer, sentence):
    encoder = sentence(batch_tokens=100, **options)
    codes = encoder.encode(samples)
    assert (codes.shape, codes.dtype, codes.requires_grad) == ((len(samples), 16), torch.float32, False)
    start, end = (bert_tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))

    def ids(text):
        return bert_tokenizer(text, add_special_tokens=False)["input_ids"]

    sequences = []
    for sample in samples:
        prompt, answer = ids(texts(sample.prompt)), ids(texts(sample.completion))
        if "with_prompt" in options:
            sequences.append(([start, *prompt, end], answer))
        else:
            sequences.append(([], [start, *answer, end]))
    expected = double_codes(bert, sequences, options.get("pooling", "mean"))
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-5)
    assert np.abs(expected[:1] - expected[1:]).max(1).min() > 0.01 or "with_prompt" not in options


@pytest.mark.parametrize("kind", ["policy", "sentence"])
def test_batches_and_order_do_not_matter(kind, request):
    make = request.getfixturevalue(kind)
    whole = make().encode(SAMPLES)
    for batch_tokens in (1, 60, 10**6):
        np.testing.assert_allclose(make(batch_tokens=batch_tokens).encode(SAMPLES), whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(make().encode(SAMPLES[::-1]), whole.flip(0), rtol=0, atol=1e-6)
    assert make().encode([]).shape == (0, 16)


@pytest.mark.parametrize("kind", ["policy", "sentence"])
def test_equal_samples_have_exactly_equal_codes(kind, request):
    samples = [*SAMPLES, *SAMPLES[::-1]]
    codes = request.getfixturevalue(kind)(batch_tokens=60).encode(samples)
    assert torch.equal(codes, codes.flip(0))


def test_equal_samples_are_encoded_once_and_batches_keep_their_budget(llama, policy):
    shapes = []
    handle = llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        policy(batch_tokens=80).encode(SAMPLES * 2)
    finally:
        handle.remove()
    assert sum(rows for rows, _ in shapes) == len(SAMPLES)
    assert len(shapes) > 3
    assert all(rows * width <= 80 for rows, width in shapes)


def test_a_policy_reads_the_prompt_and_a_sentence_encoder_does_if_asked(policy, sentence):
    same_answer = [Sample("Name a colour.", " Blue."), Sample("Is water wet? Yes or no?", " Blue.")]
    for encoder, reads in ((policy(), True), (sentence(), False), (sentence(with_prompt=True), True)):
        first, second = encoder.encode(same_answer)
        assert torch.equal(first, second) != reads


def test_padding_that_attends_or_is_not_a_number_would_be_seen():
    """Masks, and what is behind them: garbage in padded places does not reach the mean."""
    mask = torch.tensor([[True, True, False], [False, True, True]])
    hidden = torch.tensor([[[1.0], [3.0], [float("nan")]], [[float("inf")], [5.0], [8.0]]], dtype=torch.bfloat16)
    found = encoders.masked_mean(hidden, mask)
    assert (found.dtype, found.tolist()) == (torch.float32, [[2.0], [6.5]])
    ids, is_token, is_answer = encoders.pad_tokens([([1, 2], [3]), ([], [4])], 9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert is_token.tolist() == [[True, True, True], [True, False, False]]
    assert is_answer.tolist() == [[False, False, True], [True, False, False]]


def test_encode_tokens_needs_answers():
    with pytest.raises(ValueError, match="Sample 1: its answer has no tokens"):
        encode_tokens([([1], [2]), ([1, 2], [])], None, 4, 100, None)


@pytest.mark.parametrize("kind", ["policy", "sentence"])
def test_empty_answers(kind, request):
    encoder = request.getfixturevalue(kind)()
    with pytest.raises(ValueError, match="Sample 2: its answer has no tokens"):
        encoder.encode([*SAMPLES[:2], Sample("a", "")])


def test_default_length_fits_the_context(tokenizer):
    """512, or what the model reads."""
    short = tiny.model("llama", tokenizer, max_position_embeddings=64)
    assert PolicyHiddenState(short, processing_class=tokenizer).max_length == 64
    long = tiny.model("llama", tokenizer, max_position_embeddings=1024)
    assert PolicyHiddenState(long, processing_class=tokenizer).max_length == 512


def test_lengths(policy, sentence, tokenizer, bert_tokenizer):
    long = Sample("one two three four five six", " seven eight nine ten eleven twelve")
    prompt, answer = whole_token_ids(long, tokenizer)
    assert token_ids(long, tokenizer, 9) == (prompt[-4:], answer[:5])
    assert policy(max_length=9)._tokens(long) == (prompt[-4:], answer[:5])
    assert sentence(max_length=9, with_prompt=True)._tokens(long)[1] == answer[:5]
    prompt, alone = sentence(max_length=9)._tokens(long)
    assert prompt == []
    assert alone == [*bert_tokenizer("")["input_ids"][:1], *answer[:7], *bert_tokenizer("")["input_ids"][1:]]
    cut = policy(max_length=9).encode([long])
    assert not torch.equal(cut, policy().encode([long]))


# ---------------------------------------------------------------- encoders: the model is given back


def state_of(model):
    modes = [module.training for module in model.modules()]
    return modes, [p.requires_grad for p in model.parameters()], dict(vars(model)), torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", ["policy", "sentence"])
def test_the_model_is_given_back(kind, request):
    """Also from training with dropout and mixed precision, and after an error."""
    encoder = request.getfixturevalue(kind)()
    model, expected = encoder.model, encoder.encode(SAMPLES)
    try:
        model.train()
        model.base_model.get_input_embeddings().eval()
        torch.manual_seed(5)
        before = state_of(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(encoder.encode(SAMPLES), expected)
            assert torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        assert state_of(model) == before
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoder, "_encode_batch", None)
            with pytest.raises(TypeError):
                encoder.encode(SAMPLES)
        assert state_of(model) == before
    finally:
        model.eval()


def test_no_graph_is_kept(llama, policy, monkeypatch):
    seen = []

    def mean(hidden, mask):
        seen.append(hidden.requires_grad)
        return encoders.torch.zeros(len(hidden), 16)

    monkeypatch.setattr(encoders, "masked_mean", mean)
    policy().encode(SAMPLES)
    assert set(seen) == {False}


def test_adapters(tokenizer, tmp_path):
    base = tiny.model("llama", tokenizer)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    encoder = PolicyHiddenState(tuned, processing_class=tokenizer)
    codes, described = encoder.encode(SAMPLES), encoder.describe()
    with tuned.disable_adapter():
        plain, plainly_described = encoder.encode(SAMPLES), encoder.describe()
    loaded = PolicyHiddenState(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    assert is_peft_model(loaded.model)
    assert torch.equal(loaded.encode(SAMPLES), codes)
    assert loaded.describe() == described
    without = PolicyHiddenState(str(tmp_path / "base"))
    assert torch.equal(without.encode(SAMPLES), plain)
    assert without.describe() == plainly_described != described
    assert (codes - plain).abs().max() > 1e-3
    prompted = get_peft_model(
        tiny.model("llama", tokenizer), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="prompt-learning PEFT"):
        PolicyHiddenState(prompted, processing_class=tokenizer)


# ---------------------------------------------------------------- encoders: loading, description, refusals


@pytest.fixture(scope="module")
def bert_dir(bert_tokenizer, tmp_path_factory):
    """Folder of a BERT for masked language modeling: without a pooler, as many encoders on the Hub."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("bert")
    BertForMaskedLM(bert_config(bert_tokenizer)).save_pretrained(folder)
    bert_tokenizer.save_pretrained(folder)
    return str(folder)


def test_encoders_by_name(model_dir, bert_dir, tokenizer, bert_tokenizer):
    given = PolicyHiddenState(AutoModelForCausalLM.from_pretrained(model_dir), processing_class=tokenizer)
    named = PolicyHiddenState(model_dir)
    assert torch.equal(named.encode(SAMPLES), given.encode(SAMPLES))
    assert named.describe() == given.describe()
    body = BertForMaskedLM.from_pretrained(bert_dir).bert
    for options in ({}, {"pooling": "cls"}):
        named = SentenceEncoder(bert_dir, **options)
        expected = SentenceEncoder(body, processing_class=bert_tokenizer, **options).encode(SAMPLES)
        np.testing.assert_allclose(named.encode(SAMPLES), expected, rtol=0, atol=1e-6)
    # A pooler that the checkpoint lacks is random each time
    assert SentenceEncoder(bert_dir).describe() == SentenceEncoder(bert_dir).describe()
    # A model with its head, and one with a decoder
    headed = SentenceEncoder(BertForMaskedLM.from_pretrained(bert_dir), processing_class=bert_tokenizer)
    assert torch.equal(headed.encode(SAMPLES), SentenceEncoder(bert_dir).encode(SAMPLES))


def test_encoder_of_an_encoder_decoder(bert_tokenizer, tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(bert_tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    bert_tokenizer.save_pretrained(tmp_path)
    expected = SentenceEncoder(model, processing_class=bert_tokenizer).encode(SAMPLES)
    assert torch.equal(SentenceEncoder(str(tmp_path)).encode(SAMPLES), expected)
    ids = torch.tensor([bert_tokenizer(SAMPLES[0].completion)["input_ids"]])
    with torch.no_grad():
        hidden = model.get_encoder()(input_ids=ids).last_hidden_state[0]
    np.testing.assert_allclose(expected[0], hidden.mean(0), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration, with an encoder and a decoder"):
        PolicyHiddenState(model, processing_class=bert_tokenizer)


@pytest.mark.parametrize("kind", ["policy", "sentence"])
def test_dtype(kind, model_dir, bert_dir):
    """The model runs in it, and pooling is in float32."""
    if kind == "policy":
        narrow = PolicyHiddenState(model_dir, model_init_kwargs={"dtype": "bfloat16"})
        wide = PolicyHiddenState(model_dir)
    else:
        narrow, wide = SentenceEncoder(bert_dir, dtype="bfloat16"), SentenceEncoder(bert_dir)
    assert (narrow.describe()["dtype"], wide.describe()["dtype"]) == ("bfloat16", "float32")
    codes, exact = narrow.encode(SAMPLES), wide.encode(SAMPLES)
    assert codes.dtype == torch.float32
    assert not torch.equal(codes, codes.bfloat16().float())
    assert 0 < (codes - exact).abs().max() < 0.1
    if kind == "sentence":
        first = SentenceEncoder(bert_dir, dtype="bfloat16", pooling="cls").encode(SAMPLES)
        assert torch.equal(first, first.bfloat16().float())


def test_descriptions(policy, sentence, bert, tokenizer):
    assert policy(batch_tokens=99).describe() == policy().describe()
    assert list(policy().describe()) == ["kind", "weights", "dtype", "tokenizer", "max_length"]
    other = tiny.tokenizer()
    other.chat_template = None
    descriptions = [
        policy().describe(),
        policy(max_length=100).describe(),
        policy(processing_class=other).describe(),
        PolicyHiddenState(tiny.model("llama", tokenizer, seed=1), processing_class=tokenizer).describe(),
        sentence().describe(),
        sentence(max_length=100).describe(),
        sentence(pooling="cls").describe(),
        sentence(with_prompt=True).describe(),
    ]
    as_text = [json.dumps(description) for description in descriptions]
    assert len(set(as_text)) == len(as_text)
    # That of now, not of when it was made
    encoder = sentence()
    before = encoder.describe()
    changed = copy.deepcopy(encoder)
    with torch.no_grad():
        changed.model.embeddings.word_embeddings.weight[0] += 1
    assert changed.describe() != before == encoder.describe()


def test_tokenizers_of_policies(policy, sentence, tokenizer, bert_tokenizer):
    policy().check_tokenizer(tokenizer)
    sentence().check_tokenizer(tokenizer)  # it goes with any
    with pytest.raises(ValueError, match=r"The encoder's tokenizer \(digest \w{16}\) is not that of the policy"):
        policy().check_tokenizer(bert_tokenizer)


def test_refusals(policy, sentence, llama, bert, tokenizer, bert_tokenizer, model_dir, tmp_path, no_loading):
    for make, error, expected in (
        (lambda: sentence(pooling="max"), ValueError, "`pooling='max'` is not known. Choose one of: 'mean', 'cls'"),
        (lambda: sentence(pooling="cls", with_prompt=True), ValueError, "the first token is one of prompt and answer"),
        (lambda: sentence(max_length=513), ValueError, "`max_length=513`, but the model reads 512 tokens at most"),
        (lambda: policy(max_length=513), ValueError, "`max_length=513`, but the model reads 512 tokens at most"),
        (lambda: policy(max_length=1), ValueError, "`max_length=1` is out of range"),
        (lambda: policy(max_length=1.5), TypeError, "`max_length` must be an integer"),
        (lambda: policy(batch_tokens=0), ValueError, "`batch_tokens=0` is out of range"),
        (lambda: sentence(dtype="bfloat16"), ValueError, "are for a model that is named by a string"),
        (lambda: policy(adapter="x"), ValueError, "are for a model that is named by a string"),
        (lambda: SentenceEncoder(bert), ValueError, "Pass the tokenizer as `processing_class`"),
        (lambda: SentenceEncoder(3), TypeError, "`model` is a int"),
        (lambda: SentenceEncoder(str(tmp_path)), ValueError, "has no `config.json`"),
        (lambda: PolicyHiddenState(model_dir, adapter=str(tmp_path)), ValueError, "has no `adapter_config.json`"),
    ):
        with pytest.raises(error, match=expected):
            make()


def test_other_tokenizer(bert_tokenizer):
    highest = max(max(bert_tokenizer(sample.completion)["input_ids"]) for sample in SAMPLES)
    small = BertModel(bert_config(bert_tokenizer, num_hidden_layers=1)).eval()
    small.resize_token_embeddings(highest + 1)
    SentenceEncoder(small, processing_class=bert_tokenizer).encode(SAMPLES)
    small.resize_token_embeddings(highest)
    with pytest.raises(ValueError, match=f"The token id {highest} occurs, and the model has {highest} tokens"):
        SentenceEncoder(small, processing_class=bert_tokenizer).encode(SAMPLES)


def test_pickles_are_not_loaded(bert, llama, bert_tokenizer, tmp_path):
    for model, load in ((bert, SentenceEncoder), (llama, PolicyHiddenState)):
        folder = tmp_path / load.__name__
        model.config.save_pretrained(folder)
        bert_tokenizer.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        config = json.loads((folder / "config.json").read_text()) | {"architectures": [type(model).__name__]}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(OSError, match="safetensors"):
            load(str(folder))


# ---------------------------------------------------------------- codes of a dataset


@pytest.mark.parametrize("data", [PAIRS, CHAT], ids=["text", "chat"])
def test_codes_of_a_dataset(data, policy, tmp_path):
    encoder = policy()
    samples = [Sample(row["prompt"], row["rejected"]) for row in data]
    expected = encoder.encode(samples).numpy()
    for folder, shard_size in ((tmp_path / "new" / "out", 3), (str(tmp_path / "one"), 1000), (None, 3)):
        found = encode_dataset(encoder, data, folder, column="rejected", shard_size=shard_size)
        assert (found.shape, found.dtype) == ((8, 16), np.float32)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    folder = tmp_path / "new" / "out"
    assert sorted(os.listdir(folder)) == [*(f"codes-0000{i}.parquet" for i in range(3)), "manifest.json"]
    manifest = shards.read_manifest(folder)
    assert manifest["format"] == "codes-1"
    settings = manifest["settings"]
    assert settings | {"dataset": None} == {
        **{f"encoder.{name}": value for name, value in encoder.describe().items()},
        "latent_dim": 16,
        "rows": 8,
        "dataset": None,
        "column": "rejected",
        "shard_size": 3,
    }
    loaded = load_dataset("parquet", data_files=f"{folder}/codes-*.parquet", split="train")
    np.testing.assert_array_equal(np.array(loaded["code"][:], dtype=np.float32), load_codes(folder))
    assert loaded["index"][:] == list(range(8))


def test_the_default_column_is_completion(tmp_path):
    encoder = Counting()
    encode_dataset(encoder, tiny.prompt_completion_data(), tmp_path / "out")
    assert encoder.calls == [[f" {answer}" for _, answer in tiny.QUESTIONS]]


def test_format_and_other_columns_do_not_matter(tmp_path):
    codes = encode_dataset(Counting(), PAIRS, tmp_path / "out", column="chosen")
    other = PAIRS.add_column("number", list(range(8))).with_format("torch")
    encoder = Counting()
    np.testing.assert_array_equal(encode_dataset(encoder, other, tmp_path / "out", column="chosen"), codes)
    assert encoder.calls == []


def test_lost_shards_are_encoded_anew(tmp_path):
    folder = tmp_path / "out"
    whole = encode_dataset(Counting(), PAIRS, folder, column="chosen", shard_size=3)
    files, kept = contents(folder), (folder / "codes-00000.parquet").stat().st_mtime_ns
    for lost, sizes in ((1, [3]), (2, [2])):
        (folder / f"codes-0000{lost}.parquet").unlink()
        with pytest.raises(ValueError, match=f"incomplete: `codes-0000{lost}.parquet` is missing"):
            load_codes(folder)
        encoder = Counting()
        np.testing.assert_array_equal(encode_dataset(encoder, PAIRS, folder, column="chosen", shard_size=3), whole)
        assert [len(call) for call in encoder.calls] == sizes
        assert contents(folder) == files
    assert (folder / "codes-00000.parquet").stat().st_mtime_ns == kept


def test_interruption(tmp_path, capsys):
    folder = tmp_path / "out"
    encoder = Counting()

    def interrupted(samples):
        if len(encoder.calls) == 2:
            raise KeyboardInterrupt
        return Counting.encode(encoder, samples)

    encoder.encode = interrupted
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(encoder, PAIRS, folder, column="chosen", shard_size=2)
    assert f"Interrupted. The shards that are finished are kept in {folder}" in capsys.readouterr().err
    assert sorted(contents(folder)) == ["codes-00000.parquet", "codes-00001.parquet"]
    encoder = Counting()
    encode_dataset(encoder, PAIRS, folder, column="chosen", shard_size=2)
    assert [len(call) for call in encoder.calls] == [2, 2]
    encode_dataset(Counting(), PAIRS, tmp_path / "whole", column="chosen", shard_size=2)
    assert contents(folder) == contents(tmp_path / "whole")


def test_progress_counts_rows(tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **options):
            self.options, self.updates = options, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, rows):
            self.updates.append(rows)

    monkeypatch.setattr(weigh, "tqdm", Bar)
    for _ in range(2):  # encoded, and only found
        encode_dataset(Counting(), PAIRS, tmp_path, column="chosen", shard_size=3)
    for bar in bars:
        assert bar.options == {"total": 8, "unit": "row", "desc": "Codes of chosen"}
        assert bar.updates == [3, 3, 2]


def _cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def _swap(path):
    path.write_bytes(path.with_name("codes-00000.parquet").read_bytes())


def _other_dimension(path):
    rows = pq.read_table(path)
    pq.write_table(rows.set_column(1, "code", pa.array([[1.0]] * len(rows), pa.list_(pa.float32(), 1))), path)


@pytest.mark.parametrize("damage", [_cut, _swap, _other_dimension])
def test_damaged_shards(damage, tmp_path):
    folder = tmp_path / "out"
    options = {"column": "chosen", "shard_size": 3}
    whole = encode_dataset(Counting(), PAIRS, folder, **options)
    path = folder / "codes-00001.parquet"
    damage(path)
    for load in (lambda: load_codes(folder), lambda: encode_dataset(Counting(), PAIRS, folder, **options)):
        with pytest.raises(ValueError, match=f"The shard `{path}` is damaged .*Delete it, and run"):
            load()
    path.unlink()
    np.testing.assert_array_equal(encode_dataset(Counting(), PAIRS, folder, **options), whole)


def test_flipped_bytes_are_found(tmp_path):
    whole = encode_dataset(Counting(), PAIRS, tmp_path, column="chosen")
    path = tmp_path / "codes-00000.parquet"
    data, metadata = path.read_bytes(), pq.read_metadata(path)
    starts = [metadata.row_group(0).column(i).data_page_offset for i in range(2)]
    ends = [*starts[1:], len(data) - 8 - metadata.serialized_size]

    def is_found(position):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        try:
            codes = load_codes(tmp_path)
        except ValueError:
            return True
        np.testing.assert_array_equal(codes, whole)
        return False

    assert sum(is_found(p) for start, end in zip(starts, ends, strict=True) for p in range(start, end)) > 100


def test_codes_of_something_else_are_refused(tmp_path, policy, sentence):
    folder = tmp_path / "out"
    encode_dataset(Counting(), PAIRS, folder, column="chosen", shard_size=4)
    wide = Counting()
    wide.latent_dim = 4
    changed = Dataset.from_list([*list(PAIRS)[:-1], {**PAIRS[7], "chosen": " In trees."}])
    before = contents(folder)
    for encoder, data, options, expected in (
        (Counting(version=2), PAIRS, {}, r"encoder.version=1 \(now 2\)"),
        (wide, PAIRS, {}, r"latent_dim=3 \(now 4\)"),
        (policy(), PAIRS, {}, r"encoder.kind='counting' \(now 'PolicyHiddenState'\)"),
        (Counting(), PAIRS, {"column": "rejected"}, r"column='chosen' \(now 'rejected'\)"),
        (Counting(), PAIRS, {"shard_size": 5}, r"shard_size=4 \(now 5\)"),
        (Counting(), PAIRS.select(range(7)), {}, r"rows=8 \(now 7\)"),
        (Counting(), changed, {}, r"dataset='\w{16}' \(now '\w{16}'\)"),
        (Counting(), PAIRS.select([1, 0, *range(2, 8)]), {}, r"dataset='\w{16}' \(now '\w{16}'\)"),
    ):
        with pytest.raises(ValueError, match=f"holds codes that were made with .*{expected}"):
            encode_dataset(encoder, data, folder, **{"column": "chosen", "shard_size": 4} | options)
        assert contents(folder) == before
    (tmp_path / "other").mkdir()
    PAIRS.to_parquet(tmp_path / "other" / "data.parquet")
    with pytest.raises(ValueError, match=r"holds data of other origin \(data.parquet; there is no manifest.json\)"):
        encode_dataset(Counting(), PAIRS, tmp_path / "other", column="chosen")
    with pytest.raises(ValueError, match="holds no codes"):
        load_codes(tmp_path / "other")


def test_of_two_jobs_that_start_at_once_the_first_manifest_counts(tmp_path, monkeypatch):
    write = shards.write_manifest

    def late(path, manifest, **options):
        write(path, manifest | {"settings": manifest["settings"] | {"shard_size": 999}})
        write(path, manifest, **options)

    monkeypatch.setattr(shards, "write_manifest", late)
    with pytest.raises(ValueError, match=r"shard_size=999 \(now 1000\)"):
        encode_dataset(Counting(), PAIRS, tmp_path, column="chosen")
    assert not list(tmp_path.glob("*.parquet"))


def test_other_versions_are_told(tmp_path):
    encode_dataset(Counting(), PAIRS, tmp_path / "out", column="chosen")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["versions"] = dict.fromkeys(manifest["versions"], "0.1")
    path.write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match=r"The first codes in .* were made with .* 0.1 \(now "):
        encode_dataset(Counting(), PAIRS, tmp_path / "out", column="chosen")


def test_bad_codes_are_not_written(tmp_path):
    encoder = Counting()
    encoder.encode = lambda samples: torch.full((len(samples), 3), float("nan"))
    with pytest.raises(ValueError, match="`dataset`, row 0: the code of 'chosen' is not finite"):
        encode_dataset(encoder, PAIRS, tmp_path, column="chosen")
    infinite = Counting()
    infinite.encode = lambda samples: Counting.encode(infinite, samples) / (1 - torch.tensor([[0.0], [1.0]]))
    with pytest.raises(ValueError, match="`dataset`, row 1: the code"):
        encode_dataset(infinite, PAIRS, tmp_path / "two", column="chosen", shard_size=2)
    narrow = Counting()
    narrow.latent_dim = 2
    with pytest.raises(ValueError, match=r"codes of shape \(8, 3\), expected \(8, 2\)"):
        encode_dataset(narrow, PAIRS, tmp_path / "three", column="chosen")
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("data", "error", "expected"),
    [
        ({"prompt": ["a", "b"], "chosen": ["c", ""]}, ValueError, "`dataset`, row 1: 'chosen' is empty"),
        ({"prompt": ["a"], "chosen": [" \n"]}, ValueError, "`dataset`, row 0: 'chosen' is empty"),
        (
            {"prompt": ["a", "b"], "chosen": ["c", None]},
            TypeError,
            "row 1: 'prompt' and 'chosen' must both be strings",
        ),
        ({"prompt": [None], "chosen": ["c"]}, TypeError, "they are None and 'c'"),
        ({"prompt": ["a"], "chosen": [[{"role": "assistant", "content": "c"}]]}, TypeError, "must both be strings"),
        ({"prompt": [[{"role": "user", "content": "a"}]], "chosen": ["c"]}, TypeError, "must both be strings"),
        ({"prompt": [[1]], "chosen": [[2]]}, TypeError, "must both be strings"),
        ({"prompt": [[]], "chosen": [[]]}, TypeError, "must both be strings"),
        (
            {"prompt": [[{"role": "user", "content": "a"}]], "chosen": [[{"role": "assistant", "content": None}]]},
            ValueError,
            "row 0: 'chosen' is empty",
        ),
        ({"chosen": ["c"]}, ValueError, "`dataset` lacks the column 'prompt'; its columns are .*trl.extract_prompt"),
        ({"prompt": ["a"], "rejected": ["c"]}, ValueError, "`dataset` lacks the column 'chosen'"),
        ({"prompt": [], "chosen": []}, ValueError, "`dataset` is empty"),
    ],
)
def test_bad_rows(data, error, expected, tmp_path):
    encoder = Counting()
    with pytest.raises(error, match=expected):
        encode_dataset(encoder, Dataset.from_dict(data), tmp_path, column="chosen")
    assert encoder.calls == []
    assert not any(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match="`dataset` is a IterableDataset; expected a `Dataset`"):
        encode_dataset(Counting(), PAIRS.to_iterable_dataset(), tmp_path)
    with pytest.raises(ValueError, match="`shard_size=0` is out of range"):
        encode_dataset(Counting(), PAIRS, tmp_path, column="chosen", shard_size=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="`output_dir='.*file/out'` cannot be made"):
        encode_dataset(Counting(), PAIRS, tmp_path / "file" / "out", column="chosen")


def test_an_error_of_the_encoder_names_the_rows(bert_tokenizer, sentence, tmp_path):
    rows = Dataset.from_list([{"prompt": "a", "completion": text} for text in ("b", "c", "d", "​")])
    small = BertModel(bert_config(bert_tokenizer))
    small.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="column 'completion', rows from 2: The token id [0-9]+ occurs"):
        encode_dataset(SentenceEncoder(small, processing_class=bert_tokenizer), rows, tmp_path, shard_size=2)


# ---------------------------------------------------------------- weighted pairs


@pytest.mark.parametrize("data", [PAIRS, CHAT], ids=["text", "chat"])
def test_weighted_pairs(data, policy, tmp_path):
    encoder = policy()
    codes = [
        encoder.encode([Sample(row["prompt"], row[name]) for row in data]).numpy() for name in ("chosen", "rejected")
    ]
    for options in (
        {},
        {"distance": "cosine", "weight_normalization": "sigmoid"},
        {"distance": "sq_l2", "weight_normalization": "max", "weight_clip": [0.1, 0.5]},
    ):
        in_memory = weigh_pairs(data, encoder, **options)
        assert in_memory.column_names == [*data.column_names, "latent_distance", "weight"]
        assert_equal(in_memory.select_columns(data.column_names), data)
        distances = latent_distance(*codes, options.get("distance", "l2"))
        normalization, clip = options.get("weight_normalization", "mean"), options.get("weight_clip")
        weights = WeightNormalizer.fit(distances, normalization, clip)(distances)
        np.testing.assert_allclose(in_memory["latent_distance"][:], distances, rtol=0, atol=3e-6)
        np.testing.assert_allclose(in_memory["weight"][:], weights, rtol=0, atol=1e-5)
        folder = tmp_path / "-".join(options) / "out"
        found = weigh_pairs(data, encoder, folder, **options)
        assert_equal(found, in_memory)
        assert_equal(load_weighted_pairs(folder), found)
        np.testing.assert_allclose(load_codes(folder / "codes" / "rejected"), codes[1], rtol=0, atol=1e-6)
        as_file = load_dataset("parquet", data_files=str(folder / "pairs.parquet"), split="train")
        assert_equal(as_file, found)
        manifest = shards.read_manifest(folder)
        assert (manifest["rows"], manifest["complete"]) == (8, True)
        assert manifest["settings"] | {"dataset": None} == {
            "distance": options.get("distance", "l2"),
            "weight_normalization": options.get("weight_normalization", "mean"),
            "weight_clip": options.get("weight_clip"),
            "rows": 8,
            "dataset": None,
            **{f"encoder.{name}": value for name, value in encoder.describe().items()},
        }
        summary = manifest["weight_summary"]
        assert summary["effective_sample_size"] == pytest.approx(effective_sample_size(found["weight"][:]))
        lengths = [abs(len(texts(row["chosen"])) - len(texts(row["rejected"]))) for row in data]
        assert summary["length_correlation"] == pytest.approx(rank_correlation(found["weight"][:], lengths))


def test_layout_does_not_matter(policy, sentence, tmp_path):
    for make in (policy, sentence):
        whole = weigh_pairs(PAIRS, make())
        for options in ({"batch_tokens": 30}, {"batch_tokens": 10**6}):
            found = weigh_pairs(PAIRS, make(**options), shard_size=3)
            np.testing.assert_allclose(found["weight"][:], whole["weight"][:], rtol=0, atol=1e-5)
        order = [3, 1, 7, 0, 2, 6, 5, 4]
        found = weigh_pairs(PAIRS.select(order), make())
        assert found["chosen"][:] == [PAIRS["chosen"][i] for i in order]
        np.testing.assert_allclose(found["weight"][:], np.array(whole["weight"][:])[order], rtol=0, atol=1e-5)
        swapped = PAIRS.rename_columns({"chosen": "rejected", "rejected": "chosen"})
        found = weigh_pairs(swapped, make())
        np.testing.assert_allclose(found["latent_distance"][:], whole["latent_distance"][:], rtol=0, atol=1e-5)


def test_equal_answers_have_distance_zero(policy, tmp_path):
    """Also where they are encoded in different batches, and rounded otherwise."""
    rows = list(PAIRS)
    for index in (1, 5):
        rows[index] = {**rows[index], "rejected": rows[index]["chosen"]}
    data = Dataset.from_list(rows)
    found = weigh_pairs(data, policy(batch_tokens=60), shard_size=3)
    assert [d == 0 for d in found["latent_distance"][:]] == [index in (1, 5) for index in range(8)]
    assert [w == 0 for w in found["weight"][:]] == [index in (1, 5) for index in range(8)]

    slipping = Counting(slip=1e-3)
    codes = [
        slipping.encode([Sample(row["prompt"], row[name]) for row in rows]).numpy() for name in ("chosen", "rejected")
    ]
    codes[0] += 1e-3
    assert (latent_distance(*codes) > 0).all()
    assert [d == 0 for d in pair_distances(data, *codes)] == [index in (1, 5) for index in range(8)]
    conversational = data.map(
        lambda row: {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")},
        remove_columns=["chosen", "rejected"],
    )
    assert [d == 0 for d in pair_distances(conversational, *codes)] == [index in (1, 5) for index in range(8)]
    with pytest.raises(ValueError, match="There are codes of 8 pairs, and 7 pairs"):
        pair_distances(data.select(range(7)), *codes)


def test_union_of_iterations(policy, tmp_path):
    """As a driver does it: real answers are encoded once, generated ones each time, weights are over the union."""
    encoder = policy()
    sft = PAIRS.rename_column("chosen", "completion")
    real = encode_dataset(encoder, sft, tmp_path / "real")
    parts = []
    for iteration, order in enumerate(([1, 2, 5], [0, 5, 7, 6])):  # prompts that are left of each iteration
        pairs = PAIRS.select(order)
        generated = encode_dataset(encoder, pairs, tmp_path / f"generated-{iteration}", column="rejected")
        parts.append(pairs.add_column("latent_distance", pair_distances(pairs, real[order], generated)))
    union = datasets.concatenate_datasets(parts)
    weighted = weigh_pairs(union, output_dir=tmp_path / "out")
    expected = weigh_pairs(PAIRS.select([1, 2, 5, 0, 5, 7, 6]), encoder)
    np.testing.assert_allclose(weighted["weight"][:], expected["weight"][:], rtol=0, atol=1e-5)
    assert np.mean(weighted["weight"][:]) == pytest.approx(1)
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "pairs.parquet"]


def test_weights_again_from_the_distances(tmp_path):
    first = weigh_pairs(PAIRS, Counting(), tmp_path / "first")
    again = weigh_pairs(first, output_dir=tmp_path / "again", weight_normalization="max", weight_clip=(0.2, 0.9))
    assert again.column_names == [*PAIRS.column_names, "latent_distance", "weight"]
    assert again["latent_distance"][:] == first["latent_distance"][:]
    distances = np.array(first["latent_distance"][:])
    np.testing.assert_allclose(again["weight"][:], np.clip(distances / distances.max(), 0.2, 0.9), rtol=1e-15)
    assert again["weight"][:] != first["weight"][:]
    settings = shards.read_manifest(tmp_path / "again")["settings"]
    assert (settings["distance"], settings["encoder.kind"]) == (None, None)
    assert_equal(
        weigh_pairs(first.remove_columns("weight"), weight_normalization="max", weight_clip=[0.2, 0.9]), again
    )
    # With an encoder, the distances are new too
    assert_equal(weigh_pairs(again, Counting(version=2)), weigh_pairs(PAIRS, Counting(version=2)))


def test_weights_of_another_origin_are_kept():
    data = PAIRS.add_column("weight", [1.0] * 8)
    for encoder in (Counting(), None):
        with pytest.raises(
            ValueError, match="has a column 'weight' and no 'latent_distance'" if encoder else "no column"
        ):
            weigh_pairs(data, encoder)


@pytest.mark.parametrize(
    ("value", "said"), [(float("nan"), "nan"), (-0.5, "-0.5"), (float("inf"), "inf"), (None, "nan")]
)
def test_bad_distances(value, said, tmp_path):
    data = PAIRS.add_column("latent_distance", [1.0, 2.0, 0.0, 1.0, 1.0, value, 3.0, 1.0])
    with pytest.raises(ValueError, match=f"Row 5: the latent distance is {said}, expected a finite number >= 0"):
        weigh_pairs(data, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_columns_are_kept(tmp_path):
    data = CHAT.add_column("prompt_ids", [[i, i + 1] for i in range(8)]).add_column("policy", [None] * 8)
    data = data.select([4, 2, 3, 6, 5])
    found = weigh_pairs(data, Counting(), tmp_path / "out")
    assert_equal(found.remove_columns(["latent_distance", "weight"]), data)
    assert found["prompt_ids"][:] == [[4, 5], [2, 3], [3, 4], [6, 7], [5, 6]]


def test_finished_folders_are_loaded(tmp_path):
    folder = tmp_path / "out"
    first = weigh_pairs(PAIRS, Counting(), folder, weight_clip=(0, 3))
    files = contents(folder)
    (folder / "codes" / "chosen" / "codes-00000.parquet").unlink()  # not even that is read
    encoder = Counting()
    assert_equal(weigh_pairs(PAIRS, encoder, folder, weight_clip=[0.0, 3.0], shard_size=3), first)
    assert_equal(weigh_pairs(first, encoder, str(folder), weight_clip=(0, 3), overwrite=True), first)
    assert encoder.calls == []
    assert contents(folder) | files == files


def test_other_settings_are_refused_before_the_encoder_is_loaded(tmp_path):
    folder = tmp_path / "out"
    weigh_pairs(PAIRS, Counting(), folder)
    before, manifest = contents(folder), (folder / "manifest.json").read_text()

    def load():
        raise AssertionError("the encoder was loaded")

    for data, encoder, options, expected in (
        (PAIRS, load, {"distance": "cosine"}, r"distance='l2' \(now 'cosine'\)"),
        (PAIRS, load, {"weight_normalization": "max"}, r"weight_normalization='mean' \(now 'max'\)"),
        (PAIRS, load, {"weight_clip": (0.1, 5)}, r"weight_clip=None \(now \[0.1, 5.0\]\)"),
        (PAIRS.select(range(7)), load, {}, r"rows=8 \(now 7\)"),
        (PAIRS.add_column("a", [0] * 8), load, {}, r"dataset='\w{16}' \(now '\w{16}'\)"),
        (PAIRS, Counting(version=2), {}, r"encoder.version=1 \(now 2\)"),
        (PAIRS.add_column("latent_distance", [1.0] * 8), None, {}, r"distance='l2' \(now None\)"),
    ):
        with pytest.raises(ValueError, match=f"holds weighted pairs that were made with .*{expected}.*overwrite=True"):
            weigh_pairs(data, encoder, folder, **options)
    assert (contents(folder), (folder / "manifest.json").read_text()) == (before, manifest)


def test_overwriting_uses_the_codes_again(tmp_path):
    folder = tmp_path / "out"
    weigh_pairs(PAIRS, Counting(), folder)
    codes = {name: data for name, data in contents(folder).items() if name.startswith("codes")}
    encoder = Counting()
    found = weigh_pairs(PAIRS, encoder, folder, distance="sq_l2", weight_normalization="max", overwrite=True)
    assert encoder.calls == []
    assert_equal(found, weigh_pairs(PAIRS, Counting(), distance="sq_l2", weight_normalization="max"))
    assert {name: data for name, data in contents(folder).items() if name.startswith("codes")} == codes
    assert shards.read_manifest(folder)["settings"]["distance"] == "sq_l2"
    with pytest.raises(
        ValueError, match=r"codes/chosen'` holds codes that were made with encoder.version=1 \(now 2\)"
    ):
        weigh_pairs(PAIRS, Counting(version=2), folder, overwrite=True)
    assert_equal(load_weighted_pairs(folder), found)
    with pytest.raises(ValueError, match="`overwrite=True` has no effect without `output_dir`"):
        weigh_pairs(PAIRS, Counting(), overwrite=True)


@pytest.mark.parametrize("broken", ["pairs.parquet", "manifest.json"])
def test_interrupted_writing(broken, tmp_path, monkeypatch):
    """The pairs of one setting are never taken for those of another."""
    folder = tmp_path / "out"
    weigh_pairs(PAIRS, Counting(), folder)
    write = shards.write_file
    written = []

    def interrupted(path, data, *args):
        written.extend([path.name] if path.parent == folder else [])
        if written[-1:] == [broken] and "pairs.parquet" in written:  # the manifest is written before them too
            raise KeyboardInterrupt
        write(path, data, *args)

    with monkeypatch.context() as patch:
        patch.setattr(weigh, "write_file", interrupted)
        patch.setattr(shards, "write_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            weigh_pairs(PAIRS, Counting(), folder, weight_normalization="max", overwrite=True)
    with pytest.raises(ValueError, match="holds no weighted pairs, or they are incomplete"):
        load_weighted_pairs(folder)
    # No `overwrite` is needed: there is no result that could be lost
    assert_equal(weigh_pairs(PAIRS, Counting(), folder), weigh_pairs(PAIRS, Counting()))


def test_folders_of_something_else(tmp_path):
    PAIRS.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="holds data of other origin"):
        weigh_pairs(PAIRS, Counting(), tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file. Name a folder"):
        weigh_pairs(PAIRS, Counting(), tmp_path / "data.parquet")
    encode_dataset(Counting(), PAIRS, tmp_path / "codes", column="chosen")
    with pytest.raises(ValueError, match="did not write for weighted pairs"):
        weigh_pairs(PAIRS, Counting(), tmp_path / "codes", overwrite=True)
    for folder in (tmp_path, tmp_path / "codes", tmp_path / "none"):
        with pytest.raises(ValueError, match="holds no weighted pairs"):
            load_weighted_pairs(folder)


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = weigh_pairs(PAIRS, Counting(), "~/out")
    assert_equal(load_weighted_pairs("~/out"), found)
    np.testing.assert_array_equal(load_codes("~/out/codes/chosen"), load_codes(tmp_path / "out" / "codes" / "chosen"))


def test_warnings(tmp_path):
    def weigh_distances(distances, folder=None, lengths=7, **options):
        rows = {name: ["a" * (1 + 3 * (i % lengths)) for i in range(len(distances))] for name in ("chosen", "prompt")}
        data = Dataset.from_dict({**rows, "rejected": ["b"] * len(distances), "latent_distance": distances})
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            weigh_pairs(data, output_dir=folder, **options)
        return [str(w.message) for w in found if "weights" in str(w.message)]

    few = [0.01] * 50 + [9.0] * 2
    for _ in range(2):  # also when the result is there
        (said,) = weigh_distances(few, tmp_path / "out")
        assert said.startswith("The weights are worth 2.1 equally weighted pairs of 52: ")
        assert "weight_clip" in said
        assert "cut" in said
    assert weigh_distances(few, weight_clip=(0.5, 5)) == []
    assert weigh_distances([0.01] * 50 + [9.0] * 6) == []  # 6.1 of 56
    lengths = [float(i % 7) for i in range(28)]
    (said,) = weigh_distances(lengths)
    assert said.startswith("The rank correlation of the weights with the difference in length is 1.00: ")
    (said,) = weigh_distances([6 - length for length in lengths])
    assert "is -1.00: " in said
    for swaps, rounded in (([(0, 3), (1, 4), (5, 7), (8, 9)], "0.72"), ([(0, 5), (1, 2)], None)):  # 0.721 and 0.685
        ranks = list(range(10, 20))
        for i, j in swaps:
            ranks[i], ranks[j] = ranks[j], ranks[i]
        said = weigh_distances([float(rank) for rank in ranks], lengths=10)
        assert [f"is {rounded}: " in text for text in said] == ([True] if rounded else [])
    (said,) = weigh_distances([0.0] * 5)
    assert said.startswith("The weights of all 5 pairs are 0")
    assert (
        json.loads((tmp_path / "out" / "manifest.json").read_text())["weight_summary"]["length_correlation"]
        is not None
    )
    assert weigh_distances([2.0] * 5, tmp_path / "equal") == []
    # NaN is no JSON
    assert "NaN" not in (tmp_path / "equal" / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"distance": "l1"}, ValueError, "`distance='l1'` is not known"),
        ({"weight_normalization": "median"}, ValueError, "`weight_normalization='median'` is not known"),
        ({"weight_clip": (5, 1)}, ValueError, r"`weight_clip\[1\]=1` is out of range"),
        ({"weight_clip": 3}, ValueError, "`weight_clip=3`: expected two numbers"),
        ({"shard_size": 1.5}, TypeError, "`shard_size` must be an integer"),
        ({"encoder": "all-MiniLM"}, TypeError, "`encoder` is a str; expected a `LatentGuide`"),
        ({"encoder": None}, ValueError, "`dataset` has no column 'latent_distance'.*Give an encoder"),
        ({"dataset": PAIRS.remove_columns("prompt")}, ValueError, "lacks the column 'prompt'.*trl.extract_prompt"),
        ({"dataset": PAIRS.select_columns("prompt")}, ValueError, "lacks the column 'chosen' and 'rejected'"),
        ({"dataset": PAIRS.to_iterable_dataset()}, TypeError, "is a IterableDataset"),
        ({"dataset": PAIRS.select([])}, ValueError, "is empty"),
        (
            {"dataset": Dataset.from_list([*PAIRS, {"prompt": "a", "chosen": "b", "rejected": ""}])},
            ValueError,
            "row 8: 'rejected' is empty",
        ),
    ],
)
def test_bad_input_before_the_encoder_is_loaded(options, error, expected, tmp_path):
    def load():
        raise AssertionError("the encoder was loaded")

    given = {"dataset": PAIRS, "encoder": load, "output_dir": tmp_path / "out"} | options
    with pytest.raises(error, match=expected):
        weigh_pairs(**given)
    assert not (tmp_path / "out").exists()


def test_options_of_an_encoder_without_one():
    data = PAIRS.add_column("latent_distance", [1.0] * 8)
    for options in ({"distance": "cosine"}, {"shard_size": 10}):
        (name,) = options
        with pytest.raises(ValueError, match=f"`{name}=.* has no effect without an encoder"):
            weigh_pairs(data, **options)


def test_function_that_loads_the_encoder(tmp_path):
    assert_equal(weigh_pairs(PAIRS, Counting, tmp_path / "out"), weigh_pairs(PAIRS, Counting()))


# ---------------------------------------------------------------- processes and kills


@pytest.fixture(scope="module")
def launched(model_dir, tmp_path_factory):
    """The folder that two processes have written to, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run([*command, str(folder), model_dir], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.slow
def test_two_processes(launched, model_dir, tmp_path):
    folder, said = launched
    one = weigh_pairs(CHAT, PolicyHiddenState(model_dir), tmp_path / "one", shard_size=2)
    for rank in (0, 1):
        report = json.loads((folder / f"process-{rank}.json").read_text())
        assert report["rows"] == report["in_memory"] == one[:]
        own = [f"codes-0000{shard}.parquet" for shard in (rank, rank + 2)]
        assert report["written"] == 2 * [*own, *own, *(["pairs.parquet"] if rank == 0 else [])]
    assert contents(folder / "out") == contents(tmp_path / "one")
    assert shards.read_manifest(folder / "out") == shards.read_manifest(tmp_path / "one")
    codes = {name: data for name, data in contents(tmp_path / "one").items() if name.startswith("codes")}
    assert contents(folder / "command").items() >= codes.items()
    assert said.count("Written to ") == 1


@pytest.mark.slow
def test_killed_and_restarted(launched, model_dir, tmp_path):
    """SIGKILL in the writing of a shard: the files are those of an uninterrupted run."""
    folder = launched[0] / "killed"
    assert json.loads((launched[0] / "process-0.json").read_text())["killed"] == -signal.SIGKILL
    codes = folder / "codes" / "chosen"
    (scratch,) = set(contents(folder)) - {"codes/chosen/codes-00000.parquet"}
    assert scratch.startswith("codes/chosen/.codes-00001.parquet.")
    time = (codes / "codes-00000.parquet").stat().st_mtime_ns
    went_on = weigh_pairs(CHAT, PolicyHiddenState(model_dir), folder, shard_size=2)
    whole = weigh_pairs(CHAT, PolicyHiddenState(model_dir), tmp_path / "whole", shard_size=2)
    assert_equal(went_on, whole)
    assert contents(folder) == contents(tmp_path / "whole")  # no scratch file is left
    assert (codes / "codes-00000.parquet").stat().st_mtime_ns == time


def script(folder, model_dir):
    torch.set_num_threads(1)
    rank, written = os.environ["RANK"], []
    report = {"killed": killed_fork(folder, model_dir) if rank == "0" else None, "written": written}
    encoder, write = PolicyHiddenState(model_dir), weigh.write_file

    def noted(path, data, *args):
        written.append(path.name)
        write(path, data, *args)

    weigh.write_file = noted
    report["rows"] = weigh_pairs(CHAT, encoder, f"{folder}/out", shard_size=2)[:]
    report["in_memory"] = weigh_pairs(CHAT, encoder, shard_size=2)[:]
    CHAT.to_json(f"{folder}/data-{rank}.jsonl")
    argv = ["--dataset_name", f"{folder}/data-{rank}.jsonl", "--output_dir", f"{folder}/command", "--shard_size", "2"]
    assert main([*argv, "--policy_hidden_state", model_dir, "--num_processes", "2"]) == 0
    Path(folder, f"process-{rank}.json").write_text(json.dumps(report))


def killed_fork(folder, model_dir):
    """How a run in a fork ended."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("codes-00001.parquet"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    shards.os.replace = killed
    try:
        weigh_pairs(CHAT, PolicyHiddenState(model_dir), f"{folder}/killed", shard_size=2)
    finally:
        os._exit(1)


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PAIRS.to_json("data.jsonl")
    return ["--dataset_name", "data.jsonl", "--output_dir", "out"]


def test_command(command, model_dir, capsys):
    assert main([*command, "--policy_hidden_state", model_dir]) == 0
    said = capsys.readouterr().out.splitlines()
    expected = weigh_pairs(PAIRS, PolicyHiddenState(model_dir))
    found = load_weighted_pairs("out")
    assert_equal(found, expected)
    weights, distances = np.array(found["weight"][:]), np.array(found["latent_distance"][:])
    size = effective_sample_size(weights)
    lengths = [abs(len(row["chosen"]) - len(row["rejected"])) for row in PAIRS]
    assert said[0] == (
        f"8 pairs. Weights: mean 1, standard deviation {weights.std():.4g}, from {weights.min():.4g} to {weights.max():.4g}, "
        f"median {np.median(weights):.4g}; 0.0% are 0."
    )
    assert said[1] == (
        f"Effective sample size {size:.1f} ({size / 8:.1%} of the pairs); rank correlation with the difference in length "
        f"{rank_correlation(weights, lengths):.2f}."
    )
    for line, what, row in ((2, "Nearest", distances.argmin()), (6, "Farthest", distances.argmax())):
        assert said[line] == f"{what} pair (row {row}, distance {distances[row]:.4g}, weight {weights[row]:.4g}):"
        assert said[line + 1] == f"  prompt    {PAIRS[int(row)]['prompt']}"
        assert said[line + 3] == f"  rejected  {PAIRS[int(row)]['rejected'].strip()}"
    assert said[10] == "Written to out. Train on them with `--dataset_name out/pairs.parquet`."
    assert main([*command, "--policy_hidden_state", model_dir]) == 0  # finished: only loaded
    assert capsys.readouterr().out.splitlines() == said


def test_nearest_pair_is_one_of_different_answers(command, capsys):
    data = PAIRS.add_column("latent_distance", [0.0, 3.0, 1.0, 2.0, 0.0, 4.0, 5.0, 6.0])
    data.to_json("data.jsonl")
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "25.0% are 0." in said
    assert "Nearest pair (row 2, distance 1, " in said
    data.map(lambda row: {"latent_distance": 0.0}).to_json("data.jsonl")
    assert main([*command, "--output_dir", "zeros"]) == 0
    assert "difference in length unknown." in capsys.readouterr().out


def test_options_of_the_command(command, model_dir, bert_dir, tokenizer, monkeypatch, capsys):
    torch.manual_seed(1)
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False}
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(**options)).save_pretrained("adapter")
    policy, sentence = ["--policy_hidden_state", model_dir], ["--sentence_encoder", bert_dir]
    for number, (argv, encoder, options) in enumerate(
        (
            (sentence, SentenceEncoder(bert_dir), {}),
            (
                [*sentence, "--pooling", "cls", "--dtype", "bfloat16", "--batch_tokens", "30", "--max_length", "9"],
                SentenceEncoder(bert_dir, pooling="cls", dtype="bfloat16", batch_tokens=30, max_length=9),
                {},
            ),
            ([*sentence, "--with_prompt"], SentenceEncoder(bert_dir, with_prompt=True), {}),
            (
                [*policy, "--adapter", "adapter", "--max_length", "30"],
                PolicyHiddenState(model_dir, adapter="adapter", max_length=30),
                {},
            ),
            (
                [*policy, "--dtype", "bfloat16", "--distance", "cosine", "--weight_normalization", "sigmoid"],
                PolicyHiddenState(model_dir, model_init_kwargs={"dtype": "bfloat16"}),
                {"distance": "cosine", "weight_normalization": "sigmoid"},
            ),
            (
                [*policy, "--weight_clip", "0.5", "1.5", "--shard_size", "3"],
                PolicyHiddenState(model_dir),
                {"weight_clip": (0.5, 1.5), "shard_size": 3},
            ),
        )
    ):
        assert main([*command, *argv, "--output_dir", f"out-{number}"]) == 0, capsys.readouterr().err
        assert_equal(load_weighted_pairs(f"out-{number}"), weigh_pairs(PAIRS, encoder, **options))
    assert len(list(Path("out-5/codes/chosen").glob("*.parquet"))) == 3
    # Again from the distances, with another normalisation; and there, but with that of before
    argv = ["--dataset_name", "out-5/pairs.parquet", "--output_dir", "again", "--weight_normalization", "max"]
    assert main(argv) == 0
    assert max(load_weighted_pairs("again")["weight"]) == 1
    assert main([*argv, "--weight_normalization", "mean"]) == 1
    assert "`overwrite=True` (`--overwrite`)" in capsys.readouterr().err
    assert main([*argv, "--weight_normalization", "mean", "--overwrite"]) == 0
    assert np.mean(load_weighted_pairs("again")["weight"][:]) == pytest.approx(1)


def test_command_with_a_guide(command, monkeypatch):
    """The guide itself has tests of its own."""
    from trl_ift.latent import guide

    loaded = []

    def load(source, **options):
        loaded.append((source, options))
        return Counting()

    monkeypatch.setattr(guide.LatentGuide, "from_pretrained", load)
    assert main([*command, "--guide", "folder"]) == 0
    argv = ["--guide", "~/folder", "--dtype", "bfloat16", "--batch_tokens", "99", "--output_dir", "two"]
    assert main([*command, *argv]) == 0
    assert loaded == [
        ("folder", {"device": None}),
        (os.path.expanduser("~/folder"), {"device": None, "dtype": "bfloat16", "batch_tokens": 99}),
    ]
    assert_equal(load_weighted_pairs("two"), weigh_pairs(PAIRS, Counting()))


def test_options_that_need_a_network_or_a_gpu(command, model_dir, bert_dir, monkeypatch):
    made = []

    def make(name, **options):
        made.append((name, options))
        return Counting()

    monkeypatch.setattr(weigh, "SentenceEncoder", make)
    monkeypatch.setattr(weigh, "PolicyHiddenState", make)
    for number, argv in enumerate(
        (
            ["--sentence_encoder", "org/a", "--trust_remote_code"],
            ["--sentence_encoder", "org/a"],
            ["--policy_hidden_state", "org/b", "--load_in_4bit", "--dtype", "float16", "--trust_remote_code"],
        )
    ):
        assert main([*command, *argv, "--output_dir", str(number)]) == 0
    config = made[2][1]["model_init_kwargs"].pop("quantization_config")
    assert config.load_in_4bit
    assert config.bnb_4bit_compute_dtype == torch.float16
    assert made == [
        ("org/a", {"model_init_kwargs": {"trust_remote_code": True}}),
        ("org/a", {"model_init_kwargs": {}}),
        ("org/b", {"model_init_kwargs": {"dtype": "float16", "trust_remote_code": True}}),
    ]


def test_4bit_without_bitsandbytes(command, monkeypatch, capsys):
    """It is said before anything is loaded, the pairs too."""
    monkeypatch.setattr("trl_ift.checks.find_spec", lambda name: None)
    argv = ["--policy_hidden_state", "org/b", "--load_in_4bit", "--dataset_name", "./none.jsonl"]
    assert main([*command, *argv]) == 1
    assert "bitsandbytes is not installed" in capsys.readouterr().err


def test_4bit_models(model_dir):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    encoder = PolicyHiddenState(model_dir, model_init_kwargs={"quantization_config": config})
    codes, exact = encoder.encode(SAMPLES), PolicyHiddenState(model_dir).encode(SAMPLES)
    assert 0 < (codes - exact).abs().max() < 2
    for module in encoder.model.modules():  # an instance can still be trained
        if hasattr(module, "support_avx512bf16_for_cpu"):
            assert not module.support_avx512bf16_for_cpu


def test_pairs_from_completions(command, model_dir, tokenizer, monkeypatch, capsys):
    sft = tiny.conversational_data()
    completions = generate_completions(model_dir, sft, "completions", max_new_tokens=6, score=False)
    sft.to_json("sft.jsonl")
    command = ["--dataset_name", "sft.jsonl", "--policy_hidden_state", model_dir, "--completions", "completions"]
    assert main([*command, "--output_dir", "out"]) == 0, capsys.readouterr().err
    pairs = build_pairs(sft, completions, processing_class=tokenizer)
    assert_equal(load_weighted_pairs("out"), weigh_pairs(pairs, PolicyHiddenState(model_dir)))
    assert main([*command, "--output_dir", "other", "--completions", "nowhere"]) == 1
    assert "`nowhere` holds no completions" in capsys.readouterr().err
    # The encoder must be of the tokenizer that generated them
    other = tokenizer.from_pretrained(model_dir)
    other.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tiny.model("llama", tokenizer).save_pretrained("foreign")
    other.save_pretrained("foreign")
    foreign = [*command[:2], "--policy_hidden_state", "foreign", *command[4:], "--output_dir", "other"]
    assert main(foreign) == 1
    assert "is not that of the policy" in capsys.readouterr().err
    assert main([*foreign, "--tokenizer", "foreign"]) == 1
    assert "Pass the tokenizer that generated them" in capsys.readouterr().err
    asked = []
    shutil.copytree(model_dir, "mine")
    monkeypatch.setattr("trl_ift.data.pairs.build_pairs", lambda *args, **options: asked.append(options) or pairs)
    assert main([*command, "--output_dir", "two"]) == 0
    assert main([*command, "--output_dir", "three", "--drop_truncated", "--tokenizer", "mine"]) == 0
    assert asked == [
        {"processing_class": model_dir, "drop_truncated": False},
        {"processing_class": "mine", "drop_truncated": True},
    ]


def test_file_of_options(command, model_dir):
    lines = {
        "dataset_name": "data.jsonl", "output_dir": "out", "policy_hidden_state": model_dir, "weight_clip": [0.5, 2],
        "shard_size": 3, "max_length": 30, "overwrite": False, "guide": None, "distance": "cosine",
    }  # fmt: skip
    Path("run.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))
    assert main(["--config", "run.yaml", "--distance", "sq_l2"]) == 0
    settings = shards.read_manifest("out")["settings"]
    assert (settings["weight_clip"], settings["encoder.max_length"], settings["distance"]) == ([0.5, 2.0], 30, "sq_l2")
    assert len(list(Path("out/codes/chosen").glob("*.parquet"))) == 3


def test_help_and_errors_of_the_command(command, model_dir, bert_dir, capsys, no_loading):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "--weight_normalization" in capsys.readouterr().out
    Path("typo.yaml").write_text("weight_clips: [1, 2]")
    for argv in (
        ["--dist", "l2"],
        ["--distance", "l1"],
        ["--weight_normalization", "median"],
        ["--shard_size", "many"],
        ["--dtype", "float8"],
        ["--pooling", "max"],
        ["--config", "typo.yaml"],
        ["--num_processes", "0"],
        ["stray"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, *argv])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("trl-ift weigh: error: ")
        assert error.count("\n") == 1
    for missing in (command[2:], command[:2]):
        with pytest.raises(SystemExit) as stop:
            main(missing)
        assert stop.value.code == 2
    capsys.readouterr()
    PAIRS.add_column("latent_distance", [1.0] * 8).to_json("distances.jsonl")
    policy, sentence = ["--policy_hidden_state", model_dir], ["--sentence_encoder", bert_dir]
    distances = ["--dataset_name", "distances.jsonl"]
    for argv, expected in (
        ([], "`dataset` has no column 'latent_distance'"),
        ([*policy, *sentence], "`--sentence_encoder` and `--policy_hidden_state` exclude each other"),
        ([*sentence, "--guide", "x"], "`--guide` and `--sentence_encoder` exclude each other"),
        ([*sentence, "--adapter", "x"], "`--adapter` has no effect with `--sentence_encoder`"),
        ([*sentence, "--load_in_4bit"], "`--load_in_4bit` has no effect with `--sentence_encoder`"),
        ([*policy, "--pooling", "cls"], "`--pooling` has no effect with `--policy_hidden_state`"),
        ([*policy, "--with_prompt"], "`--with_prompt` has no effect with `--policy_hidden_state`"),
        (["--guide", "x", "--max_length", "9"], "`--max_length` has no effect with `--guide`"),
        (["--guide", "x", "--trust_remote_code"], "`--trust_remote_code` has no effect with `--guide`"),
        ([*distances, "--dtype", "bfloat16"], "`--dtype` has no effect without an encoder"),
        ([*distances, "--batch_tokens", "0"], "`--batch_tokens` has no effect without an encoder"),
        ([*distances, "--distance", "cosine"], "`distance='cosine'` has no effect without an encoder"),
        ([*policy, "--tokenizer", "x"], "`--tokenizer` has no effect without `--completions`"),
        ([*policy, "--drop_truncated"], "`--drop_truncated` has no effect without `--completions`"),
        ([*policy, "--max_length", "0"], "`max_length=0` is out of range"),
        ([*policy, "--batch_tokens", "0"], "`batch_tokens=0` is out of range"),
        ([*policy, "--shard_size", "0"], "`shard_size=0` is out of range"),
        ([*policy, "--weight_clip", "1"], "`--weight_clip 1`: expected two numbers, as in `--weight_clip 0.1 5`"),
        ([*policy, "--weight_clip", "1", "2", "3"], "`--weight_clip 1 2 3`: expected two numbers"),
        ([*policy, "--weight_clip", "a", "2"], "`--weight_clip a 2`: expected two numbers"),
        ([*policy, "--weight_clip", "2", "1"], "`weight_clip[1]=1.0` is out of range"),
        ([*policy, "--weight_clip", "-1", "1"], "`weight_clip[0]=-1.0` is out of range"),
        (["--policy_hidden_state", "./none"], "none"),
        ([*policy, "--dataset_name", "./none.jsonl"], "does not exist"),
        ([*policy, "--dataset_split", "test"], "has no split 'test'"),
        ([*policy, "--output_dir", "data.jsonl"], "`output_dir='data.jsonl'` is a file"),
        ([*policy, "--config", "none.yaml"], "none.yaml"),
    ):
        assert main([*command, *argv]) == 1, argv
        error = capsys.readouterr().err
        message, hint = error.splitlines()
        assert message.startswith("trl-ift weigh: error: ")
        assert expected in message
        assert hint == "(TRL_IFT_DEBUG=1 shows the full traceback.)"
    assert not Path("out").exists()


def test_interrupted_command(command, model_dir, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    argv = [*command, "--policy_hidden_state", model_dir]
    with monkeypatch.context() as patch:
        patch.setattr(PolicyHiddenState, "encode", interrupt)
        assert main(argv) == 130
    assert "are kept in out/codes/chosen; to go on, run the same again" in capsys.readouterr().err
    assert main(argv) == 0


def test_processes_of_the_command(command, model_dir, monkeypatch):
    launched = []
    monkeypatch.setattr(tools, "launch", lambda *args: launched.append(args) or 3)
    argv = [*command, "--policy_hidden_state", model_dir, "--num_processes", "2"]
    assert main(argv) == 3
    assert launched == [(2, "trl_ift.latent.weigh", argv)]


if __name__ == "__main__":
    script(*sys.argv[1:])
