"""What the server tells about itself, to callers and to Prometheus."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from beamline.v1 import generation_pb2 as pb
from beamline_server import __version__
from beamline_server.bundle import Bundle
from beamline_server.engine.request import SearchOptions
from beamline_server.rpc.converters import EARLY_STOPPINGS, LENGTH_PENALTY_KINDS, Limits
from beamline_server.rpc.responses import duration
from beamline_server.settings import Settings

_KIND_NUMBERS = {kind: number for number, kind in LENGTH_PENALTY_KINDS.items()}
_STOPPING_NUMBERS = {stopping: number for number, stopping in EARLY_STOPPINGS.items()}


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A bundle as it is served."""

    name: str
    bundle: Bundle
    device: str

    def labels(self) -> Mapping[str, str]:
        """Its properties as labels of a metric."""
        manifest = self.bundle.manifest
        return {
            "model": self.name,
            "architecture": manifest.architecture,
            "precision": manifest.precision,
            "device": self.device,
            "sha256": self.bundle.fingerprint,
        }


def versions() -> Mapping[str, str]:
    """Versions of the server's parts, by name."""
    return {
        "beamline": __version__,
        "python": platform.python_version(),
        "grpcio": _version("grpcio"),
        "onnxruntime": _version("onnxruntime", "onnxruntime-gpu"),
    }


def info_message(model: ServedModel, settings: Settings, limits: Limits, defaults: SearchOptions) -> pb.GetInfoResponse:
    """The answer to GetInfo, which never changes while the server runs."""
    manifest = model.bundle.manifest
    languages = manifest.model_languages()
    return pb.GetInfoResponse(
        model=pb.ModelInfo(
            name=model.name,
            architecture=manifest.architecture,
            precision=manifest.precision,
            device=model.device,
            source_vocabulary_size=manifest.dimensions.source_vocabulary,
            target_vocabulary_size=manifest.dimensions.target_vocabulary,
            has_tokenizer=manifest.tokenizer.kind != "none",
            fingerprint=model.bundle.fingerprint,
            ignored_settings=manifest.generation_defaults.not_supported,
            source_languages=languages.names["source"],
            target_languages=languages.names["target"],
            default_source_language=languages.default["source"] or "",
            default_target_language=languages.default["target"] or "",
            decoder_only=manifest.dimensions.decoder_only,
        ),
        limits=pb.Limits(
            max_inputs=limits.max_inputs,
            max_text_bytes=limits.max_text_bytes,
            max_source_tokens=limits.max_source_tokens,
            max_new_tokens=limits.max_new_tokens,
            max_target_tokens=limits.max_target_tokens,
            max_beam_size=limits.max_beam_size,
            max_message_bytes=settings.max_message_bytes,
            max_duration=duration(settings.max_duration_s),
            max_request_cost=limits.max_request_cost,
        ),
        default_search=pb.SearchOptions(
            beam_size=defaults.beam_size,
            n_best=defaults.n_best,
            length_penalty=defaults.length_penalty,
            length_penalty_kind=_KIND_NUMBERS[defaults.length_penalty_kind],
            early_stopping=_STOPPING_NUMBERS[defaults.early_stopping],
            min_new_tokens=defaults.min_new_tokens,
            max_new_tokens=defaults.max_new_tokens,
        ),
        versions=versions(),
    )


def _version(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "none"
