"""How much of the private images a reconstruction shows.

Every function takes images in [0, 1], N x C x H x W, and computes on their device.
"""

from attack.metrics.assignment import assign, pairwise_mse
from attack.metrics.evaluation import (
    DEFAULT_METRICS,
    Evaluation,
    evaluate,
    is_smaller_better,
    metric_description,
    metric_names,
    metric_title,
    register_metric,
    registered_metrics,
)
from attack.metrics.identification import PRIOR_FLOOR, iip, rdlv, relative_leakage
from attack.metrics.perceptual import LpipsDistance, load_lpips
from attack.metrics.pixels import PSNR_CAP, is_exact, mse, psnr
from attack.metrics.similarity import SSIM_VARIANTS, cw_ssim, ssim

__all__ = [
    "DEFAULT_METRICS",
    "PRIOR_FLOOR",
    "PSNR_CAP",
    "SSIM_VARIANTS",
    "Evaluation",
    "LpipsDistance",
    "assign",
    "cw_ssim",
    "evaluate",
    "iip",
    "is_exact",
    "is_smaller_better",
    "load_lpips",
    "metric_description",
    "metric_names",
    "metric_title",
    "mse",
    "pairwise_mse",
    "psnr",
    "rdlv",
    "register_metric",
    "registered_metrics",
    "relative_leakage",
    "ssim",
]
