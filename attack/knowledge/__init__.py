"""What the attacker knows or finds out: threat models, labels, the client's defenses."""

from attack.knowledge import answers as answers
