"""How much of the private images a reconstruction shows.

Every function takes images in [0, 1], N x C x H x W, and computes on their device.
"""

from attack.metrics.assignment import assign, pairwise_mse
from attack.metrics.evaluation import (
    DEFAULT_METRICS,
    Evaluation,
    evaluate,
    metric_names,
    register_metric,
)
from attack.metrics.identification import iip, rdlv
from attack.metrics.perceptual import LpipsDistance, load_lpips
from attack.metrics.pixels import PSNR_CAP, is_exact, mse, psnr
from attack.metrics.similarity import SSIM_VARIANTS, cw_ssim, ssim

__all__ = [
    "DEFAULT_METRICS",
    "PSNR_CAP",
    "SSIM_VARIANTS",
    "Evaluation",
    "LpipsDistance",
    "assign",
    "cw_ssim",
    "evaluate",
    "iip",
    "is_exact",
    "load_lpips",
    "metric_names",
    "mse",
    "pairwise_mse",
    "psnr",
    "rdlv",
    "register_metric",
    "ssim",
]
