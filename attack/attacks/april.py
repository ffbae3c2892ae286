"""APRIL: the closed form of a vision transformer's embedding (Lu et al. 2022)."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from attack.attacks.base import Attack, register_attack
from attack.attacks.parts.closed_form import closed_form_reconstruction
from attack.reconstruction import Reconstruction
from core.errors import InputError
from core.target import Target

PROJECTION = "conv_proj"
POSITIONS = "encoder.pos_embedding"


class _Embedding(Attack):
    """An attack on a vision transformer's embedding, batch 1.

    The gradient of the position embedding is that of every token, because the loss sees
    embedding and position only as their sum.
    """

    def reconstruct(
        self, target: Target, *, labels: torch.Tensor, device: torch.device, seed: int, **run: Any
    ) -> Reconstruction:
        """See `Attack.reconstruct`; nothing is random.

        Raises:
            InputError: Not a vision transformer that shares all that is needed, more than
                one image, or fewer channels than patches.
        """
        began = time.perf_counter()
        model: Any = target.build_model().to(device).double()
        self.check(target, model)
        gradient = {name: g.to(device).double() for name, g in target.gradient.items()}
        patches = self.patches(model, gradient, gradient[POSITIONS][0])
        side = target.data.shape[1] // model.patch_size
        images = torch.nn.functional.fold(
            patches.T[None], target.data.shape[1:], model.patch_size, stride=model.patch_size
        )
        return closed_form_reconstruction(
            target,
            images,
            labels,
            device=device,
            began=began,
            iterations=1,
            details={"patches": side * side},
        )

    def check(self, target: Target, model: Any) -> None:
        """Refuse what has no closed form."""
        what = f"--attack {self.name}: "
        projection, positions = getattr(model, PROJECTION, None), None
        if isinstance(getattr(model, "encoder", None), nn.Module):
            positions = getattr(model.encoder, "pos_embedding", None)
        if not isinstance(projection, nn.Conv2d) or positions is None:
            raise InputError(
                f"{what}needs a vision transformer with a learnable position embedding, like "
                f"vit_tiny, not {target.model.name}"
            )
        if target.batch_size != 1 or not target.local.shares_gradient:
            raise InputError(f"{what}needs the gradient of one image and one local step")
        missing = {*self.needs(model), POSITIONS} - set(target.gradient)
        if missing:
            raise InputError(f"{what}the gradient of {min(missing)} was not shared")
        if positions.shape[1] > positions.shape[2]:
            raise InputError(
                f"{what}{positions.shape[1]} tokens of {positions.shape[2]} channels leave the "
                "linear system underdetermined"
            )
        if not target.gradient[POSITIONS].any():
            raise InputError(f"{what}the gradient of {POSITIONS} is zero")

    def needs(self, model: Any) -> set[str]:
        """Names of the parameters whose gradients are read."""
        return {f"{PROJECTION}.weight"}

    @abstractmethod
    def patches(
        self, model: Any, gradient: dict[str, torch.Tensor], tokens: torch.Tensor
    ) -> torch.Tensor:
        """Patches (P x C * side * side, network inputs) from the gradient of all tokens.

        Args:
            model: The shared model.
            gradient: What was shared, in float64.
            tokens: T x channels, the gradient of the embedding of each token.
        """


@register_attack
class PatchProjection(_Embedding):
    """The patch projection as a fully connected layer whose output gradient is known.

    Its weight gradient is the sum over patches of (gradient of the token) x (patch)^T, and
    the gradient of a token is that of its position embedding: a linear system for the
    patches, exact for every vision transformer with a learnable position embedding, one
    image, and at least as many channels as patches. Normalisation and shortcuts behind the
    embedding do not matter.

    Source: the observation on position embeddings is that of Lu et al., APRIL, CVPR 2022,
        section 3.2, https://arxiv.org/abs/2112.14087 (see `April`), combined with the
        fully connected layer of Phong et al., https://eprint.iacr.org/2017/715.
    """

    name = "patch-projection"

    def patches(
        self, model: Any, gradient: dict[str, torch.Tensor], tokens: torch.Tensor
    ) -> torch.Tensor:
        """See `_Embedding.patches`."""
        weight = gradient[f"{PROJECTION}.weight"].flatten(1)
        return torch.linalg.lstsq(tokens[-_n_patches(model) :].T, weight).solution


@register_attack
class April(_Embedding):
    """Closed form from the first attention and the position embedding.

    With z the embedded tokens, q = W_q z and so on: sum_h W_h^T dL/dW_h = (dL/dz)^T z over
    h in q, k, v, and dL/dz is the gradient of the position embedding: a linear system for
    z; the patches follow from the embedding, which is linear too.

    Exact where the attention reads the embedding itself and nothing else does, as in
    `vit_april` (the paper's architecture A), and a patch has no more values than channels.
    With more, the patch of smallest norm is taken, as published: what the embedding does not
    see stays grey. Normalisation before the attention or a shortcut around it, as in
    torchvision's, breaks the identity: use `patch-projection`.

    Source: Lu, Zhang, Zhao, He, Cheng, "APRIL: Finding the Achilles' Heel on Privacy for
        Vision Transformers", CVPR 2022, theorem 1, https://arxiv.org/abs/2112.14087.

    Published: 23.90 dB, LPIPS 0.12, on one image of ImageNet with a small vision
        transformer, in the notebook of https://github.com/JonasGeiping/breaching.

    Reproduced:
        april: 58.45 (51.32 to 66.16, n = 8), 2026-11-28: not comparable: the published ViT-S has
          384 channels for the 768 values of a patch, which its closed form cannot tell apart; see
          april-small.
        april-small: 16.62 (15.54 to 17.96, n = 8), 2026-11-28: not comparable: half of a patch lies
          in directions that the embedding does not see; a trained one sees those in which images
          differ, a random one does not.
    """

    name = "april"

    def check(self, target: Target, model: Any) -> None:
        """Refuse what has no closed form."""
        super().check(target, model)
        first = next(iter(model.encoder.layers.children()))
        if hasattr(first, "ln_1"):
            raise InputError(
                f"--attack {self.name}: in {target.model.name} the first attention reads "
                "normalised tokens beside a shortcut, for which the closed form is not exact; "
                "use --attack patch-projection, or --arch vit_april"
            )

    def needs(self, model: Any) -> set[str]:
        """Names of the parameters whose gradients are read."""
        return {self._attention(model)}

    @staticmethod
    def _attention(model: Any) -> str:
        first = next(iter(model.encoder.layers.named_children()))[0]
        return f"encoder.layers.{first}.self_attention.in_proj_weight"

    def patches(
        self, model: Any, gradient: dict[str, torch.Tensor], tokens: torch.Tensor
    ) -> torch.Tensor:
        """See `_Embedding.patches`."""
        name = self._attention(model)
        product = model.get_parameter(name).detach().T @ gradient[name]
        embedded = torch.linalg.lstsq(tokens.T, product).solution
        n_patches = _n_patches(model)
        positions = model.encoder.pos_embedding.detach()[0]
        projected = (embedded - positions)[-n_patches:] - model.conv_proj.bias.detach()
        weight = model.conv_proj.weight.detach().flatten(1)
        return torch.linalg.lstsq(weight, projected.T).solution.T


def _n_patches(model: Any) -> int:
    return (model.image_size // model.patch_size) ** 2
