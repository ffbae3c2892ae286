"""Published module path of the learner."""
