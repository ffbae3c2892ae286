"""One run of stage 2 on every process: batch, model, update, and what is written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.client import (
    check_fits,
    in_full_precision,
    named_data,
    refuse_own_data,
    with_classes,
)
from core.clipping import PER_SAMPLE
from core.data.data_sets import DataSets, load_data, take_samples
from core.data.records import is_table, load_table, table_data_sets
from core.data.specs import DataSpec
from core.errors import InputError
from core.losses import ignoring
from core.models.architecture import Architecture, GivenModel
from core.models.building import (
    DEFAULT_POOL_KERNEL,
    RECORDS_ARCH,
    ModelSpec,
    default_stem,
    skeleton_of,
)
from core.models.malicious import parse_malice, parse_text_malice
from core.models.own_model import own_architecture
from core.models.unchanged import in_mode
from core.plugins import import_plugin
from core.processes.distributed import Process
from core.target import Target, Truth
from gradients.batch_statistics import batch_norm_layers
from gradients.client import ClientSettings, share_update
from gradients.client_batch import (
    batch_indices,
    duplicate_label_indices,
    load_batch,
    public_samples,
    validation_guesses,
)
from gradients.malicious_server import sent_to_clients, tamper
from gradients.malicious_text import tamper_with_text
from gradients.output import peak_memory, write_results
from gradients.rank_analysis import LayerRank, format_table, rank_analysis
from gradients.received_model import Pretrained, build_received_model, load_own, read_pretrained
from gradients.record import Measured
from gradients.settings import (
    DEFAULT_ARCH,
    DataSettings,
    ExtractSettings,
    ModelSettings,
)
from gradients.sums import share_sum

OUR_STEM = (
    "the model has the stem for small images, which the original tools do not know; for a "
    "checkpoint that they load as well: --stem imagenet"
)


def extract(process: Process, settings: ExtractSettings) -> Path | None:
    """Compute and write, on one of the client's processes.

    Args:
        process: Rank, device and number of processes.
        settings: The same on every process.

    Returns:
        The checkpoint's path on the first process, else None.

    Raises:
        InputError: Something that was asked for cannot be done.
    """
    import_plugin(settings.plugin)
    began = time.perf_counter()
    chosen = settings.model
    pretrained = None if chosen.pretrained is None else read_pretrained(chosen.pretrained)
    received = (
        _own(settings, pretrained) if chosen.builder else _ours(settings, pretrained, process)
    )
    data, data_spec, client = received.data, received.spec, received.client
    indices = _choose(settings, data)
    truth = _truth(data, indices, settings.data.workers, process)
    spec, model = received.architecture, received.model()
    model = model.double() if chosen.double else model
    if chosen.malicious:
        spec, model = _tampered(model, spec, data, data_spec, settings)
    ranks = _rank_analysis(model, data_spec, settings, process)
    if process.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(process.device)
    loaded = time.perf_counter()
    cost: dict[str, Any] = {}
    target = _shared(settings, process, cost, client, model, spec, data_spec, truth)
    if target is None:
        return None
    _check_finite(target, settings)
    measured = Measured(
        seconds=round(time.perf_counter() - began, 3),
        seconds_of_update=round(time.perf_counter() - loaded, 3),
        peak_memory_mib=peak_memory(process.device),
        processes=process.world_size,
        indices=tuple(indices),
        update_cosine=cost.get("update_cosine"),
        lone_elements=cost.get("lone_elements"),
    )
    return write_results(settings, target, truth, ranks, process.device, measured)


def _shared(
    settings: ExtractSettings,
    process: Process,
    cost: dict[str, Any],
    client: ClientSettings,
    model: nn.Module,
    spec: Architecture,
    data: DataSpec,
    truth: Truth,
) -> Target | None:
    """One client's update, or the mean of several clients'."""
    batch = (truth.images, truth.labels)
    if settings.aggregation.sums:
        sent = sent_to_clients(model, spec) if isinstance(spec, ModelSpec) else model
        return share_sum(sent, spec, data, *batch, client, settings.aggregation, process, cost)
    return share_update(model, spec, data, *batch, client, process, cost)


@dataclass(frozen=True)
class _Received:
    """What a client has when it begins.

    Attributes:
        architecture: How an attacker rebuilds the model.
        data: The data set.
        spec: Its description, with the normalisation that the model expects.
        client: What the client computes.
        model: Builds the model with the parameters that the client received.
    """

    architecture: Architecture
    data: DataSets
    spec: DataSpec
    client: ClientSettings
    model: Callable[[], nn.Module]


def _ours(settings: ExtractSettings, pretrained: Pretrained | None, process: Process) -> _Received:
    """A client with one of our architectures."""
    chosen = settings.model
    refuse_own_data(settings.data.data)
    if pretrained is not None and pretrained.builder is not None:
        raise InputError(
            f"--pretrained: {pretrained.path} is of a module of your own; give --model "
            f"{pretrained.builder}, or where that function is now"
        )
    data, data_spec = _load_data(settings.data, pretrained, settings.seed)
    if data_spec.n_classes < 2:
        raise InputError(
            f"--data: {settings.data.data} has one class, and a classifier of one class has no "
            "gradient; give --pretrained of stage 1 with this class among others, or --model"
        )
    spec = _model_spec(chosen, pretrained, data_spec)
    if chosen.malicious:
        parse_malice(chosen.malicious, spec.n_classes)
    spec, client = _suit_privacy(spec, settings, process)
    if needs_our_stem(spec):
        _say(process, OUR_STEM)

    def model() -> nn.Module:
        defenses = settings.client.defenses
        return build_received_model(
            spec, pretrained, chosen.outlayer_state, settings.seed, defenses
        )

    return _Received(spec, data, data_spec, client, model)


def _own(settings: ExtractSettings, pretrained: Pretrained | None) -> _Received:
    """A client with a module of the user's own, on the user's samples or on images of ours."""
    chosen, client = settings.model, settings.client
    if chosen.arch:
        raise InputError(f"--arch {chosen.arch}: is for our architectures, and --model is your own")
    if chosen.malicious:
        parse_text_malice(chosen.malicious)
    architecture = own_architecture(chosen.builder, settings.seed)
    assert architecture is not None
    model = in_mode(in_full_precision(architecture.build()), client.train_mode)
    text = settings.data.data
    words = settings.data.tokens, settings.data.shortest
    own = named_data(text, words[0], model, client.loss, settings.seed, words[1])
    data, spec = (
        _load_data(settings.data, pretrained, settings.seed) if own is None else (own, own.spec)
    )
    if pretrained is not None:
        load_own(model, pretrained, _first_input(data, spec, model))
    if own is not None:
        client = dataclasses.replace(client, loss=ignoring(client.loss, spec.pad))
        return _Received(architecture, data, spec, client, lambda: model)
    outputs = check_fits(model, data, client.loss)
    # A site may have fewer classes than its model; then their names are not those of the outputs.
    unnamed = with_classes(dataclasses.replace(spec, class_names=()), client.loss, outputs)
    spec = spec if unnamed.n_classes == spec.n_classes else unnamed
    return _Received(architecture, data, spec, client, lambda: model)


def _first_input(data: DataSets, spec: DataSpec, model: nn.Module) -> torch.Tensor:
    """One sample as the model is given it."""
    inputs, _ = take_samples(data.train_plain, range(1), spec)
    return spec.normalize(spec.placed(inputs, next(model.parameters())))


def _truth(data: DataSets, indices: list[int], workers: int, process: Process) -> Truth:
    """The client's images, and on the first process what one could guess without them."""
    images, labels = load_batch(data, indices, workers)
    mean, nearest = validation_guesses(data, images, workers) if process.is_main else (None, None)
    return Truth(images, labels, mean, nearest, data.spec.columns)


def _tampered(
    model: nn.Module,
    spec: Architecture,
    data: DataSets,
    described: DataSpec,
    settings: ExtractSettings,
) -> tuple[Architecture, nn.Module]:
    """What a malicious server sends instead of the model."""
    malicious = settings.model.malicious
    if isinstance(spec, GivenModel) and not described.n_tokens:
        raise InputError(f"--malicious {malicious}: is for our architectures, or for text")
    public, classes = public_samples(data, settings.data.workers)
    if isinstance(spec, GivenModel):
        loss = ignoring(settings.client.loss, described.pad)
        model = tamper_with_text(model, malicious, public, loss)
        return GivenModel(model, spec.builder, described.shape, malicious), model
    assert isinstance(spec, ModelSpec)
    spec = dataclasses.replace(spec, malicious=malicious)
    # What it is made for is the sum of all that take part.
    return spec, tamper(model, spec, described.normalize(public), classes, settings.images)


def _check_finite(target: Target, settings: ExtractSettings) -> None:
    """Refuse to share NaN: nothing could be learnt from it, nor read in a table."""
    if all(gradient.isfinite().all() for gradient in target.gradient.values()):
        return
    if all(value.isfinite().all() for value in target.state_dict.values()):
        lr = settings.client.local.lr
        raise InputError(f"the update is not finite: local training diverges with --lr {lr:g}")
    raise InputError(f"--pretrained: the parameters in {settings.model.pretrained} are not finite")


def _load_data(
    settings: DataSettings, pretrained: Pretrained | None, seed: int
) -> tuple[DataSets, DataSpec]:
    """The data set, and its description with the normalisation that the model expects."""
    if is_table(settings.data):
        trained = None if pretrained is None else pretrained.data
        table = load_table(settings.data, settings.root, trained=trained)
        return table_data_sets(table, settings.split_seed), table.spec
    described = None if pretrained is None else pretrained.model
    size = settings.image_size or (None if described is None else described.image_size)
    stated = None if pretrained is None else pretrained.data
    data = load_data(
        settings.data,
        image_size=size,
        root=settings.root,
        name=settings.name,
        seed=seed,
        split_seed=settings.split_seed,
        training=False,
        class_names=() if stated is None else stated.class_names,
    )
    if stated is None:
        return data, data.spec
    return data, dataclasses.replace(data.spec, mean=stated.mean, std=stated.std)


def _model_spec(
    settings: ModelSettings, pretrained: Pretrained | None, data: DataSpec
) -> ModelSpec:
    """The architecture: as the checkpoint says, else as the settings say."""
    described = None if pretrained is None else pretrained.model
    if data.columns is not None:
        return _model_of_records(settings, described, data)
    size = data.shape[1]
    kernel = settings.pool_kernel
    if described is None:
        return ModelSpec(
            arch=settings.arch or DEFAULT_ARCH,
            n_classes=data.n_classes,
            image_size=size,
            stem=settings.stem or default_stem(size),
            width=settings.width,
            pool_kernel=kernel or DEFAULT_POOL_KERNEL,
            norm=settings.norm or "batch",
        )
    _check_described(settings, described)
    return dataclasses.replace(
        described,
        n_classes=data.n_classes,
        image_size=size,
        pool_kernel=kernel or described.pool_kernel,
    )


def _model_of_records(
    settings: ModelSettings, described: ModelSpec | None, data: DataSpec
) -> ModelSpec:
    """The architecture for a table's records: a fully connected network by default."""
    kind = settings.malicious.partition(":")[0]
    if kind in ("imprint", "loki", "ares"):
        raise InputError(f"--malicious {kind}: is for images; for records: trap:RECORDS")
    if described is None:
        return ModelSpec(
            arch=settings.arch or RECORDS_ARCH,
            n_classes=data.n_classes,
            width=settings.width,
            features=data.shape[0],
        )
    _check_described(settings, described)
    if (described.features, described.n_classes) != (data.shape[0], data.n_classes):
        raise InputError(f"--pretrained: {settings.pretrained} is of a model for other records")
    return described


def _check_described(settings: ModelSettings, described: ModelSpec) -> None:
    """Refuse flags that contradict what the checkpoint says about its model."""
    for name in ("arch", "stem", "width", "norm"):
        value, stated = getattr(settings, name), getattr(described, name)
        if value is not None and value != stated:
            raise InputError(f"--{name} {value}: the model in {settings.pretrained} has {stated}")


def _suit_privacy(
    spec: ModelSpec, settings: ExtractSettings, process: Process
) -> tuple[ModelSpec, ClientSettings]:
    """Make per-sample gradients well defined: no layer may mix the images of a batch.

    An initial model gets GroupNorm, as in training with DP-SGD. Given parameters
    belong to BatchNorm, which then runs with its running statistics.
    """
    client, privacy = settings.client, settings.client.privacy
    per_sample = privacy is not None and privacy.clipping == PER_SAMPLE
    if not (per_sample and client.train_mode and batch_norm_layers(skeleton_of(spec))):
        return spec, client
    if settings.model.norm == "batch":
        raise InputError(
            "--norm batch with --enable-dp: train-mode BatchNorm mixes the images of a batch, so "
            "that none can be clipped alone; use --norm group, --model-eval or --dp-clipping batch"
        )
    if settings.model.pretrained is None:
        _say(process, "per-sample clipping: BatchNorm is replaced by GroupNorm")
        return dataclasses.replace(spec, norm="group"), client
    _say(process, "per-sample clipping: BatchNorm runs with its running statistics (eval mode)")
    return spec, dataclasses.replace(client, train_mode=False)


def needs_our_stem(spec: ModelSpec) -> bool:
    """Whether its parameters have other shapes than with torchvision's own stem.

    The original tools know no other stem, and cannot load them.
    """
    if spec.stem == "imagenet" or spec.width is not None:
        return False
    own, other = (skeleton_of(s) for s in (spec, dataclasses.replace(spec, stem="imagenet")))
    shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (own, other)]
    return shapes[0] != shapes[1]


def _say(process: Process, sentence: str) -> None:
    if process.is_main:
        print(sentence)


def _choose(settings: ExtractSettings, data: DataSets) -> list[int]:
    """Which training images are the client's, or those of the clients that take part in turn."""
    batch, images, clients = settings.batch, data.train_plain, settings.aggregation
    size = batch.size * clients.clients
    if batch.duplicates is None:
        chosen = batch_indices(len(images), size, batch.index, settings.seed)
    else:
        chosen = duplicate_label_indices(
            images.labels, size, batch.duplicates, batch.index, settings.seed
        )
    return [chosen[place] for place in clients.places(batch.size)]


def _rank_analysis(
    model: nn.Module, data: DataSpec, settings: ExtractSettings, process: Process
) -> list[LayerRank]:
    if not settings.rank_analysis or not process.is_main:
        return []
    layers = rank_analysis(model, data.shape, settings.images)
    print(format_table(layers))
    return layers
