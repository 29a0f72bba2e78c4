r"""The guiding model of LD-Align: an encoder of answers to prompts into codes, trained by rebuilding the answers from them.

For an answer y to a prompt x, with code z = mu(x, y) of the encoder E and a decoder D,

    L = mean over answers of   - (1/|y|) sum_t log D( y_t | x, y_<t, z )   [ + kl_weight * KL( q(z|x,y) || N(0, I) ) ]

That distances are taken in a latent space that is learnt by reconstructing samples is the idea of LD-Align
(https://huggingface.co/papers/2404.06390). The architecture is our choice: E is a pretrained transformer, whose last hidden
states are averaged over the answer, normalised and projected; D is a causal language model that sees z as a few embeddings in
front of its tokens; z is not sampled unless `variational`.

[`LatentGuide`] is what the weights of pairs need of it; `trl-ift guide` ([`~trl_ift.latent.train_guide`]) trains it.
"""

import copy
import json
import os
import random
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ModelOutput

from ..checks import check_choice, check_range
from ..data.fingerprint import model_fingerprint
from ..data.inference import LIKE, batches, tokenizer_digest
from ..trl_internals import add_fused_lm_head, score_labelled_positions_only
from .encoders import Encoder, Sample, encode_tokens, evaluating, masked_mean, pad_tokens, token_ids


RECONSTRUCT = ("completion", "full")
ENCODER_TOKENIZER = "encoder_tokenizer"
RESULT_FILE = "guide.json"  # what training writes last


class GuideConfig(PreTrainedConfig):
    """
    Configuration of a [`GuideModel`].

    Args:
        encoder ([`~transformers.PreTrainedConfig`] or `dict`):
            Config of the encoder, a model that [`~transformers.AutoModel`] builds.
        decoder ([`~transformers.PreTrainedConfig`] or `dict`):
            Config of the decoder, a model that [`~transformers.AutoModelForCausalLM`] builds.
        latent_dim (`int`, *optional*, defaults to `128`):
            Dimension of the codes.
        memory_tokens (`int`, *optional*, defaults to `8`):
            Number of embeddings in front of the decoder's tokens that are made from the code.
        variational (`bool`, *optional*, defaults to `False`):
            Whether the encoder gives the mean and the log-variance of a normal distribution, from which codes are sampled
            in training. Distances are always those of means.
        max_length (`int`, *optional*, defaults to `512`):
            Most tokens of prompt and answer together; see [`~trl_ift.latent.encoders.token_ids`].
        tokenizer_name, tokenizer_digest (`str`, *optional*):
            Name and 16-digit digest of the tokenizer of the decoder.
        encoder_tokenizer_name, encoder_tokenizer_digest (`str`, *optional*):
            The same of the encoder's; `None` if it is that of the decoder.
    """

    model_type = "trl_ift_guide"
    sub_configs = {"encoder": AutoConfig, "decoder": AutoConfig}  # noqa: RUF012

    encoder: Any = None
    decoder: Any = None
    latent_dim: int = 128
    memory_tokens: int = 8
    variational: bool = False
    max_length: int = 512
    tokenizer_name: str | None = None
    tokenizer_digest: str | None = None
    encoder_tokenizer_name: str | None = None
    encoder_tokenizer_digest: str | None = None

    def __post_init__(self, **kwargs):
        for name in ("latent_dim", "memory_tokens"):
            check_range(name, getattr(self, name), 1, integer=True)
        check_range("max_length", self.max_length, 2, integer=True)  # a token of the prompt and one of the answer
        for name in ("encoder", "decoder"):
            if isinstance(config := getattr(self, name), dict):
                setattr(self, name, AutoConfig.for_model(**config))
        super().__post_init__(**kwargs)


AutoConfig.register(GuideConfig.model_type, GuideConfig, exist_ok=True)  # for the loaders of tokenizers


@dataclass
class GuideOutput(ModelOutput):
    """
    Output of a [`GuideModel`].

    Args:
        nll (`torch.FloatTensor` of shape `(B,)`):
            Negative log-likelihood of each sample, mean over its scored tokens, in nats.
        mean (`torch.FloatTensor` of shape `(B, latent_dim)`):
            Codes.
        log_var (`torch.FloatTensor` of shape `(B, latent_dim)`, *optional*):
            Log-variances of the codes, if the guide is variational.
    """

    nll: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    log_var: torch.Tensor | None = None


# ---------------------------------------------------------------- functions on tensors


def gaussian_kl(mean: torch.Tensor, log_var: torch.Tensor, free_bits: float = 0.0) -> torch.Tensor:
    r"""KL( N(mean, exp(log_var)) || N(0, I) ) = 1/2 sum_d ( exp(log_var_d) + mean_d^2 - 1 - log_var_d ), in nats, (B,).

    Args:
        mean: Means, (B, D).
        log_var: Log-variances, (B, D).
        free_bits: Nats below which the divergence of a dimension counts as this much, without gradient.
    """
    divergence = 0.5 * (log_var.exp() + mean.square() - 1 - log_var)
    if free_bits > 0:  # of each sample, not of a batch, so that accumulating gradients changes nothing
        divergence = divergence.clamp(min=free_bits)
    return divergence.sum(-1)


def apply_word_dropout(
    input_ids: torch.Tensor, candidates: torch.Tensor, rate: float, replacement: int
) -> torch.Tensor:
    """Token ids with a random share of the candidates replaced; draws from torch's random state.

    Args:
        input_ids: Token ids, (B, T).
        candidates: Which may be replaced, bool, (B, T).
        rate: Probability of each, in [0, 1].
        replacement: Token id that takes their place.
    """
    dropped = candidates & (torch.rand(input_ids.shape, device=input_ids.device) < rate)
    return input_ids.masked_fill(dropped, replacement)


# ---------------------------------------------------------------- the model


class LatentHead(nn.Module):
    """Hidden states of an answer to its code, in float32: masked mean, LayerNorm, projection(s)."""

    def __init__(self, hidden_size: int, latent_dim: int, variational: bool):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.mean = nn.Linear(hidden_size, latent_dim)
        self.log_var = nn.Linear(hidden_size, latent_dim) if variational else None

    def reset_parameters(self) -> None:
        """Codes of unit variance, and, if variational, of the prior's standard deviation around their mean."""
        self.norm.reset_parameters()
        nn.init.normal_(self.mean.weight, std=self.mean.in_features**-0.5)
        nn.init.zeros_(self.mean.bias)
        if self.log_var is not None:
            nn.init.zeros_(self.log_var.weight)
            nn.init.zeros_(self.log_var.bias)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and log-variance, (B, D), of hidden states, (B, T, H), over the positions of a mask, (B, T)."""
        with torch.autocast(hidden.device.type, enabled=False):
            features = self.norm(masked_mean(hidden, mask))
            return self.mean(features), None if self.log_var is None else self.log_var(features)


class GuideEncoder(PreTrainedModel):
    """The half of a guide that makes codes. Loads from the folder of a whole [`GuideModel`]; its head stays in float32.

    Attributes:
        encoder: The backbone.
        latent_head: [`LatentHead`] on its last hidden states.
    """

    config_class = GuideConfig
    base_model_prefix = "guide"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _keep_in_fp32_modules_strict = ("latent_head", "memory_projection")
    _keys_to_ignore_on_load_unexpected: tuple[str, ...] = (r"^decoder\.", r"^memory_projection\.")

    def __init__(self, config: GuideConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder) if encoder is None else encoder
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler = None  # BERT's, for the first token: not used
        self.encoder.config.use_cache = False
        hidden_size = config.encoder.get_text_config().hidden_size
        self.latent_head = LatentHead(hidden_size, config.latent_dim, config.variational)
        if type(self) is GuideEncoder:
            self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, from safetensors only."""
        return super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pooling_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Means and log-variances (`None` unless variational) of codes, float32, (B, latent_dim).

        Args:
            input_ids: Token ids of the encoder, (B, T).
            attention_mask: Which of them are no padding, (B, T).
            pooling_mask: Which are those of the answer, (B, T); at least one in each row.
        """
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state
        return self.latent_head(hidden, pooling_mask)

    def encode_samples(
        self, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, batch_tokens: int
    ) -> torch.Tensor:
        """Means of the codes of samples, float32 on the CPU, (N, latent_dim); the model is given back as it was.

        Raises:
            ValueError: An answer has no tokens.
        """
        sequences = [token_ids(sample, tokenizer, self.config.max_length) for sample in samples]

        def encode_batch(*padded: torch.Tensor) -> torch.Tensor:
            return self.encode(*(tensor.to(self.device) for tensor in padded))[0]

        with evaluating(self):
            return encode_tokens(sequences, encode_batch, self.config.latent_dim, batch_tokens, tokenizer.pad_token_id)


class GuideModel(GuideEncoder):
    """
    Encoder of answers into codes, and decoder that rebuilds them.

    Make one of pretrained models with [`GuideModel.of`], and load a trained one with [`GuideModel.from_pretrained`].

    Attributes:
        decoder: The causal language model.
        memory_projection: Linear map of a code to the embeddings in front of the decoder's tokens.
    """

    _keys_to_ignore_on_load_unexpected = ()

    def __init__(
        self, config: GuideConfig, encoder: PreTrainedModel | None = None, decoder: PreTrainedModel | None = None
    ):
        super().__init__(config, encoder)
        self.decoder = AutoModelForCausalLM.from_config(config.decoder) if decoder is None else decoder
        width = self.decoder.get_input_embeddings().embedding_dim
        self.memory_projection = nn.Linear(config.latent_dim, config.memory_tokens * width)
        add_fused_lm_head(self.decoder)
        score_labelled_positions_only(self.decoder)
        self.post_init()

    @classmethod
    def of(cls, encoder: PreTrainedModel, decoder: PreTrainedModel, **options: Any) -> "GuideModel":
        """Make an untrained guide of pretrained models.

        Args:
            encoder: Backbone, or a model with a head, which is left out. If it shares weights with the decoder it is copied.
            decoder: Causal language model.
            options: Those of [`GuideConfig`].
        """
        encoder = encoder.base_model
        shared = {id(parameter) for parameter in decoder.parameters()}
        if any(id(parameter) in shared for parameter in encoder.parameters()):
            encoder = copy.deepcopy(encoder)
        # Copies: transformers resets the attention implementation of the parts of a config that it is given
        config = GuideConfig(encoder=encoder.config.to_dict(), decoder=decoder.config.to_dict(), **options)
        model = cls(config, encoder, decoder)
        model.latent_head.reset_parameters()
        # Memory embeddings as large as those of tokens, where codes have unit variance (our choice)
        nn.init.normal_(model.memory_projection.weight, std=embedding_rms(decoder) * config.latent_dim**-0.5)
        nn.init.zeros_(model.memory_projection.bias)
        return model

    def decode(self, codes: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of each sample given its code, mean over its labelled tokens, float32, (B,).

        Args:
            codes: Codes, (B, latent_dim).
            input_ids: Token ids of the decoder, padded on the right, (B, T).
            labels: The tokens to predict at their own positions, -100 elsewhere, (B, T). The first one is predicted from the
                code alone.
        """
        tokens = self.decoder.get_input_embeddings()(input_ids)
        with torch.autocast(codes.device.type, enabled=False):
            memory = self.memory_projection(codes.float()).unflatten(-1, (self.config.memory_tokens, -1))
        labels = nn.functional.pad(labels, (self.config.memory_tokens, 0), value=-100)
        # No attention mask: causal models do not see the padding on the right
        output = self.decoder(
            inputs_embeds=torch.cat([memory.to(tokens.dtype), tokens], 1), labels=labels, fused_lm_head=True
        )
        return -output.log_probs.sum(1) / output.label_mask.sum(1)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        encoder_input_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        encoder_pooling_mask: torch.Tensor,
    ) -> GuideOutput:
        """Encode and reconstruct; see [`GuideModel.encode`] and [`GuideModel.decode`]. In training mode codes are sampled if
        the guide is variational."""
        mean, log_var = self.encode(encoder_input_ids, encoder_attention_mask, encoder_pooling_mask)
        codes = mean
        if log_var is not None and self.training:
            codes = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        return GuideOutput(nll=self.decode(codes, input_ids, labels), mean=mean, log_var=log_var)


def embedding_rms(model: PreTrainedModel) -> float:
    """Root mean square of the token embeddings as the model's first layer sees them: Gemma scales them in their module."""
    embeddings = model.get_input_embeddings()
    step = -(-embeddings.num_embeddings // 4096)
    ids = torch.arange(0, embeddings.num_embeddings, step, device=embeddings.weight.device)
    with torch.no_grad():
        return embeddings(ids).float().square().mean().sqrt().item()


def save_guide(
    model: GuideModel,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    encoder_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Save a guide with its tokenizers: the decoder's in the folder itself, another one of the encoder in a subfolder."""
    model.config.tokenizer_name, model.config.tokenizer_digest = tokenizer.name_or_path, tokenizer_digest(tokenizer)
    model.config.encoder_tokenizer_name = model.config.encoder_tokenizer_digest = None
    tokenizer.save_pretrained(folder)
    if encoder_tokenizer is not None:
        model.config.encoder_tokenizer_name = encoder_tokenizer.name_or_path
        model.config.encoder_tokenizer_digest = tokenizer_digest(encoder_tokenizer)
        encoder_tokenizer.save_pretrained(Path(folder) / ENCODER_TOKENIZER)
    model.save_pretrained(folder)


# ---------------------------------------------------------------- encoding


class LatentGuide(Encoder):
    """
    Codes of answers under a guide: the encoder of LD-Align.

    Args:
        model ([`GuideEncoder`] or [`GuideModel`]):
            The guide, on its device. It is given back as it was after each call.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of its decoder, which policies must share.
        encoder_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of its encoder, if it is another one.
        batch_tokens (`int`, *optional*, defaults to `8192`):
            Most tokens of a batch, padding included; bounds the memory.

    Example:

    ```python
    from trl_ift.latent import LatentGuide, Sample

    guide = LatentGuide.from_pretrained("my-guide")
    guide.encode([Sample("2 + 2 =", " 4"), Sample("2 + 2 =", " four")])     # (2, 128)
    ```
    """

    def __init__(
        self,
        model: GuideEncoder,
        tokenizer: PreTrainedTokenizerBase,
        encoder_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_tokens: int = 8192,
    ):
        check_range("batch_tokens", batch_tokens, 1, integer=True)
        self.model, self.tokenizer = model, tokenizer
        self.encoder_tokenizer = tokenizer if encoder_tokenizer is None else encoder_tokenizer
        self.latent_dim, self.max_length = model.config.latent_dim, model.config.max_length
        self.batch_tokens = batch_tokens

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        revision: str | None = None,
        batch_tokens: int = 8192,
    ) -> "LatentGuide":
        """Load what encoding needs of a guide; its decoder is not read into memory.

        Args:
            source: Folder or Hub id of the guide.
            dtype: Dtype of the backbone; pooling and projection are in float32.
            device: Where to put it; the accelerator by default, if there is one.
            revision: Branch, tag or commit on the Hub.
            batch_tokens: Most tokens of a batch.

        Raises:
            ValueError: The folder holds no guide, or one whose tokenizer or weights do not match its config. (Of a folder with
                the check of its training, which says that the codes collapsed, a guide is loaded with a warning.)
        """
        source = os.path.expanduser(os.fspath(source))
        options = {} if revision is None else {"revision": revision}
        if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise ValueError(
                f"The folder `{source}` holds no guide: it has no `config.json`. Give the `output_dir` of `trl-ift guide`; if "
                "that is what it is, the training was interrupted: run the same command again to finish it."
            )
        model_type = GuideConfig.get_config_dict(source, **options)[0].get("model_type")
        if model_type != GuideConfig.model_type:
            raise ValueError(
                f"`{source}` holds a model of type {model_type!r}, expected {GuideConfig.model_type!r}. Give a guide that was "
                "trained with `trl-ift guide`."
            )
        config = GuideConfig.from_pretrained(source, **options)
        tokenizer = _load_tokenizer(source, None, config.tokenizer_digest, options)
        encoder_tokenizer = None
        if config.encoder_tokenizer_digest is not None:
            encoder_tokenizer = _load_tokenizer(source, ENCODER_TOKENIZER, config.encoder_tokenizer_digest, options)
        model, loaded = GuideEncoder.from_pretrained(
            source, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        for name, found, expected in sorted(loaded["mismatched_keys"]):
            raise ValueError(
                f"The weight `{name}` in `{source}` has the shape {list(found)}; by its config "
                f"(`latent_dim={config.latent_dim}`) it must be {list(expected)}. Restore the `config.json` of the training, "
                "or train the guide again."
            )
        if loaded["missing_keys"]:
            missing = sorted(loaded["missing_keys"])
            raise ValueError(
                f"The weights in `{source}` lack {', '.join(missing[:3])} ({len(missing)} of the encoder in all). Train the "
                "guide again, or copy the whole folder."
            )
        result = Path(source) / RESULT_FILE
        if result.is_file() and json.loads(result.read_text(encoding="utf-8"))["check"]["collapsed"]:
            warnings.warn(
                f"By its check ({result}) the decoder of this guide hardly used the codes: their distances are noise. Train a "
                "better one."
            )
        if device is None and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
        return cls(model.to(device or "cpu"), tokenizer, encoder_tokenizer, batch_tokens=batch_tokens)

    def describe(self) -> dict[str, Any]:
        parts = nn.ModuleDict({"encoder": self.model.encoder, "latent_head": self.model.latent_head})
        return {
            "kind": "guide",
            "weights": model_fingerprint(parts),
            "latent_dim": self.latent_dim,
            "max_length": self.max_length,
            "dtype": str(self.model.encoder.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_digest(self.tokenizer),
            "encoder_tokenizer": tokenizer_digest(self.encoder_tokenizer),
        }

    def encode(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Means of the codes, float32 on the CPU, (N, latent_dim), in the order of the samples.

        Raises:
            ValueError: An answer has no tokens.
        """
        return self.model.encode_samples(samples, self.encoder_tokenizer, self.batch_tokens)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if a policy's tokenizer is not the one that the guide was trained with."""
        expected, found = tokenizer_digest(self.tokenizer), tokenizer_digest(tokenizer)
        if found != expected:
            raise ValueError(
                f"The tokenizer `{tokenizer.name_or_path}` of the policy ({found}) is not that of the guide, "
                f"`{self.model.config.tokenizer_name}` ({expected}): vocabulary, rules or chat template differ. Use a guide "
                "whose decoder has the policy's tokenizer, or train one."
            )


def _load_tokenizer(
    source: str, subfolder: str | None, expected: str | None, options: dict[str, Any]
) -> PreTrainedTokenizerBase:
    where = {} if subfolder is None else {"subfolder": subfolder}
    tokenizer = AutoTokenizer.from_pretrained(source, **where, **options)
    if (found := tokenizer_digest(tokenizer)) != expected:
        raise ValueError(
            f"The tokenizer in `{os.path.join(source, subfolder or '')}` has the digest {found}; the guide was trained with "
            f"{expected}. Restore the tokenizer's files of the training, or train the guide again."
        )
    return tokenizer


# ---------------------------------------------------------------- the check


def reconstruction_check(
    model: GuideModel,
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    encoder_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reconstruct: str = "completion",
    threshold: float = 0.01,
    batch_tokens: int = 8192,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Whether the decoder of a guide uses the codes: how well it rebuilds samples from theirs, from others', and from none.

    Each sample gets the code of another one once, by a cyclic shift of all samples in a random order: not of one with the same
    prompt, unless more than half of the samples share it. Nothing depends on the batches.

    Args:
        model ([`GuideModel`]):
            The guide. It is given back as it was.
        samples (`Sequence[Sample]`):
            Held-out samples, at least two.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of its decoder.
        encoder_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of its encoder, if it is another one.
        reconstruct (`str`, *optional*, defaults to `"completion"`):
            What is scored: `"completion"`, or `"full"`, prompt and completion.
        threshold (`float`, *optional*, defaults to `0.01`):
            Smallest gap that counts.
        batch_tokens (`int`, *optional*, defaults to `8192`):
            Most tokens of a batch, padding included.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Returns:
        `dict`: The number of `samples`; `nll`, `nll_permuted` and `nll_zero`, the negative log-likelihoods in nats, mean over
            the tokens of a sample, then over samples, from their own codes, from those of others and from zeros;
            `gap = (nll_permuted - nll) / nll`; and whether the codes `collapsed`, `gap < threshold`, with a warning.

    Raises:
        ValueError: There are not two samples, an answer has no tokens, or the likelihood is not finite.
    """
    check_choice("reconstruct", reconstruct, RECONSTRUCT)
    if len(samples) < 2:
        raise ValueError(f"The check needs at least two samples, found {len(samples)}. Hold out more rows.")
    codes = model.encode_samples(samples, encoder_tokenizer or tokenizer, batch_tokens)
    sequences = [token_ids(sample, tokenizer, model.config.max_length) for sample in samples]
    if (empty := next((i for i, (_, answer) in enumerate(sequences) if not answer), None)) is not None:
        raise ValueError(f"Sample {empty}: its answer has no tokens, so there is nothing to reconstruct. Drop it.")
    partners = partners_of([json.dumps(sample.prompt, sort_keys=True, default=str) for sample in samples], seed)
    variants = {"nll": codes, "nll_permuted": codes[partners], "nll_zero": torch.zeros_like(codes)}
    found = {name: torch.empty(len(samples), dtype=torch.float64) for name in variants}
    with evaluating(model), tqdm(total=len(samples), unit="sample", desc="Checking") as progress:
        lengths = [model.config.memory_tokens + len(prompt) + len(answer) for prompt, answer in sequences]
        for batch in batches(lengths, batch_tokens, LIKE):
            ids, mask, answers = pad_tokens([sequences[i] for i in batch], tokenizer.pad_token_id or 0)
            labels = ids.masked_fill(~(answers if reconstruct == "completion" else mask), -100)
            for name, values in variants.items():
                nll = model.decode(*(tensor.to(model.device) for tensor in (values[batch], ids, labels)))
                found[name][batch] = nll.double().cpu()
            progress.update(len(batch))
    means = {name: values.mean().item() for name, values in found.items()}
    if not torch.isfinite(found["nll"]).all():
        raise ValueError(
            f"The reconstruction loss of the held-out samples is {means['nll']}: the training diverged. Lower "
            "`encoder_learning_rate` and `decoder_learning_rate`, or train in another precision."
        )
    gap = (means["nll_permuted"] - means["nll"]) / max(means["nll"], 1e-12)
    collapsed = not gap >= threshold
    if collapsed:
        warnings.warn(
            f"The decoder hardly uses the codes: with those of other answers the held-out loss is {means['nll_permuted']:.4f} "
            f"nats a token in place of {means['nll']:.4f}, a gap of {gap:.2%} (expected at least {threshold:.2%}). Distances "
            "of such codes are noise. Train on more data or for more epochs, with larger learning rates, more `word_dropout`, "
            "a smaller `kl_weight`, or a smaller decoder."
        )
    return {"samples": len(samples), **means, "gap": gap, "threshold": threshold, "collapsed": collapsed}


def partners_of(groups: Sequence[str], seed: int = 0) -> list[int]:
    """Another index for each one, a permutation; none of the same group, unless a group has more than half of the members."""
    members = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    generator = random.Random(seed)
    names = sorted(members)
    generator.shuffle(names)
    order = [index for name in names for index in members[name]]
    # Groups are contiguous: a shift by the size of the largest one leads out of each
    largest = max(map(len, members.values()))
    shift = largest if largest < len(order) else 1
    partners = [0] * len(order)
    for place, index in enumerate(order):
        partners[index] = order[(place + shift) % len(order)]
    return partners
