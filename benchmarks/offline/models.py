"""The models that everybody runs."""

FR_EN = "fr-en"
"""The embedded model, with its test file: real lengths, real stopping."""
BASE_16K, BASE_58K = "transformer-base 16k", "transformer-base 58k"
"""6 + 6 layers with random weights, by size of vocabulary; output of a fixed length."""
VOCABULARIES = {BASE_16K: 16_000, BASE_58K: 58_000}
EOS = 0
RANDOM_SENTENCES, RANDOM_TOKENS = 64, 16
"""Of the random models: sources, and tokens of each with end of sequence."""
FORCED_TOKENS = 32
"""That a random model generates for each."""
