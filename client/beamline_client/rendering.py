"""How a line and its result are printed."""

import json

from beamline_client.bulk import Line
from beamline_client.results import Hypothesis, Result


def plain(_line: Line, result: Result | None) -> str:
    """The best text, on one line; an empty line for a blank input."""
    return f"{on_one_line(result.text) if result else ''}\n"


def scored(line: Line, result: Result | None) -> str:
    """The source, then `score<TAB>text` for each hypothesis, best first, then an empty line."""
    hypotheses = result.hypotheses if result else ()
    ranked = "".join(f"{hypothesis.score:.4f}\t{on_one_line(hypothesis.text)}\n" for hypothesis in hypotheses)
    return f"{on_one_line(line.text)}\n{ranked}\n"


def as_json(line: Line, result: Result | None) -> str:
    """One JSON object on one line; a blank input has no hypotheses and nothing else."""
    if result is None:
        return _json_line({"source": line.text, "hypotheses": []})
    timing = result.timing
    return _json_line(
        {
            "source": line.text,
            "hypotheses": [_hypothesis(hypothesis) for hypothesis in result.hypotheses],
            "source_tokens": result.source_tokens,
            "source_truncated": result.source_truncated,
            "timing": {
                "queue_ms": _milliseconds(timing.queue_s),
                "encode_ms": _milliseconds(timing.encode_s),
                "decode_ms": _milliseconds(timing.decode_s),
                "steps": timing.steps,
            },
        }
    )


def on_one_line(text: str) -> str:
    """The text with line breaks as spaces, as long as before: one line of input is one line of output."""
    return text.replace("\n", " ").replace("\r", " ")


def _hypothesis(hypothesis: Hypothesis) -> dict[str, object]:
    return {
        "text": hypothesis.text,
        "score": hypothesis.score,
        "finish": hypothesis.finish_reason.value if hypothesis.finish_reason else None,
        "token_ids": hypothesis.token_ids,
        "token_logprobs": hypothesis.token_logprobs,
    }


def _json_line(value: dict[str, object]) -> str:
    return f"{json.dumps(value, ensure_ascii=False)}\n"


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
