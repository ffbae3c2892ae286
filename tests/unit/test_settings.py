"""Settings: what a wrong value is told, what flags decide, and which names are known."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from attack.cli.parser import build_parser
from attack.loop.restarts import MAKE_OPTIMIZER
from attack.loop.schedules import learning_rate
from attack.matching.objectives import OBJECTIVES, layer_weights
from attack.priors.regularizers import TOTAL_VARIATIONS
from attack.settings import (
    LAYER_WEIGHTS,
    SETTINGS,
    TOPICS,
    InversionConfig,
    PriorSettings,
    settings_of_flags,
    told_by_flag,
)
from attack.settings import OBJECTIVES as OBJECTIVE_NAMES
from attack.settings import OPTIMIZERS as OPTIMIZER_NAMES
from attack.settings import SCHEDULES as SCHEDULE_NAMES
from attack.settings import TOTAL_VARIATIONS as TV_NAMES
from core.errors import InputError
from core.launch_arguments import given_flags
from core.settings import SettingError

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tv": "much"}, "priors.tv 'much': must be a number", "--TV 'much': must be a number"),
    ({"tv": float("nan")}, "priors.tv nan: must be a finite number", "--TV nan: must be"),
    ({"tv": True}, "priors.tv True: must be a number", "--TV True"),
    ({"iterations": 0}, "optimiser.iterations must be at least 1", "--epochs must be at least 1"),
    ({"iterations": 2.5}, "optimiser.iterations 2.5: must be a whole", "--epochs 2.5: must be"),
    ({"restarts": 0}, "starts.restarts must be at least 1", "--n-seed must be at least 1"),
    ({"lr": 0.0}, "optimiser.lr 0.0: must be above 0", "--lr 0.0: must be above 0"),
    ({"optimizer": "Adamm"}, "optimiser.name Adamm: choose one of Adam,", "--optim Adamm: choose"),
    ({"objective": "cos"}, "matching.objective cos: choose", "--gradient-loss-fun cos: choose"),
    ({"layers": "first:0"}, "matching.layers: unknown layer weights first:0", "--layers: unknown"),
    ({"layers": "{tv}"}, "matching.layers: unknown layer weights {tv}", "--layers: unknown"),
    ({"coordinates": "dct:x"}, "optimiser.coordinates dct:x: choose", "--coordinates dct:x"),
    ({"signed": 1}, "optimiser.signed 1: must be True or False", "--signed 1"),
    ({"stages": (0.3, 0.7)}, "consensus.stages (0.3, 0.7): must be 3 numbers", "--T-init-rate/"),
    ({"combine": True}, "consensus.combine fuses several", "give --n-seed 2 or more"),
    ({"bn_from_update": True}, "priors.bn_from_update needs priors.bn,", "needs --BN, the weight"),
    ({"soft_sign": True}, "optimiser.soft_sign replaces the sign", "--soft-sign replaces the sign"),
    ({"double": True, "precision": "bf16"}, "matching.double and speed.precision", "--double and"),
]


@pytest.mark.parametrize(("changes", "in_python", "on_command_line"), WRONG, ids=str)
def test_a_wrong_value_is_told_in_the_users_words(
    changes: dict[str, Any], in_python: str, on_command_line: str
) -> None:
    config = InversionConfig(**changes)
    with pytest.raises(SettingError) as caught:
        config.validate()
    assert in_python in str(caught.value)
    with pytest.raises(InputError) as told, told_by_flag():
        config.validate()
    assert on_command_line in str(told.value)


def test_an_error_survives_the_way_between_processes() -> None:
    with pytest.raises(SettingError) as caught:
        InversionConfig(lr=0.0).validate()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.in_flags) == (str(caught.value), caught.value.in_flags)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(InputError, match="there is no setting tvv; known are objective, layers"):
        InversionConfig(tvv=0.1)


def test_names_alone_and_topics_say_the_same() -> None:
    config = InversionConfig(tv=0.01, tv_kind="isotropic", restarts=5)
    assert config.priors == PriorSettings(tv=0.01, tv_kind="isotropic")
    assert config == InversionConfig(priors=config.priors, restarts=5)
    assert InversionConfig(priors=config.priors, tv=1.0).priors.tv == 1.0
    assert config.changed(tv=0.1, tv_kind="anisotropic", restarts=1) == InversionConfig()
    assert dataclasses.replace(config, iterations=7) == config.changed(iterations=7)  # type: ignore[call-arg]
    assert InversionConfig(**config.to_flat()) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_every_name_is_one_setting() -> None:
    assert len(SETTINGS) == sum(len(dataclasses.fields(topic)) for topic in TOPICS.values())
    assert set(InversionConfig().to_flat()) == set(SETTINGS)


def test_the_names_are_those_of_what_there_is() -> None:
    assert set(OBJECTIVE_NAMES) == set(OBJECTIVES)
    assert set(TV_NAMES) == set(TOTAL_VARIATIONS)
    assert set(OPTIMIZER_NAMES) == set(MAKE_OPTIMIZER)
    for name in SCHEDULE_NAMES:
        assert learning_rate(name, 0, 10, 0.1, 0.0) == pytest.approx(0.1)
    for kind in ("linear", "exp", "decay", "first:1", "last:12"):
        assert LAYER_WEIGHTS.fullmatch(kind)
        assert len(layer_weights(3, kind)) == 3


def flags(*words: str) -> dict[str, Any]:
    return given_flags(build_parser(), words)


def test_only_what_was_given_counts_as_given() -> None:
    assert flags() == {}
    assert flags("--TV", "0.1", "--no-box", "--exact-bn") == {
        "TV": 0.1,
        "box": False,
        "exact_bn": True,
    }


def test_flags_decide_settings() -> None:
    words = ["--optim", "SGD", "--epochs", "7", "--T-init-rate", "0.5", "--target-tv", "0"]
    found = settings_of_flags(flags(*words), InversionConfig(target_tv=0.3))
    assert found == {
        "optimizer": "SGD",
        "iterations": 7,
        "stages": (0.5, 0.3, 0.4),
        "target_tv": None,
    }
    changed = InversionConfig().with_flags(flags(*words))
    assert (changed.optimiser.name, changed.consensus.stages) == ("SGD", (0.5, 0.3, 0.4))


def test_every_setting_of_the_command_has_a_help_text() -> None:
    silent = [flat for flat, (_, each) in SETTINGS.items() if each.about.flags]
    assert [flat for flat in silent if not SETTINGS[flat][1].about.help] == []
