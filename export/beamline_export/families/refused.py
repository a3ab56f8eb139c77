"""Model types of transformers that people may try and that no family here is, with the reason."""

from collections.abc import Mapping

_OTHER_DECODER = (
    "a decoder alone whose layers differ from those that the graphs have; of decoders, GPT-2, GPT-NeoX, OPT, Llama, "
    "Mistral and Qwen2 are known; serve it with a server for language models"
)
_SPARSE_DECODER = (
    "its layers are mixtures of experts, which the graphs do not have; serve it with a server for language models"
)
_ENCODER_ONLY = "an encoder alone, which generates nothing; it needs no beam search, and transformers run it"
_AUDIO = "its source is audio, not tokens; run it with transformers"
_IMAGES = "its source is an image, not tokens; run it with transformers"
_SPARSE = "its encoder's attention is sparse, and the graphs have full attention; run it with transformers"
_EXPERTS = (
    "its layers are mixtures of experts, which the graphs do not have; use a dense model such as NLLB-200 distilled"
)
_STREAMS = "its decoder predicts n-grams by attention in several streams, which the graphs do not have; fine-tune BART"
_TWO_MODELS = (
    "it joins two models of any kind, with an attention of their own; train one encoder-decoder model such as BART"
)

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("longt5", "led", "bigbird_pegasus", "pegasus_x"), _SPARSE),
    **dict.fromkeys(("switch_transformers", "nllb-moe"), _EXPERTS),
    **dict.fromkeys(("prophetnet", "xlm-prophetnet"), _STREAMS),
    **dict.fromkeys(("encoder-decoder", "rag"), _TWO_MODELS),
    **dict.fromkeys(
        (
            "whisper",
            "speech_to_text",
            "speech_to_text_2",
            "speech-encoder-decoder",
            "speecht5",
            "seamless_m4t",
            "seamless_m4t_v2",
            "moonshine",
            "wav2vec2",
        ),
        _AUDIO,
    ),
    **dict.fromkeys(("vision-encoder-decoder", "pix2struct", "trocr", "udop", "donut-swin", "blip"), _IMAGES),
    "t5gemma": (
        "its layers (rotary positions, grouped queries) are those of a language model, which the graphs do not have; "
        "run it with transformers"
    ),
    **dict.fromkeys(
        (
            "gpt_neo",
            "gptj",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "phi",
            "phi3",
            "falcon",
            "bloom",
            "xglm",
            "biogpt",
            "mpt",
            "olmo2",
        ),
        _OTHER_DECODER,
    ),
    **dict.fromkeys(("gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"), _SPARSE_DECODER),
    **dict.fromkeys(
        (
            "bert",
            "roberta",
            "distilbert",
            "albert",
            "electra",
            "camembert",
            "xlm-roberta",
            "deberta",
            "deberta-v2",
            "mpnet",
            "modernbert",
            "longformer",
            "big_bird",
        ),
        _ENCODER_ONLY,
    ),
}
"""`model_type` -> why there is no family for it, and what to do."""
