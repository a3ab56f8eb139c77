"""From the engine's answers to protobuf messages. Pure but for the tokenizer."""

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration

from beamline.v1 import generation_pb2 as pb
from beamline_server.engine.request import Completed, Finish, Hypothesis, Timing
from beamline_server.rpc.converters import Order, Output
from beamline_server.rpc.desk import Source
from beamline_server.rpc.streaming import GrowingText
from beamline_server.tokenizer import Tokenizer

_FINISH_REASONS = {
    Finish.END_OF_SEQUENCE: pb.FINISH_REASON_END_OF_SEQUENCE,
    Finish.LENGTH: pb.FINISH_REASON_LENGTH,
}


class ResponseWriter:
    """Writes results for one model.

    Args:
        tokenizer: None for a model whose results are token ids alone.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def response(self, order: Order, answers: Sequence[Completed]) -> pb.GenerateResponse:
        """The response to a request, with one answer for each of its sources."""
        results = map(self.result, order.sources, answers, [order.output] * len(answers))
        return pb.GenerateResponse(results=results)

    def result(self, source: Source, answer: Completed, output: Output) -> pb.Result:
        """The outcome for one source."""
        return pb.Result(
            hypotheses=[self._hypothesis(source, hypothesis, output) for hypothesis in answer.hypotheses],
            source_tokens=len(source.tokens),
            source_truncated=source.truncated,
            timing=_timing(answer.timing),
        )

    def _hypothesis(self, source: Source, hypothesis: Hypothesis, output: Output) -> pb.Hypothesis:
        text = ""
        if self._tokenizer is not None:
            # Together, for a word may go on where the prefix, or a prompt, ends.
            text = GrowingText(self._tokenizer, source.target_prefix, source.context).finish(hypothesis.tokens)
        return pb.Hypothesis(
            text=text,
            score=hypothesis.score,
            finish_reason=_FINISH_REASONS[hypothesis.finish],
            token_ids=hypothesis.tokens if output.token_ids else None,
            token_logprobs=hypothesis.token_logprobs if output.token_logprobs else None,
        )


def _timing(timing: Timing) -> pb.Timing:
    return pb.Timing(
        queue=duration(timing.queue_s),
        encode=duration(timing.encode_s),
        decode=duration(timing.decode_s),
        steps=timing.steps,
    )


def duration(seconds: float) -> Duration:
    """A protobuf duration, to the nanosecond."""
    whole, nanos = divmod(round(seconds * 1e9), 1_000_000_000)
    return Duration(seconds=whole, nanos=nanos)
