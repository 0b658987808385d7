"""HuBERT, base to extra large: speech in states that were trained to tell hidden units of sound."""

from model.encoders.speech import Speech


class Hubert(Speech):
    """HuBERT; what it reads and its options are those of Speech."""

    name = "hubert"
    hub = "TencentGameMate/chinese-hubert-large"  # whose mean over time is MER2023's voice; English: facebook/hubert-*
