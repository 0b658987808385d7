"""One file a benchmark: model and data in, scores and predictions out."""
