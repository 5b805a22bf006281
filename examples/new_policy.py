"""A mask policy of your own in 20 lines: hide what the words look at, drawn by chance, so that no two masks are alike.

    python examples/new_policy.py --output policy.png [--run RUN]
    cd examples && crossmask train syncmask-emoji plugins=[new_policy] masking.policy=soft_attention

The first draws it beside ``random`` on pairs of the embedded set, as a finished run's teacher sees them (without --run
an untrained one, whose attention is chance). The second trains with it: ``plugins`` names this module.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from pydantic import Field
from torch import Tensor

from crossmask.engine.masking import MaskContext, MaskPlan, Policy, register_policy
from crossmask.engine.recipe import Section
from crossmask.kernels import topk_mask


@register_policy("soft_attention")
class SoftAttention(Policy):
    """Patches and words drawn without replacement, p_i proportional to a_i ** (1 / temperature): a is how much the
    words look at a patch, and the patches at a word. Near 0 it is ``syncmask``, large it is ``random``."""

    needs = ("statistics",)  # the teacher's cross-attention, computed because it is named here

    class Options(Section):
        temperature: float = Field(0.5, gt=0.0, description="masking.options={temperature: …} in a recipe")

    options: Options

    def __call__(self, context: MaskContext) -> MaskPlan:
        told = context.need("statistics", self.name)

        def drawn(attention: Tensor, ratio: float | Tensor, which: str, valid: Tensor | None = None) -> Tensor:
            # the largest of logarithms with Gumbel noise are a draw without replacement
            score = attention.clamp(min=1e-20).log() / self.options.temperature
            return topk_mask(score, ratio=ratio, valid=valid, **context.draws.gumbel(which))

        image = drawn(told.key_attention, context.image_ratio, "soft patches")
        return MaskPlan(image, drawn(told.query_attention, context.text_ratio, "soft words", context.maskable))


def main(output: Path, run: Path | None, pairs: int) -> None:
    """A row of pairs for each policy."""
    from crossmask.engine.mask_preview import preview

    source, step = str(run or "syncmask-emoji"), None if run else 0
    rows = []
    for policy in ("random", "soft_attention"):
        row = output.with_name(f"{output.stem}-{policy}.png")
        for line in preview(source, [f"masking.policy={policy}"], row, pairs, step):
            print(line)
        rows.append(Image.open(row).convert("RGB"))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, sum(above.height for above in rows[:i])))
    sheet.save(output)
    print(f"random above, soft_attention below: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("policy.png"))
    parser.add_argument("--run", type=Path, help="the folder of a finished run of syncmask-emoji")
    parser.add_argument("--pairs", type=int, default=6)
    given = parser.parse_args()
    main(given.output, given.run, given.pairs)
