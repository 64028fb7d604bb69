"""Adapted modules of a torch model: ``Σ_k λ_k s_k B_k (A_k x)`` for each kind of module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlora.core.updates import Update
from fastlora.engine.materialise import materialise
from fastlora.errors import InputError
from fastlora.ops.finite import is_finite

CONVOLUTIONS = {nn.Conv1d: functional.conv1d, nn.Conv2d: functional.conv2d, nn.Conv3d: functional.conv3d}


class Site(nn.Module):
    """What is added to the output of one linear module.

    Buffers: ``A [R, m]`` and ``B [n, R]``, all components stacked, scalings in ``B``; ``owner [R]``: whose each is.
    """

    A: Tensor
    B: Tensor
    owner: Tensor

    def __init__(self, A: Tensor, B: Tensor, owner: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.register_buffer("owner", owner, persistent=False)

    def weights(self, coefficients: Tensor) -> Tensor:
        """``λ`` of every stacked column: ``[R]``."""
        return coefficients.to(self.A.dtype)[self.owner]

    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """``B diag(λ) A x`` for ``x [..., m]`` and one ``λ`` a component: ``[..., n]``."""
        inner = functional.linear(x.to(self.A.dtype), self.A) * self.weights(coefficients)
        return functional.linear(inner, self.B)


class EmbeddingSite(Site):
    """``ΔW [dim, vocabulary]``: the input chooses columns of ``A``."""

    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """``B diag(λ) A[:, x]`` for token numbers ``x [...]``: ``[..., dim]``."""
        return functional.linear(functional.embedding(x, self.A.mT) * self.weights(coefficients), self.B)


class ConvolutionSite(Site):
    """``A`` as a convolution with the module's own geometry, then ``B`` at every place."""

    def __init__(self, A: Tensor, B: Tensor, owner: Tensor, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(A, B, owner)
        self.kernel = (module.in_channels, *module.kernel_size)
        self.geometry = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        self.convolve: Callable[..., Tensor] = next(f for kind, f in CONVOLUTIONS.items() if isinstance(module, kind))

    def forward(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """``B diag(λ) (A ∗ x)`` for images ``x [batch, in, …]``: ``[batch, out, …]``."""
        places = len(self.kernel) - 1
        kernel = self.A.reshape(-1, *self.kernel)
        inner = self.convolve(x.to(self.A.dtype), kernel, **self.geometry)
        inner = inner * self.weights(coefficients).reshape(-1, *[1] * places)
        return self.convolve(inner, self.B.reshape(*self.B.shape, *[1] * places))


def make_site(path: str, module: nn.Module | None, parent: nn.Module | None, updates: Sequence[Update | None]) -> Site:
    """The site of one module; ``updates``: of every component, ``None`` where it lacks the module."""
    if module is None:
        raise InputError(
            f"the model has no module {path!r}, which the adapters change; give the base model they were trained on"
        )
    present = [u for u in updates if u is not None]
    kind, shape = _kind(path, module, parent)
    for update in present:
        if update.layout.kind != kind or update.shape != shape:
            raise InputError(
                f"module {path!r} of the model is {type(module).__name__} with a weight of {list(shape)} [out, in], "
                f"but the adapters change {_told(update)}; they belong to another base model"
            )
    weight: Tensor = module.weight  # type: ignore[assignment]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    baked = [None if u is None else u.baked() for u in updates]
    factors = iter(materialise([u for u in baked if u is not None], dtype))
    left, right, owner = [], [], []
    for k, baked_update in enumerate(baked):
        if baked_update is None:
            continue
        B, A = next(factors)
        if baked_update.rank and not (is_finite(A) and is_finite(B)):
            raise InputError(f"component {k + 1} holds NaN or Inf in {path}, so nothing can be learned from it")
        left.append(B)
        right.append(A)
        owner += [k] * baked_update.rank
    stacked = torch.cat(right).to(weight.device), torch.cat(left, 1).to(weight.device)
    index = torch.tensor(owner, dtype=torch.int64, device=weight.device)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ConvolutionSite(*stacked, index, module)
    return (EmbeddingSite if kind == "embedding" else Site)(*stacked, index)


def _told(update: Update) -> str:
    what = {"linear": "a linear module", "conv": "a convolution", "embedding": "an embedding", "expert": "an expert"}
    return f"{what[update.layout.kind]} of {list(update.shape)}"


def _kind(path: str, module: nn.Module, parent: nn.Module | None) -> tuple[str, tuple[int, int]]:
    """How an update of the module is laid out, and its ``[out, in]``."""
    name = type(module).__name__
    if isinstance(parent, nn.MultiheadAttention):
        raise InputError(
            f"module {path!r} belongs to a MultiheadAttention, which uses its weight without calling it; coefficients "
            "cannot be learned for it here: leave it out of the adapters"
        )
    if isinstance(module, nn.Linear):
        return "linear", (module.out_features, module.in_features)
    if name == "Conv1D":  # of transformers: a linear module whose weight is stored [in, out]
        weight: Tensor = module.weight  # type: ignore[assignment]
        return "linear", (weight.shape[1], weight.shape[0])
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or type(module).forward is not nn.Embedding.forward:
            raise InputError(
                f"module {path!r} is a {name} that does more than to look rows up (max_norm, or a scale of its own); "
                "coefficients cannot be learned for it here: leave it out of the adapters"
            )
        return "embedding", (module.embedding_dim, module.num_embeddings)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups != 1 or module.padding_mode != "zeros":
            raise InputError(
                f"module {path!r} is a convolution with groups={module.groups}, padding_mode={module.padding_mode!r}; "
                "coefficients can be learned for groups=1 and padding with zeros only"
            )
        inputs = module.in_channels
        for size in module.kernel_size:
            inputs *= size
        return "conv", (module.out_channels, inputs)
    raise InputError(
        f"module {path!r} is a {name}; coefficients can be learned for Linear, Conv1D, Embedding and Conv1d/2d/3d "
        "modules only: leave it out of the adapters, or take the adapters off the model first"
    )
