"""Datasets, manifests, media decoding and feature stores."""
