"""MarianMT checkpoints for CTranslate2 with the embedding that decoding starts from.

CTranslate2's converter takes it for granted that this embedding, which is the padding's, is zero, and leaves it out. It
is in Marian's own models; in those that transformers have trained, such as the embedded one, it is not, and what comes
out is another model, whose sentences lack their first words. With this loader, CTranslate2 in fp32 gives the tokens
that transformers give. Padding is then part of the vocabulary, and has to be suppressed.
"""

from typing import Any

from ctranslate2.converters import transformers as converters


class _StartsFromPadding(converters.MarianMTLoader):  # type: ignore[misc]  # the library has no types
    """Reads a MarianMT model as the library reads BART, which is the same but for the rules above."""

    def get_model_spec(self, model: Any) -> Any:
        """The model, with all rows of its embeddings."""
        model.config.normalize_before = model.config.normalize_embedding = False
        return super(converters.MarianMTLoader, self).get_model_spec(model)

    def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
        """Special tokens; decoding starts from padding."""
        super().set_config(config, model, tokenizer)
        config.decoder_start_token = tokenizer.pad_token

    def set_decoder(self, spec: Any, decoder: Any) -> None:
        """The decoder, which starts from an embedding."""
        super(converters.MarianMTLoader, self).set_decoder(spec, decoder)

    def get_vocabulary(self, model: Any, tokenizer: Any) -> Any:
        """All tokens, padding included."""
        return super(converters.MarianMTLoader, self).get_vocabulary(model, tokenizer)


def keep_the_start_embedding() -> None:
    """Have the library's converter read MarianMT models with this loader."""
    converters._MODEL_LOADERS["MarianConfig"] = _StartsFromPadding()
