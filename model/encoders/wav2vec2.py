"""wav2vec 2.0, base and large: speech in states that were trained to tell the sound that was hidden from them."""

from model.encoders.speech import Speech


class Wav2Vec2(Speech):
    """wav2vec 2.0; what it reads and its options are those of Speech."""

    name = "wav2vec2"
    hub = "facebook/wav2vec2-base"
