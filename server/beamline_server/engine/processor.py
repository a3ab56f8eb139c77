"""What this machine's processor can do, as far as the engine has to know."""

from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_VNNI = frozenset({"avx_vnni", "avx512_vnni"})
_LEVEL_3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})


@cache
def processor() -> str:
    """How the system describes the processor; nothing where it does not."""
    return _CPUINFO.read_text("utf-8", errors="replace") if _CPUINFO.exists() else ""


def sums_int8_exactly(description: str) -> bool:
    """Whether an x86 processor sums products of unsigned and signed bytes in 32 bits; without VNNI, 16 saturate.

    Where nothing is known, it does not: being exact comes before being fast.
    """
    return not _VNNI.isdisjoint(description.split())


def target(description: str) -> str:
    """The kind of processor to compile for, so that what an image's build has compiled runs elsewhere.

    Either x86-64-v3, most x86 processors since 2013, whose vectors and fused products attention needs to be fast, or
    any of this architecture. What it costs is in docs/adr/0011-compiled-loops.md.
    """
    return "x86-64-v3" if _LEVEL_3.issubset(description.split()) else "generic"
