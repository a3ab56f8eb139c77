"""Which families there are, and which one a checkpoint belongs to. A new family is one module and one row here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from beamline_export.checkpoint import Fields, read_json
from beamline_export.families import fairseq, makemore, marian_npz, nn_transformer, opennmt_py, t5, tensor2tensor
from beamline_export.families.bart import BART
from beamline_export.families.bart_relatives import ROWS
from beamline_export.families.gpt2 import GPT2
from beamline_export.families.gpt_neox import GPT_NEOX
from beamline_export.families.llama import LLAMA_LIKE
from beamline_export.families.marian import MARIAN
from beamline_export.families.opt import OPT
from beamline_export.families.refused import REFUSED
from beamline_export.reference import Reference
from beamline_export.spec import Checkpoint, ExportError


@dataclass(frozen=True, slots=True)
class Family:
    """How to read a checkpoint folder, and how to load it in PyTorch as what the export is compared with."""

    read: Callable[[Path], Checkpoint]
    reference: Callable[[Path, Checkpoint], Reference]


OWN_SETTINGS = ("nn_transformer", "fairseq", "makemore", "marian_npz", "opennmt_py", "tensor2tensor")
"""Families whose reference is built from the same settings as the graphs: a wrong one does not show."""


FAMILIES = {
    **{row.model_type: Family(row.read, row.reference) for row in (MARIAN, BART, *ROWS)},
    "nn_transformer": Family(nn_transformer.read, nn_transformer.reference),
    **{name: Family(variant.read, variant.reference) for name, variant in t5.VARIANTS.items()},
    **{row.model_type: Family(row.read, row.reference) for row in (GPT2, GPT_NEOX, OPT, *LLAMA_LIKE)},
    "fairseq": Family(fairseq.read, fairseq.reference),
    "marian_npz": Family(marian_npz.read, marian_npz.reference),
    "makemore": Family(makemore.read, makemore.reference),
    "opennmt_py": Family(opennmt_py.read, opennmt_py.reference),
    "tensor2tensor": Family(tensor2tensor.read, tensor2tensor.reference),
}


def detect(folder: Path) -> Family:
    """The family that `config.json` names as its `model_type`.

    Raises:
        ExportError: the folder holds no config, or the architecture is not known, or known not to fit.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder; give the folder that holds config.json and the weights")
    fields = Fields(read_json(folder / "config.json"), str(folder / "config.json"))
    model_type = fields.raw("model_type")
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ExportError(
            f"{folder / 'config.json'}: model_type {model_type!r} is not supported: {REFUSED[model_type]}"
        )
    family: Family = fields.choice("model_type", FAMILIES)
    fields.check()
    return family
