"""Mechanism every script shares: configuration, ranks, optimisation, checkpoints, logs, metrics."""
