"""The rows: which published value stands beside which experiment."""

from __future__ import annotations

import functools

from benchmarks.fidelity.beside import (
    Breaching,
    BreachingApril,
    BreachingChain,
    BreachingImprint,
)
from benchmarks.fidelity.beside_tableak import TabLeakOfItsAuthors
from benchmarks.fidelity.beside_text import (
    BERT,
    TRANSFORMER3,
    BreachingDecepticons,
    BreachingTextImprint,
)
from benchmarks.fidelity.declare import Published, Row
from benchmarks.fidelity.experiments import (
    ImageAttack,
    Labels,
    MaliciousTextAttack,
    RecordAttack,
    TextAttack,
    Value,
    alone_in_a_bin,
    recovered_exactly,
)
from benchmarks.fidelity.networks import (
    GPT2_TOKENS,
    Transformer3,
    bert_base,
    gpt2_base,
    lenet5,
    tableak_network,
)
from benchmarks.fidelity.samples import IMAGENET
from core.errors import InputError
from core.models.building import ModelSpec

BREACHING = "https://github.com/JonasGeiping/breaching"
IG = "https://arxiv.org/abs/2003.14053"
IG_SPREAD = "mean and deviation of 100 images"
SURVEY = "quoted of a survey; its setting is not known to us in full"
JPEG = "CIFAR-10 from JPEG files; initial parameters of its own for every image"
OTHER_IMAGES = "images of ImageNet of another choice"


def _small(arch: str, width: int | None = None, malicious: str = "") -> ModelSpec:
    """A network for CIFAR-10."""
    return ModelSpec(arch, image_size=32, stem="cifar", width=width, malicious=malicious)


def _imagenet(arch: str) -> ModelSpec:
    return ModelSpec(arch, image_size=224, stem="imagenet")


_CONVNET, _RESNET18, _LENET = _small("convnet", 64), _small("resnet18"), _small("lenet")
_BEYOND: dict[str, Value] = {"joint_labels": False, "tv": 1e-4, "tv_kind": "isotropic", "box": True}
_ABLATION: dict[str, dict[str, Value]] = {
    "gradient": {"tv": 0.0, "input_norm": 0.0, "bn": 0.0, "restarts": 1, "group": 0.0},
    "+ TV": {"bn": 0.0, "restarts": 1, "group": 0.0},
    "+ BN": {"restarts": 1, "group": 0.0},
    "+ group": {},
}


def _notebook(name: str) -> tuple[str, str]:
    """Where and address of a notebook of `breaching`."""
    return f"output of examples/{name}.ipynb, commit 8bd99d5", BREACHING


_APRIL = Published(
    23.90,
    "dB",
    *_notebook("APRIL  - Analytic Attack - Vision Transformer on ImageNet"),
    note="one image, ViT-S/16 with trained weights",
)


def _april(width: int) -> ImageAttack:
    """APRIL on a vision transformer of so many channels."""
    model = ModelSpec("vit_april", image_size=128, width=width)
    return ImageAttack("april", model, same=BreachingApril(), kind=IMAGENET)


_EXACT = (
    Row(
        "r-gap",
        "r-gap",
        "cnn6, untrained, CIFAR-10, batch 1, float32, labels given",
        Published(
            49.01,
            "dB",
            *_notebook("R-GAP  - Recursive Attack - Small ConvNet on CIFAR-10"),
            note="one image",
        ),
        ImageAttack("r-gap", _small("cnn6"), same=BreachingChain("rgap")),
        seconds=75,
        differs=JPEG + "; solved in float64, there in float32",
    ),
    Row(
        "april",
        "april",
        "vision transformer whose patches of 16 x 16 x 3 fit its 768 channels, untrained, batch 1",
        _APRIL,
        _april(768),
        seconds=10,
        differs="ViT-B/16's embedding, 128 px, two blocks, untrained; " + OTHER_IMAGES,
        incomparable="the published ViT-S has 384 channels for the 768 values of a patch, which "
        "its closed form cannot tell apart; see april-small",
    ),
    Row(
        "april-small",
        "april",
        "vision transformer of 384 channels for patches of 768 values, untrained, batch 1",
        _APRIL,
        _april(384),
        seconds=5,
        differs="untrained, 128 px, two blocks; " + OTHER_IMAGES,
        incomparable="half of a patch lies in directions that the embedding does not see; a "
        "trained one sees those in which images differ, a random one does not",
    ),
    Row(
        "robbing-the-fed",
        "robbing-the-fed",
        "imprint block of 512 bins in front of a ResNet-18, untrained, batch 64, float32; the "
        "images that are alone in their bin",
        Published(
            47.08,
            "dB",
            *_notebook(
                "Robbing The Fed -  Analytic Attack - Malicious Model on ImageNet - One Shot "
                "Attack against arbitrary aggregation"
            ),
            note="the one image found of 128 x 256",
        ),
        ImageAttack(
            "robbing-the-fed",
            _small("resnet18", 16, "imprint:512"),
            batch=64,
            measure=alone_in_a_bin,
            same=BreachingImprint(),
        ),
        seconds=20,
        differs="CIFAR-10 at batch 64 and bins by brightness, there two bins by a Fourier "
        "feature on ImageNet at 224 px and 32,768 images, whose sum in float32 limits the value",
    ),
    *(
        Row(
            f"trap-weights-{batch}",
            "trap-weights",
            f"fully connected network of 1,000 neurons, CIFAR-10, batch {batch}, float64, one "
            "record per trap",
            Published(
                value,
                "share",
                "as reported of the repository",
                "https://github.com/SaeedShariati/Gradient-Inversion-via-LT-Codes",
                opened=False,
                note="of the images, recovered exactly",
            ),
            ImageAttack(
                "trap-weights",
                _small("mlp", 1000, "trap:1"),
                batch=batch,
                double=True,
                measure=recovered_exactly,
            ),
            seconds=30,
            differs=JPEG + "; biases from quantiles of public images, there half of the weights "
            "scaled down (biases at zero)",
            below="images of low contrast are furthest out in no direction: of 16 images of three "
            "batches that are not found 13 activate no neuron, and 14 are among the sixth of "
            "lowest contrast",
        )
        for batch, value in ((64, 0.994), (128, 0.666), (256, 0.215))
    ),
    *(
        Row(
            f"{name}-{batch}",
            name,
            f"fully connected ReLU network of two layers of 200 neurons, untrained, CIFAR-10, "
            f"batch {batch}, float64; {setting}",
            Published(
                1.0,
                "share",
                "abstract: exact up to batches of about 25",
                "https://arxiv.org/abs/2403.03945",
                note="of the images, recovered exactly",
            ),
            ImageAttack(
                name,
                _small("mlp", 200),
                {"time_budget": float(budget)},
                batch=batch,
                double=True,
                measure=recovered_exactly,
            ),
            seconds=budget / 2,
            differs=JPEG,
            below=below,
            gpu_hours=hours,
        )
        for name, batch, setting, budget, below, hours in (
            (
                "spear",
                8,
                "the published search, a minute",
                60,
                "",
                0.0,
            ),
            (
                "spear",
                20,
                "the published search, an hour",
                3600,
                "its time doubles with every image; the paper samples on a GPU",
                1.5,
            ),
            (
                "spear-descent",
                20,
                "this project's search, a minute",
                60,
                "the minute ends some searches",
                0.0,
            ),
            (
                "spear-descent",
                24,
                "this project's search, a minute",
                60,
                "the minute ends some searches",
                0.0,
            ),
        )
    ),
)

_LABELS = tuple(
    Row(
        f"labels-{rule}",
        f"labels:{rule}",
        f"LeNet-5, untrained, batch {batch}, labels at random from 100 classes",
        Published(
            value, "share", where, address, opened=False,
            note="of the labels",
        ),
        Labels(rule, lenet5, batch, 100),
        seconds=2,
        differs="images of CIFAR-10 under labels of 100 classes, of which an untrained network "
        "knows nothing, for CIFAR-100",
        below=below,
        trials=24,
    )
    for rule, batch, value, where, address, below in (
        (
            "idlg", 1, 1.0, "table 1 (accuracy of the label)", "https://arxiv.org/abs/2001.02610",
            "",
        ),
        (
            "llg", 24, 1.0, "as reported for batches of 24",
            "https://openreview.net/forum?id=FIrQfNSOoTr",
            "every class is found, but how often one repeats is estimated, and one or two of 24 "
            "counts are wrong in some batches",
        ),
        (
            "ilrg", 24, 1.0, "as reported for batches of 24",
            "https://openreview.net/forum?id=FIrQfNSOoTr", "",
        ),
    )
)  # fmt: skip

_SMALL_NETWORKS = (
    Row(
        "dlg-lenet",
        "dlg",
        "LeNet (sigmoid), untrained, CIFAR-10, batch 1, L-BFGS on the squared distance, 300 "
        "iterations (less where 10 of them bring nothing), best of 4 starts, labels optimised",
        Published(
            46.25,
            "dB",
            "table 1, Euclidean loss with L-BFGS, LeNet (Zhu), untrained",
            IG,
            opened=False,
            note=f"deviation 12.66; {IG_SPREAD}",
        ),
        ImageAttack(
            "dlg",
            _LENET,
            {"restarts": 4, "patience": 10},
            labels="optimised",
            same=Breaching(
                "deepleakage",
                ("optim.max_iterations=100", "restarts.num_trials=4"),
                labelled=False,
            ),
        ),
        seconds=150,
        differs=JPEG + "; labels optimised, there given or optimised; restarts not stated",
    ),
    Row(
        "idlg-lenet",
        "idlg",
        "LeNet (sigmoid), untrained, CIFAR-10, batch 1, L-BFGS on the squared distance, 300 "
        "iterations (less where 10 of them bring nothing), best of 4 starts, label by its sign",
        Published(
            46.25,
            "dB",
            "table 1, Euclidean loss with L-BFGS, LeNet (Zhu), untrained",
            IG,
            opened=False,
            note=f"deviation 12.66; {IG_SPREAD}",
        ),
        ImageAttack("idlg", _LENET, {"restarts": 4, "patience": 10}, labels="recovered"),
        seconds=150,
        differs=JPEG + "; restarts not stated",
    ),
    Row(
        "inverting-gradients-lenet",
        "inverting-gradients",
        "LeNet (sigmoid), untrained, CIFAR-10, batch 1, cosine, signed Adam 0.1, 4800 iterations, "
        "total variation 1e-4, one start, labels given",
        Published(
            18.00,
            "dB",
            "table 1, proposed, LeNet (Zhu), untrained",
            IG,
            opened=False,
            note=f"deviation 3.33; {IG_SPREAD}",
        ),
        ImageAttack(
            "inverting-gradients",
            _LENET,
            {"iterations": 4800, "tv": 1e-4},
            same=Breaching(
                "invertinggradients",
                ("optim.max_iterations=4800", "regularization.total_variation.scale=0.0002"),
            ),
        ),
        seconds=60,
        differs=JPEG + "; total variation as by default in the paper's program",
        below="where the second implementation ran on the same gradients it finds as much; the "
        "table's total variation and restarts are not stated where we read them",
    ),
)

_OTHER_TEXT = (
    "tokens of Python's documentation among the model's 50,257 for WikiText; some sentences share "
    "their beginning"
)
_TEXT = (
    Row(
        "dager",
        "dager",
        "GPT-2 of 12 layers and width 768, batch 4, sentences of 16 tokens, next-token loss",
        Published(
            1.0,
            "share",
            "ROUGE-1 and -2 above .99 (abstract)",
            "https://arxiv.org/abs/2405.15586",
            note="ROUGE-1, full batches of GPT-2",
        ),
        TextAttack("dager", gpt2_base, 4, 16, "rouge1"),
        seconds=60,
        differs="random weights, a vocabulary of 4,096 tokens, Python's documentation for SST-2",
    ),
    Row(
        "tag",
        "tag",
        "transformer3, random weights, one sentence of 16 tokens, 1,000 iterations, one start",
        Published(
            0.875,
            "share",
            *_notebook("TAG - Optimization-based Attack - FL-Transformer for Causal LM"),
            note="tokens in their place, one sentence",
        ),
        TextAttack(
            "tag",
            functools.partial(Transformer3, GPT2_TOKENS),
            1,
            16,
            "tokens_placed",
            same=Breaching("tag", labelled=False),
        ),
        seconds=120,
        differs="tokens of Python's documentation among the model's 50,257 for WikiText; units "
        "and schedule of the learning rate",
    ),
    Row(
        "decepticons",
        "decepticons",
        "transformer3, random weights, batch 8, sentences of 32 tokens, next-token loss, 16 "
        "features that name a sentence",
        Published(
            0.887,
            "share",
            *_notebook("Decepticons -  Analytic Attack - Transformer Model on Wikitext"),
            opened=False,
            note="tokens in their place, 8 sentences of 32 tokens",
        ),
        MaliciousTextAttack(
            "decepticons",
            functools.partial(Transformer3, GPT2_TOKENS),
            8,
            32,
            "tokens_placed",
            malicious="decepticons:16",
            server=BreachingDecepticons(TRANSFORMER3, 6),
        ),
        seconds=60,
        differs=_OTHER_TEXT + "; every network measures along a direction of its own, and the "
        "last token is read off the last layer. The second implementation has its own server, "
        "from the same parameters and on the same sentences",
    ),
    Row(
        "decepticons-bert",
        "decepticons",
        "BERT base from its configuration (12 layers, width 768, 30,522 tokens), random weights, "
        "one text of 512 tokens, 32 features that name a sentence",
        Published(
            0.910,
            "share",
            *_notebook("Decepticons -  Analytic Attack - BERT on Wikitext"),
            note="tokens in their place, of masked language modelling; .955 and .964 of the "
            "tokens anywhere",
        ),
        MaliciousTextAttack(
            "decepticons",
            bert_base,
            1,
            512,
            "tokens_placed",
            malicious="decepticons:32",
            server=BreachingDecepticons(
                BERT,
                32,
                (
                    ("reset_embedding", True),
                    ("eps", 1e-8),
                    ("measurement_scale", 1e8),
                    ("softmax_skew", 1e8),
                ),
                ("token_strategy=embedding-norm", "embedding_token_weight=0.25"),
            ),
        ),
        seconds=300,
        differs="tokens of Python's documentation among the model's 30,522 for WikiText, running "
        "on over the ends of sentences; every token has a next-token loss, for both "
        "implementations, where a masked one has it there",
    ),
    Row(
        "robbing-the-fed-text",
        "robbing-the-fed-text",
        "transformer3, random weights, batch 128, sentences of 32 tokens, imprint block of 512 "
        "bins behind the embedding",
        Published(
            0.888,
            "share",
            *_notebook("Robbing The Fed -  Analytic Attack - Malicious Model on Wikitext"),
            opened=False,
            note="tokens in their place, 128 sentences of 32 tokens",
        ),
        MaliciousTextAttack(
            "robbing-the-fed-text",
            functools.partial(Transformer3, GPT2_TOKENS),
            128,
            32,
            "tokens_placed",
            malicious="imprint:512",
            same=BreachingTextImprint(),
        ),
        seconds=60,
        differs=_OTHER_TEXT,
        below="of 128 sentences in 512 bins that are equally likely, 78 % are alone in "
        "expectation and come out whole; the published value is of one batch",
    ),
)

_TABLEAK = "fully connected network of 100-100 neurons, untrained, batch 32"
_TABLEAK_PUBLISHED = Published(
    0.10,
    "share",
    "README (10 points above the baseline)",
    "https://github.com/eth-sri/tableak",
    opened=False,
    note="of cells, above a guess, on Adult",
)
_TABLEAK_DIFFERS = "categories are 0 and 1 and not standardised, for both implementations"

_RECORDS = (
    Row(
        "tableak",
        "tableak",
        f"{_TABLEAK}, 1,500 iterations, 30 starts",
        _TABLEAK_PUBLISHED,
        RecordAttack("tableak", "randhie", tableak_network, 32),
        seconds=120,
        differs="the table randhie of statsmodels for Adult",
        incomparable="another table, of fewer categories, on which a guess gets more right",
    ),
    Row(
        "tableak-adult",
        "tableak",
        f"Adult, {_TABLEAK}, 1,500 iterations, 30 starts",
        _TABLEAK_PUBLISHED,
        RecordAttack(
            "tableak",
            "adult",
            tableak_network,
            32,
            needs=("adult.data",),
            same=TabLeakOfItsAuthors(),
        ),
        seconds=400,
        differs=_TABLEAK_DIFFERS,
    ),
    Row(
        "tableak-adult-short",
        "tableak",
        f"Adult, {_TABLEAK}, 300 iterations, 10 starts",
        _TABLEAK_PUBLISHED,
        RecordAttack(
            "tableak",
            "adult",
            tableak_network,
            32,
            {"iterations": 300, "restarts": 10},
            needs=("adult.data",),
            same=TabLeakOfItsAuthors(iterations=300, starts=10),
        ),
        seconds=30,
        differs=f"a fifth of the iterations and a third of the starts; {_TABLEAK_DIFFERS}",
        incomparable="fewer iterations and starts than published; beside the authors' code",
    ),
)

_BY_GPU = (
    Row(
        "dlg-convnet",
        "dlg",
        "ConvNet of width 64, untrained, CIFAR-10, batch 1, L-BFGS, 1,200 iterations, one start, "
        "labels optimised",
        Published(
            23.41, "dB",
            *_notebook(
                "Deep Leakage from Gradients - Optimization-based Attack - ConvNet CIFAR-10"
            ),
            note="one image",
        ),
        ImageAttack(
            "dlg", _CONVNET, {"iterations": 1200}, labels="optimised",
            same=Breaching("deepleakage", labelled=False),
        ),
        seconds=10800,
        differs=JPEG,
        gpu_hours=4,
    ),
    Row(
        "beyond-inferring-convnet",
        "dlg",
        "ConvNet of width 64, untrained, CIFAR-10, batch 1, L-BFGS, 400 iterations, total "
        "variation 1e-4, boxed, one start, labels given",
        Published(
            24.06, "dB",
            *_notebook(
                "Beyond Inferring Class Representatives - Optimization-based Attack - ConvNet "
                "CIFAR-10"
            ),
            note="one image; by Wang et al.'s attack, often quoted as Inverting Gradients",
        ),
        ImageAttack(
            "dlg", _CONVNET, {**_BEYOND, "iterations": 400},
            same=Breaching("beyondinfering", ("regularization.total_variation.scale=1e-4",)),
        ),
        seconds=3600,
        differs=JPEG + "; isotropic total variation, there its 1.25th power",
        gpu_hours=2,
    ),
    Row(
        "inverting-gradients-resnet18",
        "inverting-gradients",
        "ResNet-18 of width 64, untrained, CIFAR-10, batch 1, cosine, signed Adam 0.1, 24,000 "
        "iterations, total variation 1e-4, labels given",
        Published(22.03, "dB", SURVEY, IG, opened=False),
        ImageAttack(
            "inverting-gradients", _RESNET18, {"tv": 1e-4},
            same=Breaching(
                "invertinggradients", ("regularization.total_variation.scale=0.0002",)
            ),
        ),
        seconds=7200,
        differs=JPEG,
        gpu_hours=3,
    ),
    Row(
        "inverting-gradients-fedavg",
        "inverting-gradients-fedavg",
        "ResNet-18 of width 64, untrained, CIFAR-10, 4 images, 4 local steps of 2 images, rate "
        "0.001, 24,000 iterations, total variation 1e-3, labels given",
        Published(
            20.78, "dB",
            *_notebook(
                "Inverting Gradients - Optimization-based Attack - ResNet18 on ImageNet - "
                "Federated Averaging"
            ),
            note="four images of one client",
        ),
        ImageAttack(
            "inverting-gradients-fedavg", _RESNET18, {"iterations": 24000, "tv": 5e-4}, batch=4,
            local="sgd lr=0.001 batches=2 epochs=2",
        ),
        seconds=40000,
        differs=JPEG + "; total variation 5e-4, which is 1e-3 of the mean of both directions",
        gpu_hours=12,
    ),
    Row(
        "inverting-gradients-imagenet",
        "inverting-gradients",
        "ResNet-18, trained on ImageNet, 224 px, batch 1, 24,000 iterations, total variation "
        "1e-1, labels given",
        Published(
            14.21, "dB",
            *_notebook("Inverting Gradients - Optimization-based Attack - ResNet18 on ImageNet"),
            note="one image",
        ),
        ImageAttack(
            "inverting-gradients", _imagenet("resnet18"), weights="resnet18", kind=IMAGENET,
            same=Breaching("invertinggradients"),
        ),
        seconds=40000,
        differs=OTHER_IMAGES,
        gpu_hours=4,
    ),
    Row(
        "modern",
        "modern",
        "ResNet-18, trained on ImageNet, 224 px, batch 1, 24,000 iterations, BatchNorm 1e-4",
        Published(
            12.04, "dB",
            *_notebook("Modern Hyperparameters - Optimization-based Attack - ResNet18 on ImageNet"),
            note="one image",
        ),
        ImageAttack(
            "modern", _imagenet("resnet18"), {"bn": 1e-4}, weights="resnet18", kind=IMAGENET,
            same=Breaching("modern", ("regularization.deep_inversion.scale=1e-4",)),
        ),
        seconds=40000,
        differs=OTHER_IMAGES,
        gpu_hours=4,
    ),
    *(
        Row(
            f"gradinversion-{number}",
            "gradinversion",
            f"ResNet-50, trained on ImageNet, 224 px, batch 8, 20,000 iterations, ablation: "
            f"{terms}",
            Published(
                12.93, "dB", "table of the comparison, all terms",
                "https://arxiv.org/abs/2104.07586", opened=False, note="LPIPS .484, batch 8",
            ),
            ImageAttack(
                "gradinversion", _imagenet("resnet50"), settings, batch=8, weights="resnet50",
                kind=IMAGENET,
            ),
            seconds=400000,
            differs=OTHER_IMAGES + "; registration by translation, not by a trained network",
            incomparable="" if terms == "+ group" else "the value is published for all terms",
            gpu_hours=hours,
        )
        for number, (terms, settings), hours in zip(
            range(1, 5), _ABLATION.items(), (12, 12, 12, 90), strict=True
        )
    ),
    Row(
        "e2egi",
        "e2egi",
        "ResNet-50 of MoCo v2, 224 px, batch 8, exact batch statistics, 24,000 iterations, 8 seeds",
        Published(
            12.93, "dB", "GradInversion's value, which the paper compares with",
            "https://doi.org/10.1109/JBHI.2022.3204455", opened=False,
        ),
        None,
        command="python -m benchmarks gradinversion_ablation --preset paper",
        differs=OTHER_IMAGES,
        incomparable="its own table was not open to us",
        gpu_hours=100,
    ),
    Row(
        "fishing",
        "fishing",
        "ResNet-18, trained on ImageNet, 224 px, batch 256 of 32 clients' images, feature fishing",
        Published(
            20.23, "dB",
            *_notebook(
                "Fishing for User Data - Meta Optimization-based Attack - Feature Fishing "
                "Cross-Silo"
            ),
            note="the best image's registered PSNR",
        ),
        ImageAttack(
            "fishing",
            ModelSpec("resnet18", image_size=224, malicious="fishing-feature:0"),
            batch=50, weights="resnet18", kind=IMAGENET,
        ),
        seconds=40000,
        differs=OTHER_IMAGES,
        incomparable="published is the best image's PSNR after registration, ours all images'",
        gpu_hours=4,
    ),
    *(
        Row(
            f"rdlv-round-{number}",
            "hatamizadeh",
            f"federation of nine clients with chest X-rays, the client of a single image, round "
            f"{number}, ResNet-18 at 224 px, 40,000 iterations",
            Published(
                value, "share", "figure of RDLV by round", "https://arxiv.org/abs/2202.06924",
                opened=False, note="relative data leakage value",
            ),
            None,
            command="python -m benchmarks rdlv_rounds --preset paper",
            differs="chest X-rays that the user has",
            gpu_hours=20,
        )
        for number, value in ((20, 0.70), (40, 0.50), (60, 0.42), (80, 0.56))
    ),
)  # fmt: skip

ROWS: tuple[Row, ...] = (*_EXACT, *_LABELS, *_SMALL_NETWORKS, *_TEXT, *_RECORDS, *_BY_GPU)


def find_row(name: str) -> Row:
    """The row of that name.

    Raises:
        InputError: There is none.
    """
    found = {row.name: row for row in ROWS}
    if name not in found:
        raise InputError(f"--only {name}: there is no such row; known are {', '.join(found)}")
    return found[name]
