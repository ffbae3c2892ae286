"""How many labels each rule recovers, on heads that read signed features and one that does not."""
