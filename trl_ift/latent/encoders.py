"""What turns an answer to a prompt into a code, a vector: the interface, and the encoders that need no training.

[`~trl_ift.latent.LatentGuide`] is the encoder of LD-Align, trained by reconstruction. `SentenceEncoder` and
`PolicyHiddenState` stand in for it without any training, and are what its worth is to be compared with (our choice).
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..checks import check_choice, check_range
from ..data.fingerprint import base_model, model_fingerprint
from ..data.inference import (
    LIKE,
    batches,
    check_model,
    check_runnable,
    load_model,
    load_tokenizer,
    own_device,
    tokenizer_digest,
)
from ..trl_internals import keep_4bit_trainable_on_cpu, tokenize


Text = str | list[dict[str, Any]]
Tokens = tuple[list[int], list[int]]  # of a prompt, and of the answer

POOLINGS = ("mean", "cls")


@dataclass(frozen=True)
class Sample:
    """An answer to a prompt; both strings, or both lists of messages."""

    prompt: Text
    completion: Text


class Encoder(ABC):
    """Codes of answers.

    Attributes:
        latent_dim: Dimension of the codes.
    """

    latent_dim: int

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that the codes depend on beside the samples, as JSON values: kind, digest of the weights, lengths, dtype."""

    @abstractmethod
    def encode(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Codes of samples, float32 on the CPU, (N, latent_dim), without a gradient. In evaluation mode: no dropout.

        Equal samples have exactly equal codes.

        Raises:
            ValueError: An answer has no tokens.
        """

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: B027
        """Raise `ValueError` if the encoder does not go with a policy of this tokenizer. Here: any does."""


def text_of(value: Text) -> str:
    """The text of an answer: a string as it is, messages by their contents."""
    if isinstance(value, str):
        return value
    return "\n".join(str(message.get("content") or "") for message in value)


def token_ids(sample: Sample, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokens:
    """Token ids of the prompt and of the answer, as `whole_token_ids`, at most `max_length`.

    A prompt keeps its last `max_length // 2` tokens, whatever the answer, and the answer as many of its first ones as are left
    (our choice).
    """
    return cut_tokens(whole_token_ids(sample, tokenizer), max_length)


def cut_tokens(tokens: Tokens, max_length: int) -> Tokens:
    """What `token_ids` keeps of all tokens of a sample."""
    prompt = tokens[0][-(max_length // 2) :]
    return prompt, tokens[1][: max_length - len(prompt)]


def whole_token_ids(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Token ids of the prompt and of the answer, the latter without an end-of-sequence token.

    Prompts of messages are rendered with the chat template, if the tokenizer has one, else joined. So an answer that was cut
    differs from a finished one by its text alone.
    """
    if isinstance(sample.prompt, str):
        prompt = list(tokenize(tokenizer, sample.prompt)["input_ids"])
    elif tokenizer.chat_template:
        prompt = list(tokenize(tokenizer, sample.prompt, add_generation_prompt=True)["input_ids"])
    else:
        prompt = list(tokenize(tokenizer, text_of(sample.prompt))["input_ids"])
    return prompt, list(tokenizer(text_of(sample.completion), add_special_tokens=False)["input_ids"])


# ---------------------------------------------------------------- running a model


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Run a model without dropout, gradients and mixed precision, and give it back as it was."""
    keep_4bit_trainable_on_cpu(model)
    modes = [(module, module.training) for module in model.modules()]
    device_type = next(model.parameters()).device.type
    with torch.no_grad(), torch.autocast(device_type, enabled=False):  # a trainer may have left it on
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def pad_tokens(sequences: Sequence[Tokens], pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids of prompts and answers, padded on the right, and masks of all tokens and of the answers', (B, T) each."""
    shape = (len(sequences), max(len(prompt) + len(answer) for prompt, answer in sequences))
    ids, is_token, is_answer = torch.full(shape, pad_id), torch.zeros(shape).bool(), torch.zeros(shape).bool()
    for row, (prompt, answer) in enumerate(sequences):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor(prompt + answer)
        is_token[row, :length] = True
        is_answer[row, len(prompt) : length] = True
    return ids, is_token, is_answer


def encode_tokens(
    sequences: Sequence[Tokens],
    encode_batch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    latent_dim: int,
    batch_tokens: int,
    pad_id: int | None,
) -> torch.Tensor:
    """Codes of tokenized answers, float32 on the CPU, (N, latent_dim), in their order. Equal ones are encoded once.

    Args:
        sequences: Token ids of prompt and answer of each.
        encode_batch: Gives the codes of a batch, float32, (B, latent_dim), from what `pad_tokens` gives.
        latent_dim: Dimension of the codes.
        batch_tokens: Most tokens of a batch, padding included. A longer sequence is a batch of its own.
        pad_id: Token id of the padding; `None` is 0.

    Raises:
        ValueError: An answer has no tokens (the message names its position).
    """
    for number, (_, answer) in enumerate(sequences):
        if not answer:
            raise ValueError(f"Sample {number}: its answer has no tokens, so there is nothing to encode. Drop it.")
    places: dict[tuple, int] = {}
    index = [places.setdefault((tuple(prompt), tuple(answer)), len(places)) for prompt, answer in sequences]
    distinct = [(list(prompt), list(answer)) for prompt, answer in places]
    codes = torch.empty(len(distinct), latent_dim)
    for batch in batches([len(prompt) + len(answer) for prompt, answer in distinct], batch_tokens, LIKE):
        codes[batch] = encode_batch(*pad_tokens([distinct[i] for i in batch], pad_id or 0)).cpu()
    return codes[index]


def masked_mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean in float32 of hidden states, (B, T, H), where the mask is true, (B, T); (B, H)."""
    mask = mask.to(hidden.device)
    return hidden.float().masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)


# ---------------------------------------------------------------- encoders that need no training


class _PooledHiddenState(Encoder):
    """Codes that are last hidden states of a transformer, pooled. What is read, and how it is pooled, is the subclass's."""

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
        max_length: int | None,
        batch_tokens: int,
        adapter: str | None,
        init_kwargs: dict[str, Any],
        architecture: Any = None,
    ):
        if max_length is not None:
            check_range("max_length", max_length, 2, integer=True)
        check_range("batch_tokens", batch_tokens, 1, integer=True)
        check_model(model, processing_class, adapter, init_kwargs)
        self.tokenizer = load_tokenizer(model, processing_class, init_kwargs)
        if isinstance(model, str):
            device = own_device(int(os.environ.get("WORLD_SIZE", 1)))
            options = {"use_safetensors": True, "architecture": architecture}
            model = load_model(model, adapter, options | init_kwargs, device)
            if hasattr(base_model(model).base_model, "pooler"):
                # It is not used, and random in many checkpoints: with it, the weights would be others each time
                base_model(model).base_model.pooler = torch.nn.Identity()
        check_runnable(model)
        self.model = model
        config = base_model(model).config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or -1
        if max_length is None:
            max_length = min(positions, 512) if positions > 0 else 512
        if 0 < positions < max_length:
            raise ValueError(f"`max_length={max_length}`, but the model reads {positions} tokens at most. Lower it.")
        self.latent_dim = config.hidden_size
        self.max_length = max_length
        self.batch_tokens = batch_tokens

    def describe(self) -> dict[str, Any]:
        return {
            "kind": type(self).__name__,
            "weights": model_fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "max_length": self.max_length,
        }

    def encode(self, samples: Sequence[Sample]) -> torch.Tensor:
        sequences = [self._tokens(sample) for sample in samples]
        vocabulary = self.model.get_input_embeddings().num_embeddings
        highest = max((token for tokens in sequences for ids in tokens for token in ids), default=0)
        if highest >= vocabulary:
            raise ValueError(
                f"The token id {highest} occurs, and the model has {vocabulary} tokens: the tokenizer is another model's. Pass "
                "the right one as `processing_class`."
            )
        with evaluating(self.model):
            return encode_tokens(
                sequences, self._encode_batch, self.latent_dim, self.batch_tokens, self.tokenizer.pad_token_id
            )

    @abstractmethod
    def _tokens(self, sample: Sample) -> Tokens:
        """Token ids that are read: of the prompt, if it is, and of the answer."""

    @abstractmethod
    def _encode_batch(self, ids: torch.Tensor, is_token: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
        """Codes of a batch; see `encode_tokens`."""


class SentenceEncoder(_PooledHiddenState):
    """
    Codes of any encoder of Hugging Face transformers, without training: its last hidden states, pooled.

    It reads the answer alone, with the special tokens that its tokenizer adds, and takes the mean over all of these, as
    Sentence Transformers do (their normalisation to length 1 is left out; `distance="cosine"` makes up for it). With the
    prompt, its tokens come first and the mean is over those of the answer. Which is better is not known; the default is our
    choice.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Hub id, folder or instance of an encoder, e.g. `"sentence-transformers/all-MiniLM-L6-v2"`. An instance is used
            where it is, and is given back as it was.
        pooling (`str`, *optional*, defaults to `"mean"`):
            `"mean"` of the tokens, or `"cls"`, the first one.
        with_prompt (`bool`, *optional*, defaults to `False`):
            Whether the prompt is read too; not with `pooling="cls"`, of a token that belongs to the prompt as well.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; the model's by default.
        max_length (`int`, *optional*):
            Most tokens, 512 by default, or the model's context if that is shorter; of longer answers the first ones are read
            (see `token_ids` for prompts).
        batch_tokens (`int`, *optional*, defaults to `8192`):
            Most tokens of a batch, padding included; bounds the memory.
        dtype (`str`, *optional*):
            Dtype of a model that is named by a string, `"float32"` by default. Pooling is in float32 in any case.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for a model that is named by a string.

    Raises:
        ValueError, TypeError, OSError: Something in the arguments is wrong, or the model cannot be loaded.

    Example:

    ```python
    from trl_ift.latent import Sample, SentenceEncoder

    encoder = SentenceEncoder("sentence-transformers/all-MiniLM-L6-v2")
    encoder.encode([Sample("2 + 2 =", " 4"), Sample("2 + 2 =", " four")])  # (2, 384)
    ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        *,
        pooling: str = "mean",
        with_prompt: bool = False,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        dtype: str | torch.dtype | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ):
        check_choice("pooling", pooling, POOLINGS)
        if with_prompt and pooling == "cls":
            raise ValueError(
                "`pooling='cls'` with `with_prompt=True`: the first token is one of prompt and answer together, and long "
                "prompts lose it. Use `pooling='mean'`, or leave the prompt out."
            )
        self.pooling, self.with_prompt = pooling, with_prompt
        init_kwargs = dict(model_init_kwargs or {}) | ({} if dtype is None else {"dtype": dtype})
        super().__init__(model, processing_class, max_length, batch_tokens, None, init_kwargs, AutoModel)
        body = base_model(self.model)
        self._body = body.get_encoder() if body.config.is_encoder_decoder else body.base_model

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"pooling": self.pooling, "with_prompt": self.with_prompt}

    def _tokens(self, sample: Sample) -> Tokens:
        if self.with_prompt:
            return token_ids(sample, self.tokenizer, self.max_length)
        found = self.tokenizer(
            text_of(sample.completion),
            truncation=True,
            max_length=self.max_length,
            return_special_tokens_mask=True,
        )
        return [], [] if all(found["special_tokens_mask"]) else list(found["input_ids"])

    def _encode_batch(self, ids: torch.Tensor, is_token: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
        device = self.model.device
        hidden = self._body(input_ids=ids.to(device), attention_mask=is_token.long().to(device)).last_hidden_state
        return hidden[:, 0].float() if self.pooling == "cls" else masked_mean(hidden, is_answer)


class PolicyHiddenState(_PooledHiddenState):
    """
    Codes of a causal language model, without training: the mean of its last hidden states over the tokens of the answer.

    The model reads the prompt, rendered with its chat template, and then the answer; its head is not run.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Hub id, folder or instance, e.g. the model that the pairs are for. An instance is used where it is, with its active
            adapter, and is given back as it was.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer; the model's by default.
        max_length (`int`, *optional*):
            Most tokens of prompt and answer, 512 by default, or the model's context if that is shorter; see `token_ids`.
        batch_tokens (`int`, *optional*, defaults to `8192`):
            Most tokens of a batch, padding included; bounds the memory.
        adapter (`str`, *optional*):
            Folder or Hub id of a PEFT adapter, loaded on a model that is named by a string.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for a model that is named by a string, e.g. `{"dtype": "bfloat16"}`. As in TRL,
            `dtype` defaults to `"float32"`.

    Raises:
        ValueError, TypeError, OSError: Something in the arguments is wrong, or the model cannot be loaded.

    Example:

    ```python
    from trl_ift.latent import PolicyHiddenState, Sample

    encoder = PolicyHiddenState("HuggingFaceTB/SmolLM2-135M-Instruct")
    encoder.encode([Sample("2 + 2 =", " 4"), Sample("2 + 2 =", " four")])  # (2, 576)
    ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        *,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        adapter: str | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ):
        init_kwargs = dict(model_init_kwargs or {})
        super().__init__(model, processing_class, max_length, batch_tokens, adapter, init_kwargs)
        body = base_model(self.model)
        if body.config.is_encoder_decoder:
            raise ValueError(
                f"The model is a {type(body).__name__}, with an encoder and a decoder. Expected a causal language model; its "
                "encoder can be used by `SentenceEncoder`."
            )
        self._body = body.base_model

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if `tokenizer`, of a policy, gives other tokens than the encoder's, or another chat template."""
        own, other = tokenizer_digest(self.tokenizer), tokenizer_digest(tokenizer)
        if own != other:
            raise ValueError(
                f"The encoder's tokenizer (digest {own}) is not that of the policy ({other}): vocabulary, special tokens or "
                "chat template differ. Use a `PolicyHiddenState` of the policy, or an encoder that goes with any."
            )

    def _tokens(self, sample: Sample) -> Tokens:
        return token_ids(sample, self.tokenizer, self.max_length)

    def _encode_batch(self, ids: torch.Tensor, is_token: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
        # No attention mask: causal models do not see the padding on the right, and are faster without
        hidden = self._body(input_ids=ids.to(self.model.device), use_cache=False).last_hidden_state
        return masked_mean(hidden, is_answer)
