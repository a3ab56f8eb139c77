"""What families of transformers share, whatever their architecture."""

from collections.abc import Mapping, Sequence

from beamline_export.generation import Generation
from beamline_export.renamer import Renamer
from beamline_export.spec import Checkpoint, TransformerSpec
from beamline_export.tokenizer_files import TokenizerFiles


def put_together(
    spec: TransformerSpec,
    names: Renamer,
    generation: Generation,
    tokenizer: TokenizerFiles,
    ignored: Mapping[str, str],
    notices: Sequence[str] = (),
) -> Checkpoint:
    """A checkpoint out of its parts.

    Args:
        spec: The architecture.
        names: The weights.
        generation: Search settings.
        tokenizer: Its files.
        ignored: Settings of config.json that would change answers and do not, with their values.
        notices: What the user should know of the config.
    """
    return Checkpoint(
        spec,
        names.weights,
        tokenizer.tokens,
        generation.with_ignored(ignored, tokenizer.without_effect),
        tokenizer.kind,
        tokenizer.files,
        generation.removed,
        names.names,
        names.foreign(),
        tokenizer_settings=tokenizer.settings,
        languages=tokenizer.languages,
        tokenizer_contents=tokenizer.contents,
        notices=(*notices, *names.notices, *tokenizer.notices),
    )
