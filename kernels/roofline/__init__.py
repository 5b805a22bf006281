"""What a kernel has to read, write and compute, and how fast a GPU can at best do that: worked out, not measured."""

from .attention import cross_attention_forward as cross_attention_forward
from .attention_backward import cross_attention_backward as cross_attention_backward
from .contrastive import soft_contrastive as soft_contrastive
from .cross_entropy import soft_cross_entropy as soft_cross_entropy
from .devices import DEVICES as DEVICES
from .devices import Device as Device
from .devices import device as device
from .selection import max_similarity as max_similarity
from .selection import topk_mask as topk_mask
from .training import adamw as adamw
from .training import elementwise as elementwise
from .training import ema_update as ema_update
from .training import layer_norm as layer_norm
from .training import layer_norm_backward as layer_norm_backward
from .training import linear as linear
from .training import linear_backward as linear_backward
from .work import BYTES as BYTES
from .work import Work as Work
