"""A step of CoCa (Yu et al. 2022) by open_clip and by this package: the same weights, pairs, losses and AdamW.

open_clip's model, ``CoCaLoss`` and parameter groups, as its training script puts them together; ours is the recipe
``sycoca`` without what SyCoCa adds: no masks, no image decoder, and no momentum teacher, which open_clip has none of.
The weights are open_clip's first ones, converted. Captions have up to 25 tokens, CLIP's two included; open_clip pads
them to 76 as its tokenizer does, this package to the longest. Both sides' losses have to agree at two steps, the second
behind an update; else there is no time. ``turns.variants`` says what else of ours is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from albef_step.products import give_back
from albef_step.sizes import Captioned, Sizes, lengths
from torch import Tensor

from ..problem import Unavailable
from ..results import Job, Row
from .planned import Options, Planned
from .trace import labelled, part
from .turns import OURS, Built, Side, in_turns, of_pytorchs_products, variants

MODEL = "coca_ViT-B-32"
BATCH, LONGEST = 8, 25
ROUNDS, QUICK_ROUNDS = 2, 1
LR, WEIGHT_DECAY, BETAS = 1e-4, 0.2, (0.9, 0.98)
CAPTION_WEIGHT, CONTRAST_WEIGHT = 2.0, 1.0
# Of losses, relative, at the first step and behind an update: what sums in another order leave of float32, and what
# becomes of it where Adam's first update is each gradient's sign; open_clip learns the temperature's logarithm besides,
# and has weights decay that ours leaves alone. bfloat16 has 8 bits.
TOLERANCES = {"fp32": (1e-4, 2e-3), "bf16": (2e-2, 2e-2)}
THEIRS = "open_clip"


class Coca:
    def planned(self, options: Options) -> list[Planned]:
        return [
            Planned(job(dtype), name, name != THEIRS, BATCH)
            for dtype in TOLERANCES
            for name in (THEIRS, OURS, *variants(options.device, dtype))
        ]

    def measure(self, options: Options) -> Iterator[Row]:
        config = configuration()
        device = torch.device(options.device)
        rounds = min(options.rounds, QUICK_ROUNDS if options.quick else ROUNDS)
        for dtype, tolerances in TOLERANCES.items():
            planned = [each for each in self.planned(options) if each.job.dtype == dtype]
            sides = both(config, device, planned)
            yield from in_turns(sides, device, rounds, tolerances)
            del sides
            give_back()


def both(config: dict[str, Any], device: torch.device, planned: list[Planned]) -> list[Side]:
    """open_clip's step, and ours from its weights."""
    bf16, batch, weights = planned[0].job.dtype == "bf16", random_batch(config), dict[str, Tensor]()

    def theirs() -> Built:
        step, moved = OpenClipStep(config, device, bf16), batch.to(device)
        weights.update({name: value.detach().cpu().clone() for name, value in step.model.state_dict().items()})
        return (lambda: step(moved)), lambda: labelled_open_clip(step)

    def mine() -> Built:
        step = OurCoca(config, weights, bf16)
        weights.clear()
        return (lambda: step(batch)), lambda: labelled(step.pretrainer)

    sides = [Side(planned[0], theirs), Side(planned[1], mine)]
    return [*sides, *(of_pytorchs_products(sides[1], each) for each in planned[2:])]


def job(dtype: str) -> Job:
    autocast = ", autocast" if dtype == "bf16" else ""
    return Job("step", f"CoCa {MODEL}", f"batch {BATCH}, captions to {LONGEST} tokens{autocast}", dtype, "", "step")


def configuration() -> dict[str, Any]:
    """The model's, as open_clip has it.

    Raises:
        Unavailable: open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError:
        raise Unavailable("open_clip is not installed: pip install open_clip_torch") from None
    return open_clip.get_model_config(MODEL)


def random_batch(config: dict[str, Any]) -> Captioned:
    """Noise for images, random words for captions, whose lengths are always the same."""
    words = config["text_cfg"]["vocab_size"]
    size = config["vision_cfg"]["image_size"]
    luck = torch.Generator().manual_seed(0)
    ids = torch.randint(1, words - 2, (BATCH, LONGEST), generator=luck)
    found = torch.tensor(lengths(replace(Sizes(), batch=BATCH), LONGEST))
    places = torch.arange(LONGEST)
    ids[:, 0] = words - 2
    ids = torch.where(places == found[:, None] - 1, words - 1, ids).where(places < found[:, None], 0)
    return Captioned(torch.randn(BATCH, 3, size, size, generator=luck), ids, ids != 0)


class OpenClipStep:
    """A step as open_clip's training script takes it, in float32 or under bf16 autocast."""

    def __init__(self, config: dict[str, Any], device: torch.device, bf16: bool) -> None:
        import open_clip

        torch.manual_seed(0)
        given = {name: value for name, value in config.items() if name != "custom_text"}
        self.model = open_clip.CoCa(**given).train()
        words = self.model.text_decoder.text_projection  # left as memory had it; as its init_parameters would begin it
        torch.nn.init.normal_(words, std=len(words) ** -0.5)
        self.model.to(device)
        self.loss = open_clip.CoCaLoss(caption_loss_weight=CAPTION_WEIGHT, clip_loss_weight=CONTRAST_WEIGHT)
        self.length = config["text_cfg"]["context_length"]
        self.device, self.bf16 = device, bf16
        named = list(self.model.named_parameters())
        plain = [p for name, p in named if p.ndim < 2 or "logit_scale" in name]
        decayed = [p for name, p in named if not (p.ndim < 2 or "logit_scale" in name)]
        groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": WEIGHT_DECAY}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS)

    def __call__(self, batch: Captioned) -> dict[str, float]:
        text = torch.nn.functional.pad(batch.token_ids, (0, self.length - batch.token_ids.shape[1]))
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            losses = self.loss(**self.model(batch.images, text), output_dict=True)
            loss = sum(losses.values())
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        weights = {"contrastive_loss": CONTRAST_WEIGHT, "caption_loss": CAPTION_WEIGHT}
        return {name: float(losses[name].detach()) / weight for name, weight in weights.items()}


@contextmanager
def labelled_open_clip(step: OpenClipStep) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, label in (
            (step.model, "_encode_image", "image tower"),
            (step.model, "_encode_text", "text tower"),
            (step.model.text_decoder, "forward", "text decoder"),
            (step.loss, "forward", "losses"),
            (step.optimizer, "step", "optimizer"),
        ):
            stack.enter_context(part(owner, name, label))
        yield


class NoTeacher:
    """In a teacher's place: nothing follows the student."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def follow(self) -> bool:
        return bool(self.engine.was_step_applied())


class OurCoca:
    """A step of ``recipes/sycoca.yaml`` as plain CoCa, from open_clip's weights."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor], bf16: bool) -> None:
        from albef_step.ours import HandedOver, tokenizer

        from crossmask.engine.models.open_clip_recognition import recognise
        from crossmask.engine.recipe_files import load_recipe
        from crossmask.engine.training.distributed import init_distributed
        from crossmask.engine.training.pretrainer import Pretrainer

        layout = recognise(weights, config, MODEL)
        autocast = ", torch_autocast: {enabled: true, dtype: bfloat16}" if bf16 else ""
        values = {
            "data.source": "emoji",  # not read: batches are handed over,
            "data.prefetch": 0,  # each when its step begins
            "objectives.itc.weight": CONTRAST_WEIGHT,
            "objectives.caption": f"{{weight: {CAPTION_WEIGHT}, low_patches: keep}}",
            "objectives.tg_mim.weight": 0.0,
            "optimizer.lr": LR,
            "optimizer.warmup_steps": 0,
            "optimizer.weight_decay": WEIGHT_DECAY,
            "optimizer.betas": list(BETAS),
            "optimizer.gradient_clip": 0.0,
            "training.batch_size": BATCH,
            "training.precision": "fp32",
            "deepspeed": f"{{zero_optimization: {{stage: 0}}{autocast}}}",
        }
        recipe = load_recipe("sycoca", [f"{name}={value}" for name, value in values.items()])
        recipe = recipe.model_copy(update={"model": layout.section})
        device = init_distributed().device
        positions = layout.section.text.positions
        assert positions is not None
        words = tokenizer(replace(Sizes(), vocabulary=max(1100, layout.vocabulary_size)))
        self.data = HandedOver(words, positions, BATCH)
        self.pretrainer = Pretrainer(recipe, self.data, 0, 1, device)
        self.pretrainer.teacher = NoTeacher(self.pretrainer.engine)  # type: ignore[assignment]
        student = self.pretrainer.engine.module
        missing, unknown = student.load_state_dict(layout.to_ours(weights), strict=False)
        if unknown or [name for name in missing if not name.endswith("mask_token")]:
            raise ValueError(f"weights that do not fit: {', '.join([*unknown, *missing])}")

    def __call__(self, batch: Captioned) -> dict[str, float]:
        self.data.batch = batch
        self.pretrainer.step()
        assert self.pretrainer.last is not None
        terms = self.pretrainer.last.terms
        return {"contrastive_loss": float(terms["itc"]), "caption_loss": float(terms["caption"])}
