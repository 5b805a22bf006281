"""Tiles for every kernel and architecture, chosen by what the compiler reports.

``benchmarks/prove_attention.py`` compiles every tile that stands here, and ``benchmarks/static/cross_attention.md`` has
what came out: no register spilled, shared memory within the limit, matrix instructions and 128-bit loads. They were
chosen without a GPU; ``tune.py`` times them on one and writes a table of its own, which goes before this one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import tuned


@dataclass(frozen=True)
class Config:
    """block_s queries by block_p keys a program; ``transposed`` computes tiles as [keys, queries]."""

    block_s: int
    block_p: int
    warps: int = 4
    stages: int = 2
    transposed: bool = False


# By family of architectures, kernel and block of width. A width that is missing takes the tiles of the next larger one,
# a kernel that is missing those of the next family in FAMILIES; a launch takes the smallest block that covers its
# queries, else the largest. With all statistics and dropout, the 255 registers of a thread bound a tile long before
# shared memory does, and the backward with its five products before the forward. Narrow heads can need more of them.
Tiles = dict[int, tuple[Config, ...]]
C = Config

HALF: dict[str, dict[str, Tiles]] = {
    # Ampere multiplies 16 rows a warp, so a tile of 32 queries loses nothing. Ada and the Blackwell of desktops have
    # the same instructions, and 99 KiB of shared memory, which every tile here fits.
    "sm_80": {
        "forward_single": {
            32: (C(32, 32), C(128, 32), C(32, 128, 4, 2, True)),
            64: (C(32, 32), C(128, 32), C(32, 128), C(32, 256, 8)),
            128: (C(32, 32), C(64, 32), C(32, 128)),
            256: (C(32, 32), C(64, 32, 8), C(32, 128, 8)),
        },
        "forward_online": {
            64: (C(32, 64), C(64, 32)),
            128: (C(32, 64), C(64, 64, 8)),
            256: (C(32, 64, 8, 1),),
        },
        "column_lse": {128: (C(64, 64),), 256: (C(32, 32),)},
        "key_statistics": {128: (C(64, 64),), 256: (C(32, 32),)},
        "backward_rows": {32: (C(32, 64), C(64, 32)), 128: (C(32, 64), C(64, 64)), 256: (C(32, 32),)},
        "backward_columns": {128: (C(64, 64),), 256: (C(32, 32),)},
        "backward_fused": {128: (C(32, 32),), 256: (C(32, 16, 8),)},
        "backward_queries": {32: (C(64, 32),), 128: (C(32, 64),), 256: (C(32, 32, 8),)},
        "backward_keys": {
            32: (C(32, 32),),
            64: (C(64, 32, 4, 2, True),),
            128: (C(64, 32, 8, 2, True),),
            256: (C(32, 16, 8, 2, True),),
        },
    },
    # Hopper multiplies 64 rows at a time: of the queries where there are that many, of the keys (transposed) where not.
    "sm_90": {
        "forward_single": {
            32: (C(32, 32), C(128, 32), C(32, 128, 4, 2, True)),
            64: (C(32, 32), C(128, 32), C(32, 128, 4, 2, True), C(64, 128), C(32, 256, 8, 2, True)),
            128: (C(32, 32), C(64, 32), C(32, 128, 8, 2, True)),
            256: (C(32, 32), C(64, 32, 8), C(32, 128, 8)),
        },
        "forward_online": {
            64: (C(32, 64, 4, 2, True), C(64, 64), C(128, 64, 8)),
            128: (C(32, 64, 4, 1, True), C(64, 64, 8), C(128, 64, 8)),
            256: (C(32, 32, 8), C(64, 32, 8)),
        },
        "column_lse": {128: (C(64, 64, 4, 2, True),), 256: (C(32, 32),)},
        "key_statistics": {128: (C(64, 64, 4, 2, True),), 256: (C(32, 32),)},
        "backward_rows": {128: (C(32, 64, 4, 2, True), C(64, 64)), 256: (C(32, 32),)},
        "backward_columns": {128: (C(64, 64, 4, 2, True),), 256: (C(32, 32),)},
        # one stage: two spill, and two blocks a multiprocessor hide each other's loads
        "backward_fused": {64: (C(32, 64, 4, 1, True), C(64, 32)), 128: (C(32, 64, 8),), 256: (C(32, 32, 8),)},
        "backward_queries": {64: (C(64, 32),), 128: (C(64, 32, 8),), 256: (C(32, 64, 8, 1),)},
        "backward_keys": {64: (C(32, 64, 4, 2, True),), 128: (C(32, 64, 8, 2, True),), 256: (C(32, 16, 8, 2, True),)},
    },
    # The tensor cores of datacentre Blackwell work from 64 rows on, with accumulators in memory of their own; to reduce
    # those over rows takes much code, so that short queries do better with Ampere's instructions.
    "sm_100": {
        "forward_single": {
            32: (C(32, 32), C(64, 32), C(32, 64), C(32, 128, 8)),
            64: (C(32, 32), C(64, 32), C(32, 128), C(32, 256, 8)),
            128: (C(32, 32), C(64, 32), C(32, 128)),
            256: (C(32, 32), C(64, 32, 8), C(32, 128, 8)),
        },
        "forward_online": {
            64: (C(32, 64, 4, 1),),
            128: (C(32, 64), C(64, 32)),
            256: (C(32, 64, 8, 1),),
        },
        "backward_rows": {64: (C(32, 64), C(64, 64, 8)), 128: (C(32, 64, 8), C(64, 64, 8)), 256: (C(32, 32),)},
        "backward_fused": {64: (C(32, 64, 4, 1, True),), 128: (C(32, 64, 8, 1, True),), 256: (C(32, 32, 8),)},
        "backward_queries": {128: (C(64, 32),), 256: (C(32, 32, 8),)},
        "backward_keys": {128: (C(32, 64, 4, 2, True),), 256: (C(32, 16, 8, 2, True),)},
    },
    # Desktop Blackwell has Ampere's instructions, and a compiler of its own that spills a little sooner.
    "sm_120": {
        "forward_online": {
            32: (C(32, 64), C(64, 32)),
            64: (C(32, 64, 4, 1), C(64, 32)),
            128: (C(32, 64), C(64, 64, 8)),
            256: (C(32, 64, 8, 1),),
        },
        "backward_fused": {64: (C(32, 32, 4, 1),), 128: (C(32, 32),), 256: (C(32, 16, 8),)},
        "backward_queries": {32: (C(64, 32),), 64: (C(32, 64),), 128: (C(32, 32),), 256: (C(32, 32, 8),)},
    },
    # CDNA 3: waves of 64, 64 KiB of shared memory, and 512 registers of which matrix accumulators take a part.
    "gfx942": {
        "forward_single": {
            64: (C(32, 32), C(128, 32), C(32, 128)),
            128: (C(32, 32), C(64, 32)),
            256: (C(32, 32),),
        },
        "forward_online": {64: (C(32, 64), C(64, 32), C(128, 32)), 128: (C(32, 32), C(64, 32)), 256: (C(32, 16),)},
        "backward_fused": {16: (C(32, 32),), 64: (C(32, 32), C(64, 32)), 256: (C(32, 16),)},
        "backward_queries": {64: (C(64, 32),), 128: (C(64, 16),), 256: (C(32, 16),)},
        "backward_keys": {64: (C(64, 32),), 128: (C(64, 16),), 256: (C(32, 16),)},
    },
}

# float32 has no matrix instructions where products have to be exact (ieee): its operands stay in registers.
SINGLE: dict[str, dict[str, Tiles]] = {
    "sm_80": {
        "forward_single": {64: (C(32, 32),), 256: ()},
        "forward_online": {16: (C(32, 32),), 32: (C(16, 32),), 64: (C(32, 16),), 128: (C(16, 32),), 256: (C(16, 16),)},
        "column_lse": {64: (C(32, 32),), 256: (C(16, 16),)},
        "key_statistics": {64: (C(32, 32),), 256: (C(16, 16),)},
        "backward_rows": {32: (C(32, 32),), 64: (C(32, 16),), 128: (C(32, 32),), 256: (C(16, 16),)},
        "backward_columns": {64: (C(32, 32),), 256: (C(16, 16),)},
        "backward_fused": {64: (C(32, 32, 8),), 128: (C(32, 16, 8),), 256: (C(16, 16, 8),)},
        "backward_queries": {16: (C(32, 32),), 64: (C(32, 16),), 128: (C(32, 32, 8),), 256: (C(16, 16),)},
        "backward_keys": {
            32: (C(32, 16, 8, 2, True),),
            64: (C(32, 16, 8, 1, True),),
            128: (C(32, 16, 8, 2, True),),
            256: (C(16, 16, 8, 1, True),),
        },
    },
    "sm_90": {
        "forward_online": {
            32: (C(16, 32),),
            64: (C(32, 16),),
            128: (C(16, 16),),
            256: (C(16, 16, 8),),
        },
    },
    "sm_120": {
        "forward_online": {
            16: (C(32, 32),),
            32: (C(16, 32),),
            64: (C(32, 16),),
            128: (C(16, 16),),
            256: (C(16, 32, 8),),
        },
    },
    # multiplies float32 exactly by matrix instructions
    "gfx942": {
        "backward_fused": {128: (C(32, 16),), 256: (C(16, 16),)},
        "backward_queries": {128: (C(32, 16),), 256: (C(16, 16),)},
        "backward_keys": {256: (C(32, 16),)},
    },
}

# With a link mask, where its loads would make the above spill: by an architecture's own family, kernel and width.
HALF_LINKS: dict[str, dict[str, Tiles]] = {
    "sm_80": {
        "forward_online": {128: (C(32, 64), C(64, 64, 8, 1))},
        "backward_rows": {128: (C(32, 64, 4, 1), C(64, 64))},
        "backward_fused": {128: (C(32, 16),)},
    },
    "sm_90": {
        "forward_single": {64: (C(32, 32), C(128, 32), C(32, 128, 4, 2, True), C(64, 128, 8), C(32, 256, 8, 2, True))},
        "forward_online": {128: (C(32, 64, 4, 1, True), C(64, 64, 8), C(128, 64, 8, 1))},
        "backward_fused": {16: (C(32, 32, 4, 1),), 32: (C(32, 32, 4, 1),), 64: (C(32, 32, 4, 1),)},
        "backward_keys": {64: (C(32, 64, 8, 1, True),), 128: (C(32, 32, 8, 1, True),)},
    },
    "sm_100": {
        "key_statistics": {64: (C(64, 64, 4, 1, True),)},
        "backward_fused": {64: (C(32, 32, 4, 1),), 128: (C(32, 64, 8, 1),)},
    },
    "sm_120": {"forward_online": {64: (C(32, 64, 4, 1), C(64, 32, 4, 1))}},
    "gfx942": {
        "backward_fused": {64: (C(32, 32), C(64, 16))},
        "backward_keys": {64: (C(64, 16),)},
    },
}
SINGLE_LINKS: dict[str, dict[str, Tiles]] = {
    "sm_80": {"forward_online": {64: (C(32, 16, 8),)}, "backward_keys": {64: (C(16, 16, 8, 1, True),)}},
    "sm_100": {"backward_fused": {64: (C(32, 32, 8, 1),)}},
    "sm_120": {"backward_fused": {64: (C(32, 32, 8, 1),)}, "backward_keys": {64: (C(16, 16, 8, 1, True),)}},
}

FAMILIES = {
    "sm_80": ("sm_80",),
    "sm_86": ("sm_80",),
    "sm_89": ("sm_80",),
    "sm_90": ("sm_90", "sm_80"),
    "sm_100": ("sm_100", "sm_90", "sm_80"),
    "sm_120": ("sm_120", "sm_80"),
    "gfx942": ("gfx942", "sm_80"),
    "any": ("any", "gfx942", "sm_80"),  # CDNA 3 has the least shared memory, and so the smallest tiles
}
KERNELS = tuple(HALF["sm_80"])

ONE_BLOCK = {"forward_single": "keys", "backward_fused": "queries"}  # kernels that hold an axis in one block

_assumed: str | None = None
_forced: Mapping[str, Config | None] = {}


def architecture(device: torch.device) -> str:
    """The name under which ``select`` knows ``device``: "sm_90", or "sm_90/NVIDIA H200" where that GPU was tuned.

    The driver is asked once for each device, and never on import. Triton's interpreter takes the tiles of sm_80.
    """
    if _assumed is not None:
        return _assumed
    return _asked(device) if device.type == "cuda" else "sm_80"


@functools.cache
def _asked(device: torch.device) -> str:
    if torch.version.hip:
        arch = _nearest_amd(torch.cuda.get_device_properties(device).gcnArchName)
    else:
        major, minor = torch.cuda.get_device_capability(device)
        arch = _nearest_nvidia(10 * major + minor)
    file, gpu = tuned.path(), torch.cuda.get_device_name(device)
    return f"{arch}/{gpu}" if file and tuned.table(file, gpu) else arch


def _nearest_nvidia(capability: int) -> str:
    known = [int(name[3:]) for name in FAMILIES if name.startswith("sm_")]
    return f"sm_{max(lower)}" if (lower := [x for x in known if x <= capability]) else "any"


def _nearest_amd(name: str) -> str:
    """CDNA 3 and its successors keep the matrix instructions and at least the shared memory; Radeon has other ones."""
    return "gfx942" if name.split(":")[0] in ("gfx942", "gfx950") else "any"


def select(
    kernel: str, arch: str, width: int, dtype: torch.dtype, queries: int, keys: int, links: bool = False
) -> Config | None:
    """The tile for a launch; None where the kernel does not serve these lengths (forward_single, backward_fused).

    ``links``: with a link mask. A table that was timed without one says nothing then.
    """
    if kernel in _forced:
        return _serves(kernel, _forced[kernel], queries, keys)
    arch, _, gpu = arch.partition("/")
    if gpu and not links and (file := tuned.path()):
        key, table = tuned.key(kernel, dtype, width, queries, keys), tuned.table(file, gpu)
        if key in table and (table[key] is None or _serves(kernel, table[key], queries, keys)):
            return table[key]
    serving = [tile for tile in tiles(kernel, arch, width, dtype, links) if _serves(kernel, tile, queries, keys)]
    if not serving:
        return None
    if kernel == "forward_single":  # as few keys as cover the axis
        fewest = min(tile.block_p for tile in serving)
        serving = [tile for tile in serving if tile.block_p == fewest]
    covering = [tile for tile in serving if tile.block_s >= queries]
    if covering:
        return min(covering, key=lambda tile: tile.block_s)
    return max(serving, key=lambda tile: tile.block_s)


def tiles(kernel: str, arch: str, width: int, dtype: torch.dtype, links: bool = False) -> tuple[Config, ...]:
    """All that ``select`` chooses from."""
    table = SINGLE if dtype == torch.float32 else HALF
    if links:
        instead = (SINGLE_LINKS if dtype == torch.float32 else HALF_LINKS).get(FAMILIES[arch][0], {}).get(kernel, {})
        if width in instead:
            return instead[width]
    by_width = next(table[family][kernel] for family in FAMILIES[arch] if kernel in table.get(family, ()))
    return by_width[min(block for block in by_width if block >= width)]


def _serves(kernel: str, tile: Config | None, queries: int, keys: int) -> Config | None:
    axis = ONE_BLOCK.get(kernel)
    fits = axis is None or (tile and {"queries": queries <= tile.block_s, "keys": keys <= tile.block_p}[axis])
    return tile if fits else None


@contextmanager
def assuming(arch: str | None = None, forced: Mapping[str, Config | None] | None = None) -> Iterator[None]:
    """Plan for another architecture than the device's, or with ``forced`` tiles (by kernel) in place of the table's.

    For compiling ahead of time and for tuning; process-wide.
    """
    global _assumed, _forced
    before = _assumed, _forced
    _assumed, _forced = (arch or before[0]), {**before[1], **(forced or {})}
    try:
        yield
    finally:
        _assumed, _forced = before
