r"""Feature-level Preference Optimization (FPO), https://huggingface.co/papers/2411.07618.

DPO on mean log-probabilities, with a constraint on the features of a sparse autoencoder (SAE) in the place of a KL term at
every token. With the mean log-probability A(y) of a response's tokens, the mean f(y) of the features c(h) of its tokens' hidden
states in one layer, and the indices T(y) of the k largest entries of f(y) under the policy:

    D(y) = 1/k sum_{i in T(y)} ( f_ref,i(y) - f_i(y) )^2

    L    = - log sigma( beta [ (A(y_w) - A_ref(y_w)) - (A(y_l) - A_ref(y_l)) - alpha ( D(y_l) - sg[ D(y_w) ] ) ] )

A large D(y_l) lowers the logit, so that the loss pulls it down: it restrains the push on the rejected response. At the start
D = 0, with gradient 0. The SAE is frozen; sg is a stop-gradient.

The authors' code divides f by all positions of a padded row, so that it depends on the batch; here it is divided by the tokens
of the response. Their code feeds the last hidden state after the model's final norm; here it is the output of the decoder
layer, the residual stream that such autoencoders are trained on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import is_peft_model
from transformers import AutoConfig, PretrainedConfig

from ..checks import check_range, check_unused
from ..data.rows import first_row
from ..hub.paper import arxiv_paper
from .sae import IdentityEncoder, ReLUSAE, load_sae
from .trainer import PairLossConfig, PreferenceBatch, PreferenceTrainer


# Tokens whose features are held at once
_CHUNK = 512


@dataclass
class FPOConfig(PairLossConfig):
    r"""
    Configuration class for the [`FPOTrainer`].

    This class includes only the parameters that are specific to FPO; `beta` is as in DPO.

    Parameters:
        fpo_alpha (`float`, *optional*, defaults to `0.5`):
            Weight of the constraint, >= 0; 0 is TRL's "sigmoid_norm".
        fpo_top_k (`int`, *optional*, defaults to `50`):
            Number of features that are compared, >= 1: the largest of the policy.
        sae_path (`str`, *optional*):
            File of the sparse autoencoder, `.safetensors` or `.npz`, unless it is passed to the trainer as `sae`.
        sae_layer (`int`, *optional*, defaults to `-1`):
            Decoder layer whose output the autoencoder reads, counted from 0, or from the end if negative.
        detach_chosen (`bool`, *optional*, defaults to `True`):
            Whether no gradient flows through the constraint of the chosen response.
    """

    fpo_alpha: float = field(
        default=0.5, metadata={"help": "Weight of the constraint on features; 0 is TRL's 'sigmoid_norm'."}
    )
    fpo_top_k: int = field(
        default=50, metadata={"help": "Number of features that are compared: the policy's largest."}
    )
    sae_path: str | None = field(
        default=None, metadata={"help": "File of the sparse autoencoder, .safetensors or .npz."}
    )
    sae_layer: int = field(
        default=-1,
        metadata={"help": "Decoder layer whose output the autoencoder reads, from 0, or from the end if negative."},
    )
    detach_chosen: bool = field(
        default=True, metadata={"help": "Whether no gradient flows through the constraint of the chosen response."}
    )

    def __post_init__(self):
        check_range("fpo_alpha", self.fpo_alpha, 0)
        check_range("fpo_top_k", self.fpo_top_k, 1, integer=True)
        check_range("sae_layer", self.sae_layer, -float("inf"), integer=True)
        if self.fpo_alpha == 0:
            check_unused(self, ["fpo_top_k", "detach_chosen"], "on the loss with `fpo_alpha=0`")
        check_unused(self, ["ld_alpha"], "on means per token")
        check_unused(
            self,
            ["precompute_ref_log_probs", "precompute_ref_batch_size"],
            "here: the reference has to run beside the policy, because its features are compared with the policy's",
        )
        super().__post_init__()


def pooled_features(
    encoder: Any, hidden: torch.Tensor, mask: torch.Tensor, columns: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean features of the tokens of each of N responses, (N, d_sae), or (N, k) for the `columns` (N, k) of each.

    Args:
        hidden: Hidden states, shape (N, T, d_model).
        mask: Which of them belong to the response, shape (N, T), bool.
    """
    rows = []
    with torch.autocast(hidden.device.type, enabled=False):
        for row, (states, own) in enumerate(zip(hidden, mask, strict=True)):
            chosen = None if columns is None else columns[row]
            sums = [encoder.encode(part.float(), chosen).sum(0) for part in states[own].split(_CHUNK)]
            rows.append(torch.stack(sums).sum(0) / own.sum().clamp(min=1))
    return torch.stack(rows)


def feature_distance(features: torch.Tensor, ref_features: torch.Tensor, top_k: int) -> torch.Tensor:
    """D of each response, (N,), from the mean features under policy and reference, each (N, d)."""
    largest = features.detach().topk(top_k).indices
    return (ref_features.gather(1, largest) - features.gather(1, largest)).square().mean(1)


def fpo_loss(
    chosen_logratios: torch.Tensor,
    rejected_logratios: torch.Tensor,
    chosen_distance: torch.Tensor,
    rejected_distance: torch.Tensor,
    beta: float,
    fpo_alpha: float,
    detach_chosen: bool = True,
) -> torch.Tensor:
    """FPO loss of each pair, (B,), from A - A_ref and D of the chosen and of the rejected responses, each (B,)."""
    constraint = rejected_distance - (chosen_distance.detach() if detach_chosen else chosen_distance)
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios - fpo_alpha * constraint))


class FPOTrainer(PreferenceTrainer):
    """Trainer for FPO, with the arguments of [`~trl.DPOTrainer`], an autoencoder, and the data of [`PreferenceTrainer`].

    The reference runs beside the policy (with LoRA it is the model without the adapter): log-probabilities that are computed
    before training do not do.

    Args:
        sae: The autoencoder, in place of `sae_path`: [`~trl_ift.preference.sae.JumpReLUSAE`], or an object of yours with the
            sizes `d_model` and `d_sae`, `encode(hidden, columns)`, which returns features (T, d_sae) of hidden states
            (T, d_model), or those in `columns` (k,) if that is not None, (T, k), and `to(device)`, which returns the object
            on a device. It must be differentiable in `hidden` and have no parameters that are trained.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ift import FPOConfig, FPOTrainer

    trainer = FPOTrainer(
        model="google/gemma-2-2b-it",
        args=FPOConfig("gemma-fpo", sae_path="params.npz", sae_layer=25),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    config_class = FPOConfig
    method = "fpo"
    card_options = ("beta",)
    reads_hidden_states = True
    _tag_names = ["trl", "trl-ift", "fpo"]  # noqa: RUF012
    _name = "FPO"
    _paper = arxiv_paper(
        "2411.07618",
        "yin2024direct",
        "Direct Preference Optimization Using Sparse Feature-Level Constraints",
        "Qingyu Yin and Chak Tou Leong and Hongbo Zhang and Minjun Zhu and Hanqi Yan and Qiang Zhang and Yulan He and Wenjie "
        "Li and Jun Wang and Yue Zhang and Linyi Yang",
        2024,
    )

    def __init__(self, model, ref_model=None, args=None, *arguments, sae=None, **named):
        args = self._own_config(args, model)
        if (sae is None) == (args.sae_path is None):
            found = "both" if sae is not None else "neither"
            raise ValueError(
                f"FPO needs one sparse autoencoder, as `sae_path` or as `sae`; found {found}. Give one of them."
            )
        self._sae: ReLUSAE | IdentityEncoder = load_sae(args.sae_path) if sae is None else sae
        _check_encoder(self._sae)
        config = _config_of(model, args).get_text_config()
        _check_fit(args, self._sae, config)
        if ref_model is not None:
            _check_reference(config, _config_of(ref_model, args).get_text_config())
        self._hidden: list[torch.Tensor] = []
        self._ref_hidden: Any = None
        super().__init__(model, ref_model, args, *arguments, **named)
        self._sae = self._sae.to(self.args.device)

    def _check_dataset(self, args, dataset, name, stored):
        super()._check_dataset(args, dataset, name, stored)
        if "ref_chosen_logps" in first_row(dataset):
            raise ValueError(
                f"`{name}` has the columns 'ref_chosen_logps' and 'ref_rejected_logps', and FPO needs the features of the "
                "reference too, which runs beside the policy. Drop them."
            )

    def _layer(self, model: Any) -> torch.nn.Module:
        model = self.accelerator.unwrap_model(model)
        return decoder_layers(model.get_base_model() if is_peft_model(model) else model)[self.args.sae_layer]

    def compute_ref_log_probs(self, model, inputs):
        with _outputs_of(self._layer(self.ref_model or self.model)) as found:
            logps = super().compute_ref_log_probs(model, inputs)
        self._ref_hidden = found[0]
        self._hidden.clear()  # with an adapter, the reference is the same layer
        return logps

    def _compute_loss(self, model, inputs, return_outputs):
        with _outputs_of(self._layer(self.model)) as self._hidden:
            loss = super()._compute_loss(model, inputs, return_outputs)
        self._hidden, self._ref_hidden = [], None
        return loss

    def pair_loss(self, batch: PreferenceBatch) -> torch.Tensor:
        args = self.args
        chosen_logratios, rejected_logratios = (_mean_logratios(part) for part in (batch.chosen, batch.rejected))
        if args.fpo_alpha == 0:
            zero = torch.zeros_like(chosen_logratios)
            return fpo_loss(chosen_logratios, rejected_logratios, zero, zero, self.beta, 0.0)
        chosen, rejected = self._distances(torch.cat([batch.chosen.mask, batch.rejected.mask])).chunk(2)
        for name, distance in (("chosen", chosen), ("rejected", rejected)):
            self._record_mean(f"fpo/distance_{name}", distance.sum(), distance.numel())
        return fpo_loss(
            chosen_logratios, rejected_logratios, chosen, rejected, self.beta, args.fpo_alpha, args.detach_chosen
        )

    def _distances(self, mask: torch.Tensor) -> torch.Tensor:
        """D of all responses, chosen first, (2B,); `mask` (2B, T-1) tells which positions predict their tokens."""
        width = mask.size(1)  # the hidden state of a token stands one position behind that which predicts it
        hidden, reference = self._hidden[0][:, -width:], self._ref_hidden[:, -width:]
        if torch.is_grad_enabled() and not hidden.requires_grad:
            raise ValueError(
                f"The hidden states of layer {self.args.sae_layer} do not depend on what is trained, so that the constraint "
                "would have no effect. Train this layer or one before it, or choose a later `sae_layer`."
            )
        with torch.no_grad():
            columns = pooled_features(self._sae, hidden, mask).topk(self.args.fpo_top_k).indices
            ref_features = pooled_features(self._sae, reference, mask, columns)
        # Only these have a gradient: an encoder computes its features one by one
        return feature_distance(pooled_features(self._sae, hidden, mask, columns), ref_features, self.args.fpo_top_k)

    def implicit_rewards(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return self.beta * _mean_logratios(batch.chosen), self.beta * _mean_logratios(batch.rejected)


def _mean_logratios(responses: Any) -> torch.Tensor:
    return responses.logratios / responses.lengths.clamp(min=1)


@contextmanager
def _outputs_of(layer: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The hidden states that a decoder layer gives out meanwhile, one a forward pass."""
    found: list[torch.Tensor] = []
    handle = layer.register_forward_hook(
        lambda module, inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield found
    finally:
        handle.remove()


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder layers of a causal language model."""
    number = model.config.get_text_config().num_hidden_layers
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == number and name.split(".")[-1] in ("layers", "h")
    ]
    if len(found) != 1:
        raise ValueError(
            f"The decoder layers of {type(model).__name__} cannot be found: {len(found)} lists of {number} layers, expected 1."
        )
    return found[0]


def _config_of(model: Any, args: FPOConfig) -> PretrainedConfig:
    if not isinstance(model, str):
        return model.config
    options = {"trust_remote_code": args.trust_remote_code, "revision": (args.model_init_kwargs or {}).get("revision")}
    return AutoConfig.from_pretrained(model, **{name: value for name, value in options.items() if value is not None})


def _check_encoder(sae: Any) -> None:
    """Raise unless an encoder has what is used of it."""
    wrong = [name for name in ("d_model", "d_sae") if not isinstance(getattr(sae, name, None), Integral)]
    wrong += [name for name in ("encode", "to") if not callable(getattr(sae, name, None))]
    if wrong:
        raise TypeError(
            f"`sae` ({type(sae).__name__}) lacks {', '.join(map(repr, wrong))}. Expected the integers `d_model` and `d_sae`, "
            "and the methods `encode(hidden, columns)` and `to(device)`, as `trl_ift.preference.sae.ReLUSAE` has them."
        )


def _check_reference(config: PretrainedConfig, other: PretrainedConfig) -> None:
    """Raise unless the layers of the reference are like those of the policy."""
    for name, words in (("hidden_size", "hidden states of {} numbers"), ("num_hidden_layers", "{} decoder layers")):
        own, found = getattr(config, name), getattr(other, name)
        if own != found:
            raise ValueError(
                f"`ref_model` has {words.format(found)}, and the model has {words.format(own)}: their features cannot be "
                "compared. Pass a reference of the same architecture."
            )


def _check_fit(args: FPOConfig, sae: Any, config: PretrainedConfig) -> None:
    if sae.d_model != config.hidden_size:
        raise ValueError(
            f"The autoencoder reads hidden states of {sae.d_model} numbers, and the model's have {config.hidden_size}. Take "
            "one that was trained on this model."
        )
    if not -config.num_hidden_layers <= args.sae_layer < config.num_hidden_layers:
        raise ValueError(
            f"`sae_layer={args.sae_layer}` is out of range: the model has {config.num_hidden_layers} decoder layers, counted "
            "from 0, or from the end with -1, -2, ..."
        )
    if args.fpo_alpha > 0 and args.fpo_top_k > sae.d_sae:
        raise ValueError(
            f"`fpo_top_k={args.fpo_top_k}` is more than the {sae.d_sae} features of the autoencoder. Lower it."
        )
