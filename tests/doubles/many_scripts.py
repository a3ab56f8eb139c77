"""Lines in many scripts, with what tokenizers stumble over: emoji, control characters, odd spaces, zero widths."""

import random
from collections.abc import Iterator

_SCRIPTS = {
    "latin": (0x41, 0x17F),
    "greek": (0x391, 0x3C9),
    "cyrillic": (0x410, 0x44F),
    "armenian": (0x531, 0x586),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x620, 0x64A),
    "devanagari": (0x904, 0x94D),
    "bengali": (0x985, 0x9CD),
    "tamil": (0xB85, 0xBCD),
    "gujarati": (0xA85, 0xACD),
    "telugu": (0xC05, 0xC4D),
    "sinhala": (0xD85, 0xDC6),
    "lao": (0xE81, 0xEC4),
    "tibetan": (0xF40, 0xF6C),
    "myanmar": (0x1000, 0x103E),
    "ethiopic": (0x1200, 0x1248),
    "khmer": (0x1780, 0x17D2),
    "thai": (0xE01, 0xE4E),
    "georgian": (0x10D0, 0x10F0),
    "hangul": (0xAC00, 0xACFF),
    "hiragana": (0x3041, 0x3096),
    "katakana": (0x30A1, 0x30FA),
    "han": (0x4E00, 0x4EFF),
    "fullwidth": (0xFF01, 0xFF5E),
    "ligatures": (0xFB00, 0xFB06),
    "mathematical": (0x1D400, 0x1D433),
    "emoji": (0x1F600, 0x1F64F),
    "combining": (0x300, 0x36F),
}
_BETWEEN = [
    " ", "  ", "   ", "\t", "\u00a0", "\u3000", "\u2009", "\u200b", "\u200d", "\ufeff", "\u00ad", "\u0000", "\u0007",
    "\u001f", "\u007f", "\u0085", "\u2028", "\n", "\r\n", "-", "'", "’", "…", ", ", ". ", "!?", "@@", "▁", " ▁ ", "¿",
]  # fmt: skip
_SENTENCES = [
    "",
    " ",
    "\n",
    "the cat sat on the mat",
    "The CAT sat on the mat.",
    "  two spaces before, two after  ",
    "don't, won't, can't; it's 3.50 € (or $4)!",
    "bonjour le monde est grand",
    "L'été dernier, nous étions à Besançon…",
    "привет мир, как дела?",
    "你好 世界。今天天气很好！",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "こんにちは世界",
    "안녕하세요 세계",
    "👩‍👩‍👧‍👦 family 🇫🇷 flag 👍🏽",
    "a\u0301 e\u0300 and á è",
    "ﬁne ½ ² ℌ Å",
    "tabs\tand\nlines\r\nmixed",
    "def f(x): return x ** 2  # code",
]


def lines(count: int = 400, seed: int = 0) -> Iterator[str]:
    """Sentences, one line of each script, and mixtures."""
    yield from _SENTENCES
    rng = random.Random(seed)
    for name in _SCRIPTS:
        yield " ".join(_word(rng, name) for _ in range(6))
    for _ in range(count - len(_SENTENCES) - len(_SCRIPTS)):
        parts = []
        for _ in range(rng.randint(1, 7)):
            parts += [rng.choice(_SENTENCES) if rng.random() < 0.3 else _word(rng, rng.choice(list(_SCRIPTS)))]
            parts += [rng.choice(_BETWEEN) for _ in range(rng.randint(1, 2))]
        yield "".join(parts)


def _word(rng: random.Random, script: str) -> str:
    first, last = _SCRIPTS[script]
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8)))
