"""How much of the private images a reconstruction shows.

Every function takes images in [0, 1], N x C x H x W, and computes on their device. Those
that fit them take signals (N x C x L), volumes (N x C x D x H x W) and tables (N x F) as well.
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
    metrics_for,
    register_metric,
    registered_metrics,
)
from attack.metrics.identification import PRIOR_FLOOR, iip, rdlv, relative_leakage
from attack.metrics.perceptual import LpipsDistance, load_lpips
from attack.metrics.pixels import PSNR_CAP, data_range, is_exact, mse, ncc, psnr, to_unit_range
from attack.metrics.similarity import SSIM_VARIANTS, cw_ssim, ssim
from attack.metrics.text import evaluate_text

__all__ = [
    "DEFAULT_METRICS",
    "PRIOR_FLOOR",
    "PSNR_CAP",
    "SSIM_VARIANTS",
    "Evaluation",
    "LpipsDistance",
    "assign",
    "cw_ssim",
    "data_range",
    "evaluate",
    "evaluate_text",
    "iip",
    "is_exact",
    "is_smaller_better",
    "load_lpips",
    "metric_description",
    "metric_names",
    "metric_title",
    "metrics_for",
    "mse",
    "ncc",
    "pairwise_mse",
    "psnr",
    "rdlv",
    "register_metric",
    "registered_metrics",
    "relative_leakage",
    "ssim",
    "to_unit_range",
]
