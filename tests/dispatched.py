"""What may not happen inside: an operator that makes the host wait for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# .item(), int() and bool(); shapes that depend on values; comparisons that answer to Python
WAITING = {
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.masked_select, aten.unique_dim),
    *(aten._unique2, aten.equal, aten.multinomial, aten.repeat_interleave, aten.bincount),
}


class NoWaiting(TorchDispatchMode):
    """Fails where an operator would wait for the device, also on a CPU, where it costs nothing."""

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        assert op.overloadpacket not in WAITING, f"{op} waits for the device"
        if op.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            masks = [i for i in arguments[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{op} with a mask waits for the device"
        return op(*arguments, **(options or {}))
