"""A Flower app as a stranger has it: it knows nothing of audits."""
