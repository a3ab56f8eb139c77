"""The Annotated Transformer (Harvard NLP, 2022) as a module, small, its parts named as there."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

# The root of the width is a whole number, so that an embedding can cancel a position exactly.
WIDTH, HEADS, LAYERS, INNER, SOURCE, TARGET, ROWS = 16, 4, 2, 48, 90, 120, 5000


def sines(rows: int) -> Tensor:
    angle = torch.arange(rows)[:, None] * torch.exp(-torch.arange(0, WIDTH, 2) * math.log(10000) / WIDTH)
    table = torch.zeros(rows, WIDTH)
    table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
    return table


class UnbiasedNorm(nn.Module):
    """Over the unbiased standard deviation, with epsilon outside the root."""

    def __init__(self) -> None:
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (WIDTH - 1)
        return self.a_2 * centred / (variance.sqrt() + 1e-6) + self.b_2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, *, causal: bool = False) -> Tensor:
        q, k, v = (
            linear(of).view(len(of), -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for linear, of in zip(self.linears, (x, memory, memory), strict=False)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.linears[3](y.transpose(1, 2).reshape(len(x), -1, WIDTH))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.w_1(x).relu())  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = UnbiasedNorm()

    def forward(self, x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        return x + part(self.norm(x))


class Layer(nn.Module):
    def __init__(self, *, decoder: bool) -> None:
        super().__init__()
        self.self_attn, self.feed_forward = Attention(), FeedForward()
        if decoder:
            self.src_attn = Attention()
        self.sublayer = nn.ModuleList(Residual() for _ in range(3 if decoder else 2))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        decoder = memory is not None
        parts: list[Callable[[Tensor], Tensor]] = [lambda y: self.self_attn(y, y, causal=decoder)]
        if decoder:
            parts.append(lambda y: self.src_attn(y, memory))
        for residual, part in zip(self.sublayer, [*parts, self.feed_forward], strict=True):
            x = residual(x, part)
        return x


class Stack(nn.Module):
    def __init__(self, *, decoder: bool) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(Layer(decoder=decoder) for _ in range(LAYERS)), UnbiasedNorm()

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        return self.norm(x)  # type: ignore[no-any-return]


class Lookup(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.lut = nn.Embedding(vocabulary, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lut(ids) * math.sqrt(WIDTH)  # type: ignore[no-any-return]


class Positions(nn.Module):
    pe: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pe", sines(ROWS)[None])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, : x.shape[1]]


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, TARGET)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


class AnnotatedTransformer(nn.Module):
    """Named as the Annotated Transformer names its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(decoder=False), Stack(decoder=True)
        self.src_embed = nn.Sequential(Lookup(SOURCE), Positions())
        self.tgt_embed = nn.Sequential(Lookup(TARGET), Positions())
        self.generator = Generator()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        hidden = self.decoder(self.tgt_embed(target), self.encoder(self.src_embed(source)))
        return self.generator(hidden)  # type: ignore[no-any-return]
