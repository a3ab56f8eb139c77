"""How onnxruntime computes the graphs of a bundle, and what they call their inputs."""

from beamline_server.engine.processor import processor, sums_int8_exactly

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
SPIN_US = 300
"""How long a thread without work stays awake while a graph runs, in microseconds (docs/performance.md)."""
ENCODER_INPUTS = ("ids", "positions", "row_of", "back", "source_length")
"""What the graph calls the fields of `pack.EncoderInputs`, in their order."""
STEP_INPUTS = ("ids", "positions", "slot", "row_of", "back", "ancestors", "source_length")
"""What the graph calls the fields of `cuda.rectangle.StepInputs`, in their order."""


def settings(threads: int) -> dict[str, str]:
    """The configuration of every session, key by key, for nodes on so many threads.

    Of the keys that could change numbers on a CPU, `session.set_denormal_as_zero` stays off, and
    `session.x64quantprecision` is on where int8 products would be summed wrongly. cuda/provider.py has those of a GPU.
    """
    return {
        # Nodes take microseconds, and so does waking a thread: while a graph runs it stays awake.
        "session.intra_op.allow_spinning": str(int(threads > 1)),
        "session.intra_op.spin_duration_us": str(SPIN_US),
        # The decoder is several graphs, each with threads of its own: they must not keep a core from the next one's.
        "session.force_spinning_stop": "1",
        # Unsigned weights, which are summed in 32 bits everywhere; where signed ones are as well, those are twice as
        # fast.
        "session.x64quantprecision": str(int(not sums_int8_exactly(processor()))),
        # On CPU the fused kernel is several times slower than its parts (onnxruntime 1.31).
        "optimization.disable_specified_optimizers": "SkipLayerNormFusion;BiasSkipLayerNormFusion",
    }
