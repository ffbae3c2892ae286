"""Label recovery: which classes, and how often each, are behind a shared gradient.

With cross-entropy, class i's row of the last layer's weight gradient is the mean over
samples of (p_i - [y = i]) times the embedding, and its bias gradient the mean of
(p_i - [y = i]): negative rows give classes away, their size how often they occur.

- `last_layer`: what was shared of the classification layer, and what reaches it;
- `registry`: rules by name, and what each of them assumes;
- `signs`, `counts`: the published rules;
- `other_losses`: findings and values instead of classes;
- `fit`, `exact`: the default, which tries hypotheses against the model;
- `recovery`: labels by a rule's name; `accuracy`: how many of them are right.
"""

# Importing a file registers its rules, in the order in which messages name them.
from attack.knowledge.labels import signs  # isort: skip
from attack.knowledge.labels import counts  # isort: skip
from attack.knowledge.labels import exact  # isort: skip
from attack.knowledge.labels.accuracy import accuracy_by_rule, label_accuracy
from attack.knowledge.labels.last_layer import LastLayer
from attack.knowledge.labels.recovery import (
    DEFAULT_RULE,
    broken_assumption,
    recover_labels,
    recover_most_exactly,
)
from attack.knowledge.labels.registry import register_rule, rule_names, rule_requires

__all__ = [
    "DEFAULT_RULE",
    "LastLayer",
    "accuracy_by_rule",
    "broken_assumption",
    "counts",
    "exact",
    "label_accuracy",
    "recover_labels",
    "recover_most_exactly",
    "register_rule",
    "rule_names",
    "rule_requires",
    "signs",
]
