"""Networks: the language model with its adapters and decoding, encoders, fusion and alignment models."""
