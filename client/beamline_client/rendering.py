"""How a line and its result are printed."""

import json

from beamline_client.bulk import Generated
from beamline_client.results import Hypothesis


def plain(done: Generated) -> str:
    """The best text, on one line; an empty line where there is no result."""
    return f"{on_one_line(done.result.text) if done.result else ''}\n"


def streamed(_done: Generated) -> str:
    """The end of the line; the text is written by then."""
    return "\n"


def scored(done: Generated) -> str:
    """The source, then `score<TAB>text` for each hypothesis, best first, then an empty line."""
    hypotheses = done.result.hypotheses if done.result else ()
    ranked = "".join(f"{hypothesis.score:.4f}\t{on_one_line(hypothesis.text)}\n" for hypothesis in hypotheses)
    return f"{on_one_line(done.line.text)}\n{ranked}\n"


def as_json(done: Generated) -> str:
    """One JSON object on one line; without a result it has no hypotheses, and the problem if there is one."""
    if done.result is None:
        problem = {} if done.problem is None else {"problem": done.problem}
        return _json_line({"source": done.line.text, "hypotheses": [], **problem})
    result, timing = done.result, done.result.timing
    return _json_line(
        {
            "source": done.line.text,
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
