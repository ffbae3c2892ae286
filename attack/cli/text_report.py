"""What an attack on text leaves behind: the sentences beside the true ones, differences marked."""

from __future__ import annotations

from pathlib import Path

import torch

from attack.knowledge.labels import label_accuracy
from attack.metrics import Evaluation, evaluate_text
from attack.metrics.worst_case import worst_case
from attack.reconstruction import Reconstruction
from attack.record import AttackRecord
from attack.recovered import Recovered, recovered_sentences, text_pieces
from core.data.specs import DataSpec
from core.losses import Targets, main_output
from core.models.unchanged import in_mode
from core.storage import write_text
from core.target import Target, Truth

PAGE = "reconstruction.html"
# What stands around words that are wrong, in a terminal.
WRONG = ("[", "]")


def measure_text(
    target: Target, truth: Truth, found: Reconstruction, record: AttackRecord, folder: Path
) -> None:
    """Compare with the truth, and write both to a page.

    Args:
        target: What was attacked.
        truth: What lies behind it.
        found: What came out.
        record: Takes the evaluation and its tables.
        folder: Of the run.
    """
    guesses = {}
    if target.loss.targets is Targets.TOKENS:
        guesses["the model's own sample"] = sample(target)
    evaluation = evaluate_text(found.images, found.labels, truth, target.data, guesses=guesses)
    record.evaluation = evaluation.to_record()
    record.tables.append(evaluation.render())
    if target.loss.targets is not Targets.TOKENS:
        record.label_accuracy = label_accuracy(found.labels, truth.labels)
        record.tables.append(f"label accuracy {record.label_accuracy:.3f}")
    if found.members:
        worst = worst_case(
            {
                name: evaluate_text(member.images, member.labels, truth, target.data)
                for name, member in found.members.items()
            }
        )
        record.worst_case = worst.to_record()
        record.tables.append(worst.to_table(("tokens_placed", "sentence_exact")).get_string())
    read = found.images[evaluation.order]
    record.tables.append(as_lines(truth.images, read, target.data))
    record.details = {**record.details, "text": [target.data.text(ids) for ids in read]}
    recovered = recovered_sentences(truth.images, read, target.data, evaluation)
    write_recovered(recovered, record, evaluation, folder)


def write_recovered(
    recovered: Recovered, record: AttackRecord, evaluation: Evaluation, folder: Path
) -> None:
    """Keep sentences or records beside the true ones in the record, and write them to a page.

    Args:
        recovered: A bounded part of the batch.
        record: Takes it.
        evaluation: Of the whole batch, for the page.
        folder: Of the run.
    """
    record.recovered = recovered.to_record()
    title = f"{record.attack}: recovered beside true"
    write_text(folder / PAGE, recovered.to_page(title, evaluation.render()))


def sample(target: Target, seed: int = 0) -> torch.Tensor:
    """Sentences (N x T) that the client's language model writes by itself, from random tokens."""
    model = in_mode(target.build_model(), False)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(target.data.n_tokens, (target.batch_size, 1), generator=generator)
    ids = first
    with torch.no_grad():
        for _ in range(target.data.shape[0] - 1):
            logits = main_output(model(ids))[:, -1, : target.data.n_tokens].float()
            if target.data.pad is not None:
                logits[:, target.data.pad] = -torch.inf
            chances = logits.softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return ids


def as_lines(true: torch.Tensor, found: torch.Tensor, data: DataSpec) -> str:
    """Every true sentence above the recovered one, in which wrong tokens are in brackets."""
    lines = []
    for original, ids in zip(true, found, strict=True):
        marked = "".join(
            piece.text if piece.right else f"{WRONG[0]}{piece.text}{WRONG[1]}"
            for piece in text_pieces(ids.tolist(), original.tolist(), data)
        )
        lines += [f"true      {data.text(original)}", f"recovered {marked}"]
    return "\n".join(lines)
