"""Reads a folder's tokenizer: its files, what it puts around a text, and which of its tokens leave no trace in text."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beamline_export.languages import SourceMarked, TargetBegins, opus_languages, read_languages
from beamline_export.spec import ExportError, SpecialTokenIds
from beamline_export.tokenizer_config import CONFIG_FILE, TokenizerConfig
from beamline_export.tokenizer_json import TokenizerJson, added_around, unreadable_tokenizer
from beamline_server.languages import Languages
from beamline_server.token_ids import default_special_ids, read_vocabulary

_MARIAN = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>"}
_ROBERTA |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
ROBERTA_CLASSES = ("BartTokenizer", "RobertaTokenizer")
_PLAIN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
_CLEAN_UP = "clean_up_tokenization_spaces"
_FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
_PREFIX_SPACE = "add_prefix_space"
_OTHER_KIND = (
    "tokenizer.json is read as it is; transformers' BartTokenizer would make byte pairs of it, without a normalizer: "
    f"name another tokenizer_class in {CONFIG_FILE}, such as PreTrainedTokenizerFast"
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer of a checkpoint, as far as a bundle tells it.

    Attributes:
        kind: As in the bundle's `TokenizerEntry`.
        files: Name in the bundle -> name in the checkpoint folder.
        settings: Further fields of the `TokenizerEntry`, those alone that are not what they are by default.
        tokens: The special tokens, with what stands around a source.
        without_effect: Settings that would change answers and do not, with their values.
        notices: What the user should know, a line each.
        languages: Those that requests can name; None if there are none.
        contents: Name in the bundle -> content of what the folder holds in another form only.
    """

    kind: str
    files: Mapping[str, str]
    settings: Mapping[str, object]
    tokens: SpecialTokenIds
    without_effect: Mapping[str, str] = field(default_factory=dict)
    notices: Sequence[str] = ()
    languages: Languages | None = None
    contents: Mapping[str, bytes] = field(default_factory=dict)


def without_tokenizer(
    tokens: SpecialTokenIds, *, source_bos: int | None = None, ends_sources: bool = True
) -> TokenizerFiles:
    """Of a folder that has none: sources are token ids, and end with the end of sequence that is no padding."""
    if not ends_sources:
        return TokenizerFiles("none", {}, {}, tokens)
    ends = [i for i in tokens.eos if i != tokens.pad] or list(tokens.eos)
    around = with_around(tokens, source_bos, ends[0] if ends else None)
    return TokenizerFiles("none", {}, {}, around)


def read_marian_tokenizer(
    folder: Path,
    files: Mapping[str, str],
    config: TokenizerConfig,
    tokens: SpecialTokenIds,
    *,
    defaults: Mapping[str, str] = _MARIAN,
    classes: Collection[str] = ("MarianTokenizer",),
) -> TokenizerFiles:
    """Two SentencePiece models and their vocabulary: `source </s>`.

    Args:
        folder: The checkpoint.
        files: As in `TokenizerFiles`; all are there.
        config: The tokenizer's settings.
        tokens: Special tokens as the decoder's settings have them.
        defaults: Special tokens where the settings name none.
        classes: Those of transformers that read as it is done here.

    Raises:
        ExportError: a vocabulary cannot be read, or has no end of sequence.
    """
    source = _vocabulary(folder / "vocab.json")
    target = _vocabulary(folder / "target_vocab.json") if "target_vocab.json" in files else source
    end = config.token("eos_token", _MARIAN["eos_token"])
    for token in (end, _MARIAN["unk_token"]):
        if token not in source:
            raise ExportError(f"{folder / 'vocab.json'} has no {token!r}; copy the vocabulary of this model")
    special = {target[token] for token in config.special(defaults) if token in target}
    # The server leaves <unk> out by itself.
    unknown = [target[token] for token in [_MARIAN["unk_token"]] if token in target]
    default = default_special_ids(dataclasses.asdict(tokens)).union(unknown)
    return TokenizerFiles(
        "marian",
        files,
        entry_settings(special, default, clean=config.flags.get(_CLEAN_UP, False)),
        with_around(tokens, None, source[end]),
        settings_without_effect(config, (), _MARIAN["unk_token"], classes),
        languages=opus_languages(source),
    )


def _vocabulary(file: Path) -> dict[str, int]:
    try:
        return read_vocabulary(file.name, file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable_tokenizer(file, error) from error


def read_bart_tokenizer(found: TokenizerJson, config: TokenizerConfig, tokens: SpecialTokenIds) -> TokenizerFiles:
    """A tokenizer.json: what its post-processor adds stands around a source.

    One that adds nothing gets `<s> source </s>` from BART's own class, and nothing from any other, as in transformers.
    Other arguments and errors are those of `read_marian_tokenizer`.

    Args:
        found: The file.
        config: The tokenizer's settings.
        tokens: Special tokens as the decoder's settings have them.
    """
    tokenizer = found.tokenizer
    known: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    roberta = (config.tokenizer_class or ROBERTA_CLASSES[0]).removesuffix("Fast") in ROBERTA_CLASSES
    before, after, notices = _around_bart(tokenizer, config, known, roberta=roberta)
    if roberta and not _is_byte_level(tokenizer):
        notices.append(_OTHER_KIND)
    without_effect = _prefix_space(tokenizer, config, False) if roberta else {}
    classes = (*ROBERTA_CLASSES, *_PLAIN_CLASSES)
    read = JsonFiles(found, config, tokens, _ROBERTA if roberta else {}, classes)
    return read.with_around(before, after, notices, without_effect=without_effect)


def read_tokenizer_as_it_is(
    folder: Path,
    found: TokenizerJson,
    config: TokenizerConfig,
    tokens: SpecialTokenIds,
    *,
    classes: Collection[str],
    target_begins: Mapping[SourceMarked, TargetBegins] | None,
) -> TokenizerFiles:
    """A tokenizer.json that says everything, and whose post-processor alone says what stands around a source.

    Other arguments and errors are those of `read_marian_tokenizer`.

    Args:
        folder: The checkpoint.
        found: The file.
        config: The tokenizer's settings.
        tokens: Special tokens as the decoder's settings have them.
        classes: Those of transformers that read it so.
        target_begins: How a target begins with its language, by where a source has the code of its own; empty for a
            family without languages; None for one whose texts, prompts, usually have nothing around them.
    """
    tokenizer = found.tokenizer
    before, after = added_around(tokenizer)
    notices = [] if before or after or target_begins is None else [_nothing_around(())]
    languages = _languages(folder, tokenizer, (before, after), target_begins or {})
    notices += _default_language(tokenizer, config, (*before, *after))
    if languages is not None:
        before, after = ([i for i in ids if i not in languages.ids] for ids in (before, after))
    read = JsonFiles(found, config, tokens, {}, (*classes, *_PLAIN_CLASSES))
    without_effect = _prefix_space(tokenizer, config, None)
    files = read.with_around(before, after, notices, without_effect=without_effect)
    return dataclasses.replace(files, languages=languages)


def _languages(
    folder: Path,
    tokenizer: Any,
    around: tuple[Sequence[int], Sequence[int]],
    target_begins: Mapping[SourceMarked, TargetBegins],
) -> Languages | None:
    """The languages of a tokenizer.json that puts one of their codes around a text; that one is the default."""
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    known: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    marked: tuple[SourceMarked, SourceMarked] = ("source_before", "source_after")
    for source_marked, ids in zip(marked, around, strict=True):
        begins = target_begins.get(source_marked, "none")
        found = read_languages(folder, known, special, source_marked=source_marked, target_begins=begins)
        default = found and next((name for name, code in found.codes.items() if code.token in ids), None)
        if found is not None and default is not None and target_begins:
            return found.model_copy(update={"default_source": default})
    return None


def _default_language(tokenizer: Any, config: TokenizerConfig, around: Sequence[int]) -> Iterator[str]:
    """That a language code stands around every text, and which.

    Raises:
        ExportError: tokenizer_config.json names another one, which transformers would take.
    """
    tokens = [str(tokenizer.id_to_token(i)) for i in around]
    wanted = config.source_language
    if wanted is not None and wanted not in tokens:
        raise ExportError(
            f"{CONFIG_FILE}: src_lang {wanted!r} is not what tokenizer.json puts around a text "
            f"({' and '.join(tokens) or 'nothing'}); load the tokenizer with that src_lang and save it again"
        )
    # Blenderbot and Pegasus have none.
    if codes := [token for token in tokens if token not in {*config.named.values(), *_ROBERTA.values()}]:
        yield f"the language of sources is {' and '.join(codes)} where a request names none, as tokenizer.json has it"


@dataclass(frozen=True, slots=True)
class JsonFiles:
    """A tokenizer.json and what is told of it, whatever stands around a source.

    Attributes:
        found: The file.
        config: The tokenizer's settings.
        tokens: Special tokens as the decoder's settings have them.
        defaults: Special tokens where the settings name none.
        classes: Those of transformers that read as it is done here.
    """

    found: TokenizerJson
    config: TokenizerConfig
    tokens: SpecialTokenIds
    defaults: Mapping[str, str]
    classes: Collection[str]

    def with_around(
        self,
        before: Sequence[int],
        after: Sequence[int],
        notices: Sequence[str],
        *,
        without_effect: Mapping[str, str] = {},
        special: Collection[int] = (),
    ) -> TokenizerFiles:
        """With these ids around a source, of which the first and the last are told; `special` are more special ids."""
        tokenizer = self.found.tokenizer
        known: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        flagged = {i for i, token in added.items() if token.special}
        matched = {token.content for token in added.values() if not token.special}
        named = {known[token] for token in self.config.special(self.defaults) if token in known}
        default = default_special_ids(dataclasses.asdict(self.tokens)) | flagged
        return TokenizerFiles(
            "tokenizers",
            self.found.files,
            entry_settings({*flagged, *named, *special}, default, clean=_cleans_up(tokenizer, self.config)),
            with_around(self.tokens, before[0] if before else None, after[-1] if after else None),
            {**settings_without_effect(self.config, matched, None, self.classes), **without_effect},
            [*self.found.notices, *notices],
            contents=self.found.contents,
        )


def _around_bart(
    tokenizer: Any, config: TokenizerConfig, known: Mapping[str, int], *, roberta: bool
) -> tuple[list[int], list[int], list[str]]:
    """The ids before and after a text, and what the user should know about them."""
    before, after = added_around(tokenizer)
    own = [config.token(name, _ROBERTA[name]) for name in ("cls_token", "sep_token")]
    if before or after:
        differs = roberta and (before, after) != ([known.get(own[0])], [known.get(own[1])])
        return before, after, [_other_around(tokenizer, (*before, *after), own)] if differs else []
    if not roberta:
        return [], [], [_nothing_around(())]
    if missing := [token for token in own if token not in known]:
        raise ExportError(f"tokenizer.json has no {missing[0]}, which BART has around a text; add it")
    return [known[own[0]]], [known[own[1]]], [_nothing_around(own)]


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether a tokenizer.json is of the only kind that transformers' BartTokenizer knows."""
    splits_bytes = type(tokenizer.pre_tokenizer).__name__ == "ByteLevel"
    return type(tokenizer.model).__name__ == "BPE" and splits_bytes and tokenizer.normalizer is None


def _nothing_around(own: Sequence[str]) -> str:
    told = f"{own[0]} and {own[1]} are added, as by transformers' BartTokenizer" if own else "a text stands alone"
    return f"tokenizer.json has no post-processor that puts special tokens around a text; {told}"


def _other_around(tokenizer: Any, ids: Sequence[int], own: Sequence[str]) -> str:
    found = " and ".join(str(tokenizer.id_to_token(i)) for i in ids)
    return (
        f"tokenizer.json puts {found} around a text, which is done here; transformers' BartTokenizer puts {own[0]} and "
        f"{own[1]}: name a tokenizer_class in {CONFIG_FILE} (PreTrainedTokenizerFast, or BartTokenizer with cls_token "
        "and sep_token)"
    )


def _prefix_space(tokenizer: Any, config: TokenizerConfig, default: bool | None) -> Mapping[str, str]:
    """What the tokenizer's own class makes of a setting that tokenizer.json has decided otherwise."""
    wanted = config.flags.get(_PREFIX_SPACE, default)
    found = getattr(tokenizer.pre_tokenizer, _PREFIX_SPACE, wanted)
    if wanted is None or wanted == found:
        return {}
    return {
        f"{CONFIG_FILE}: {_PREFIX_SPACE}": f"{json.dumps(wanted)}; {json.dumps(found)} is used, as in tokenizer.json"
    }


def _cleans_up(tokenizer: Any, config: TokenizerConfig) -> bool:
    """As transformers, which spare byte pairs unless they are forced."""
    spared = type(tokenizer.model).__name__ == "BPE" and not config.flags.get(_FORCED, False)
    return config.flags.get(_CLEAN_UP, False) and not spared


def entry_settings(special: Collection[int], default: Collection[int], *, clean: bool) -> dict[str, object]:
    """Fields of a `TokenizerEntry`, left out where there is nothing to tell: servers of before know no such field."""
    own = {} if set(special) == set(default) else {"special": sorted(special)}
    return {**own, **({"clean_up_spaces": True} if clean else {})}


def with_around(tokens: SpecialTokenIds, bos: int | None, eos: int | None) -> SpecialTokenIds:
    """Special tokens, with what stands around a source."""
    return dataclasses.replace(tokens, source_bos=bos, source_eos=eos)


def settings_without_effect(
    config: TokenizerConfig, matched: Collection[str], unknown: str | None, classes: Collection[str]
) -> dict[str, str]:
    """Settings that change what transformers read and not what is read here.

    Args:
        config: The tokenizer's settings.
        matched: Tokens that are found in a text before it is split.
        unknown: What stands for an unknown word, if the file does not say it.
        classes: Those that read as it is done here.
    """
    found = dict(config.without_effect)
    if config.tokenizer_class is not None and config.tokenizer_class.removesuffix("Fast") not in classes:
        found["tokenizer_class"] = f"{json.dumps(config.tokenizer_class)}; read as by {', '.join(classes)}"
    if unknown is not None and config.token("unk_token", unknown) != unknown:
        found["unk_token"] = f"{json.dumps(config.named['unk_token'])}; {unknown} is used"
    if added := [token for token in config.added if token not in matched]:
        found["added_tokens_decoder"] = f"{json.dumps(added, ensure_ascii=False)}: read as any other text"
    return {f"{CONFIG_FILE}: {name}": value for name, value in found.items()}
