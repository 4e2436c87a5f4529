"""The models: one module each, chosen by `model.name`.

A new model is a module with a config and a network, an entry in `ModelConfig`, and a branch in
`build_model`.
"""

from pipeline.models.autoencoder import Autoencoder, AutoencoderConfig
from pipeline.models.recurrent import RecurrentSeq2Seq
from pipeline.models.seq2seq import Memory, Seq2Seq, Seq2SeqConfig, State
from pipeline.models.transformer import TransformerSeq2Seq

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "Memory",
    "ModelConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "State",
    "build_model",
]

ModelConfig = Seq2SeqConfig | AutoencoderConfig


def build_model(
    config: ModelConfig,
    *,
    image_channels: int,
    image_height: int,
    image_width: int,
    vocab_size: int | None,
) -> Seq2Seq | Autoencoder:
    """A freshly initialised model for images of this shape; the weights use torch's default RNG.

    Raises:
        ValueError: a seq2seq model for a dataset without a tokenizer (`vocab_size` is None).
    """
    match config:
        case Seq2SeqConfig():
            if vocab_size is None:
                raise ValueError(
                    'model.name = "seq2seq" learns to write code, and this dataset has no '
                    "tokenizer: pack images with their code (`pack --kind pairs`), or set "
                    'model.name = "autoencoder"'
                )
            kind = TransformerSeq2Seq if config.decoder == "transformer" else RecurrentSeq2Seq
            return kind(config, image_channels, image_height, image_width, vocab_size)
        case AutoencoderConfig():
            return Autoencoder(config, image_channels, image_height, image_width)
