"""Spectral balanced matching: this project's own attack."""

from attack.attacks.base import register_attack
from attack.attacks.optimisation import OptimizationAttack
from attack.attacks.parts import published


@register_attack
class Spectral(OptimizationAttack):
    """Cosine matching in scaled cosine coordinates with a regulariser that needs no weight.

    - The images are optimised as DCT coefficients scaled by 1/f, the spectrum of
      photographs, so that coarse structure settles before detail.
    - Each step goes along the unit gradient of the objective plus `balance` times the unit
      gradient of double-opponent total variation: the published weights, which span six
      orders of magnitude over models, are not needed.
    - The balance falls during the attack, so that the end of it fits the gradient, but
      not while the objective is below `balance_hold`: there the gradient does not
      determine the image (a plain ConvNet's), and the prior has to.
    - Eight starts, half of them faint, race for the iterations of one: which image is
      reached depends on the start, and the objective tells early.
    - Plain Adam, no signs.
    """

    name = "spectral"
    published = published.SPECTRAL


@register_attack
class Spectral2(Spectral):
    """`spectral`, whose prior no longer fades single images in train mode.

    - All of `spectral`, which it is in evaluation mode and for batches of several images.
    - Where BatchNorm takes the statistics of one image, the gradient hardly shows its contrast,
      and total variation is smaller for faint images: what `spectral` finds early loses its
      colours later. The prior's step has no component along that contrast here, so that an
      image keeps the contrast of its start, which is the data set's, unless the gradient says
      otherwise.
    """

    name = "spectral-2"
    published = published.SPECTRAL_2


@register_attack
class Spectral3(Spectral):
    """`spectral`, whose images end at the scale of photographs where nothing shows their own.

    - All of `spectral`, which it is where BatchNorm has running statistics or several images.
    - Where BatchNorm takes the statistics of one image behind a convolution, or GroupNorm those of
      each, the gradient is that of every multiple of the image, and total variation makes it
      faint: grey and dark, all else being right. In the end it is scaled to the root mean square
      that photographs have, times 0.8, which is the better guess of a length that nobody knows;
      colours and brightness fade with the contrast and come back with it.
    - Where the objective grows by it, the scale was not hidden, and the image stays as it is.
    """

    name = "spectral-3"
    published = published.SPECTRAL_3
