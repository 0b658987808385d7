"""Small programs beside the training scripts; run them as python -m tools.NAME."""
