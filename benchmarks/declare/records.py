"""What the stages record, and where in a record it is: the one place that reads records.

A path is `STAGE.KEY.KEY...`, as the keys stand in the JSON that the stage's command writes.
Where a record holds a list (one entry per image), the path goes on inside every entry.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Entry = Mapping[str, Any]

# What stands for the name of a metric, for any one key, and for whatever follows.
METRIC, KEY, REST = "<metric>", "*", "**"


_PRIVACY = "clipping noise_multiplier max_norm delta epsilon"
_MODEL = "arch n_classes image_size width pool_kernel stem norm malicious builder features"
_DATA = "name shape mean std n_classes class_names bounded columns.**"
_PROVENANCE = "seed device device_type threads processes versions.*"
_TARGET = (
    "mode train_mode batch_size shards synchronized bn_statistics defenses dropout_seed "
    "running_after clients"
)
_LOCAL = (
    "epochs batches steps lr momentum weight_decay proximal bn_momentum order optimizer dampening "
    "nesterov betas eps amsgrad clip_norm accumulate schedule step_size gamma min_lr rates "
    "order_known"
)

# What the stages write: by the place in the record, the keys there.
_WRITTEN: dict[str, dict[str, str]] = {
    "train": {
        "": "checksum schema_version kind status scheme loss n_train n_val processes epochs_done "
        "initial_val_acc1 best_val_acc1 final_val_acc1 final_train_acc1 images_per_second "
        "seconds_per_epoch seconds wall_seconds config.**",
        "model": _MODEL,
        "data": _DATA,
        "privacy": f"{_PRIVACY} epsilon_rdp accountant sample_rate steps note",
        "federation": "clients images local_steps rounds split defense error_feedback epsilon "
        "delta",
        "history": "epoch lr train_loss train_acc1 val_loss val_acc1 epsilon images_per_second "
        "seconds val_acc5",
        "checkpoints": "initial best last",
        "provenance": _PROVENANCE,
    },
    "extract": {
        "": f"checksum schema_version {_TARGET} n_gradients gradient_norm gradient_norms.** labels "
        "checkpoint seconds seconds_of_update wall_seconds peak_memory_mib processes indices "
        "update_cosine lone_elements arguments.**",
        "model": _MODEL,
        "data": _DATA,
        "local_training": _LOCAL,
        "privacy": _PRIVACY,
        "rank_analysis": "maximum",
        "rank_analysis.layers": "name n_x n_w n_z n_v index",
        "provenance": _PROVENANCE,
    },
    "attack": {
        "": "checksum schema_version key status attack seconds wall_seconds iterations objective "
        "label_accuracy labels pictures tables arguments.** config.** details.** recovered.**",
        "threat": "name granted adaptive",
        "target": _TARGET,
        "target.model": _MODEL,
        "target.data": _DATA,
        "target.local_training": _LOCAL,
        "trace": KEY,
        "psnr_curve": KEY,
        "evaluation": f"matching psnr_cap batch.* missing.{METRIC}",
        "evaluation.per_image": f"index reconstruction label_true label_recovered exact {METRIC}",
        f"evaluation.summary.{METRIC}": "mean std",
        f"evaluation.baselines.{KEY}.{METRIC}": "mean std",
        "evaluation.gain_over_baselines": METRIC,
        "worst_case.per_image": f"index {METRIC} {METRIC}_attack",
        f"worst_case.by_attack.{KEY}.{METRIC}": "mean std",
        "GInfoR.by_sample": "index label confidence predicted norm cosine information ratio "
        "predicted_confidence distance same_signs",
        "GInfoR.by_label": KEY,
        f"label_rules.{KEY}": "accuracy reason labels",
        "provenance": _PROVENANCE,
    },
    "federated": {
        "": "sigma0 n_clients num_rounds test_accuracy best_test_accuracy wall_seconds settings.**",
        "leakage": "site round decision reason statement rdlv threshold metric null.* n_others "
        "top1 chance",
        "leakage.images": "reconstruction similarity prior_similarity rdlv p_value rank",
        "provenance": _PROVENANCE,
    },
    "tabular": {
        "": "checksum status seconds wall_seconds columns.* recovered.** arguments.**",
        "batches": "accuracy exact marginal_guess likeliest_record surer_when_right seconds",
        f"batches.columns.{KEY}": "accuracy guess",
        "batches.confidence": "bin cells confidence right",
        "provenance": _PROVENANCE,
    },
}
PATHS: dict[str, list[str]] = {
    stage: [f"{place}.{key}".lstrip(".") for place, keys in places.items() for key in keys.split()]
    for stage, places in _WRITTEN.items()
}


def is_recorded(path: str, metrics: Sequence[str]) -> bool:
    """Whether some stage writes a value at a path.

    Args:
        path: `STAGE.KEY.KEY...`.
        metrics: Names of the metrics that attacks are measured by.
    """
    stage, _, inside = path.partition(".")
    known = "|".join(map(re.escape, metrics))
    patterns = [_pattern(place, known) for place in PATHS.get(stage, ())]
    return any(re.fullmatch(pattern, inside) for pattern in patterns)


def _pattern(place: str, metrics: str) -> str:
    text = re.escape(place).replace(re.escape(METRIC), f"(?:{metrics})")
    return text.replace(re.escape(REST), ".+").replace(re.escape(KEY), "[^.]+")


def example_paths(metrics: Sequence[str]) -> list[str]:
    """Paths that are known in full, for telling which one a misspelt path is near to."""
    written = [
        f"{stage}.{place.replace(METRIC, metric)}"
        for stage, places in PATHS.items()
        for place in places
        for metric in (metrics if METRIC in place else [""])
    ]
    return [path for path in written if KEY not in path]


def values_at(value: Any, path: str) -> Iterator[Any]:
    """Every value at a path of nested records; inside a list, one per entry."""
    key, _, rest = path.partition(".")
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, Mapping) and key in entry:
            if rest:
                yield from values_at(entry[key], rest)
            else:
                yield entry[key]


@dataclass(frozen=True)
class Run:
    """The records of the finished stages of one repeat of a row.

    Attributes:
        records: What each stage's command wrote, by the stage's name.
    """

    records: Mapping[str, Entry]

    def has(self, stage: str) -> bool:
        """Whether the stage is finished."""
        return stage in self.records

    def value(self, path: str) -> Any:
        """The value at a path; None where there is none."""
        return next(values_at(self.records, path), None)

    def numbers(self, path: str) -> list[float]:
        """Every number at a path, those of a list one by one."""
        found = values_at(self.records, path)
        single = (v for value in found for v in (value if isinstance(value, list) else [value]))
        return [float(value) for value in single if isinstance(value, (int, float))]

    def text(self, path: str) -> str | None:
        """The value at a path in words; None where there is none."""
        value = self.value(path)
        return None if value is None else str(value)

    def entries(self, path: str) -> list[Entry]:
        """The list of records at a path; empty where there is none."""
        return list(self.value(path) or [])

    @property
    def images(self) -> list[Entry]:
        """The metrics of every image under the attack."""
        return self.entries("attack.evaluation.per_image")

    @property
    def worst_images(self) -> list[Entry]:
        """The metrics of every image under the worst attack of an ensemble."""
        return self.entries("attack.worst_case.per_image")

    @property
    def baselines(self) -> Mapping[str, Mapping[str, Entry]]:
        """By guess that knows nothing of the gradient and by metric: mean and std."""
        return self.value("attack.evaluation.baselines") or {}

    @property
    def is_untrained(self) -> bool:
        """Whether the gradient was taken of an initial model."""
        if not self.has("extract"):
            return False
        model = self.value("extract.arguments.pretrained")
        return model is None or str(model).endswith("model_init.pth.tar")

    def leakage(self, site: str) -> list[Entry]:
        """What a site of a federation measured, by round; no images where it could not."""
        found = [e for e in self.entries("federated.leakage") if e["site"] == site]
        return sorted(found, key=lambda entry: entry["round"])
