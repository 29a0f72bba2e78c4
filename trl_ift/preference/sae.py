"""Encoders of hidden states into sparse features: trained sparse autoencoders, and stand-ins. Nothing here is trained."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


@dataclass(frozen=True)
class ReLUSAE:
    """Encoder c(h) = relu(h W_enc + b_enc) of a sparse autoencoder.

    Attributes:
        weight: W_enc, float32, shape (d_model, d_sae).
        bias: b_enc, float32, shape (d_sae,).
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __post_init__(self):
        if self.weight.dim() != 2 or self.bias.shape != self.weight.shape[1:]:
            raise ValueError(
                f"`W_enc` has the shape {tuple(self.weight.shape)} and `b_enc` {tuple(self.bias.shape)}; expected (d_model, "
                "d_sae) and (d_sae,). Transpose the weight if it was saved as that of a linear layer."
            )

    @property
    def d_model(self) -> int:
        return self.weight.size(0)

    @property
    def d_sae(self) -> int:
        return self.weight.size(1)

    def encode(self, hidden: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Features of hidden states (..., d_model): all, (..., d_sae), or those in `columns` (k,), (..., k)."""
        chosen = slice(None) if columns is None else columns
        return torch.relu(hidden @ self.weight[:, chosen] + self.bias[chosen])

    def to(self, device: torch.device) -> "ReLUSAE":
        return type(self)(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class JumpReLUSAE(ReLUSAE):
    """Encoder of a JumpReLU autoencoder (Gemma Scope): 0 where h W_enc + b_enc is not above a threshold.

    Attributes:
        threshold: Float32, shape (d_sae,).
    """

    threshold: torch.Tensor

    def __post_init__(self):
        super().__post_init__()
        if self.threshold.shape != self.bias.shape:
            raise ValueError(
                f"`threshold` has the shape {tuple(self.threshold.shape)}; expected {tuple(self.bias.shape)}, that of `b_enc`."
            )

    def encode(self, hidden: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        chosen = slice(None) if columns is None else columns
        activation = hidden @ self.weight[:, chosen] + self.bias[chosen]
        return torch.relu(activation) * (activation > self.threshold[chosen])


@dataclass(frozen=True)
class IdentityEncoder:
    """The hidden states themselves as features, shape (..., d_model): for tests, and to constrain a layer as a whole."""

    d_model: int

    @property
    def d_sae(self) -> int:
        return self.d_model

    def encode(self, hidden: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
        return hidden if columns is None else hidden[..., columns]

    def to(self, device: torch.device) -> "IdentityEncoder":
        return self


def load_sae(path: str | Path) -> ReLUSAE:
    """Load the encoder of a sparse autoencoder from a `.safetensors` or `.npz` file with `W_enc`, `b_enc`, and `threshold`.

    Without a `threshold` it is a [`ReLUSAE`]. Other arrays, such as those of the decoder, are not read. Pickles are refused.

    Raises:
        ValueError: The file is missing, of another kind, broken, or holds arrays of wrong names, shapes or values.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no file `{path}` with a sparse autoencoder. Correct the path.")
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"`{path}` is of no known kind. Expected a `.safetensors` or an `.npz` file; convert it.")
    try:
        found = _arrays(path)
    except (ValueError, OSError, SafetensorError, zipfile.BadZipFile) as error:
        raise ValueError(f"`{path}` cannot be read as {path.suffix}: {error}. Download or save it again.") from error
    if missing := [name for name in ("W_enc", "b_enc") if name not in found]:
        raise ValueError(
            f"`{path}` lacks {' and '.join(map(repr, missing))}; it holds {sorted(found)}. Expected 'W_enc' (d_model, d_sae), "
            "'b_enc' (d_sae,) and, for a JumpReLU autoencoder, 'threshold' (d_sae,). Rename the arrays."
        )
    tensors = {name: found[name].float() for name in ("W_enc", "b_enc", "threshold") if name in found}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"`{path}`: '{name}' has values that are not finite. Download or save it again.")
    weight, bias, *threshold = tensors.values()
    return JumpReLUSAE(weight, bias, *threshold) if threshold else ReLUSAE(weight, bias)


def _arrays(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}
