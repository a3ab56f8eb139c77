"""The generation engine: continuous-batched beam search over a step runner; knows no transport, no metrics library."""
