"""The training step of ALBEF as it is commonly written: what the package's step is measured against.

A re-expression of what the public implementation computes, with its costs: attention weights of every layer in memory
with a dropout mask each; keys and values of the image projected for every pair; logits of the whole vocabulary for
every token, of student and teacher, and soft labels (B, L, V); similarities (B, B + Q) against a clone of the queue
joined to the batch; negatives drawn row by row with ``.item()``; the average of the weights tensor by tensor inside the
forward; the teacher in training mode.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common_model import ImageEncoder, TextEncoder
from .sizes import CLS, FIRST_WORD, MASK, PAD, SEP, Captioned, Sizes

MOMENTUM, TEMPERATURE, ALPHA, LR, WEIGHT_DECAY = 0.995, 0.07, 0.4, 1e-4, 0.02


@dataclass(frozen=True)
class Drawn:
    """What is random in a step apart from dropout, for a comparison with another implementation of it."""

    image_negatives: Tensor  # (B,) int64, for each text
    text_negatives: Tensor  # (B,) int64, for each image
    corrupted: Tensor  # (B, L) int64
    predicted: Tensor  # (B, L) bool


class Albef(nn.Module):
    """Student and teacher. :meth:`forward` gives ITC, ITM and MLM of a batch, and moves the teacher and the queue."""

    image_queue: Tensor
    text_queue: Tensor
    queue_ptr: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.visual_encoder = ImageEncoder(sizes)
        self.text_encoder = TextEncoder(sizes)
        self.vision_proj = nn.Linear(sizes.width, sizes.projection)
        self.text_proj = nn.Linear(sizes.width, sizes.projection)
        self.itm_head = nn.Linear(sizes.width, 2)
        self.temp = nn.Parameter(torch.tensor(TEMPERATURE))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.visual_encoder_m = copy.deepcopy(self.visual_encoder)
        self.text_encoder_m = copy.deepcopy(self.text_encoder)
        self.vision_proj_m = copy.deepcopy(self.vision_proj)
        self.text_proj_m = copy.deepcopy(self.text_proj)
        names = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
        self.pairs = [(getattr(self, name), getattr(self, f"{name}_m")) for name in names]
        for _, teacher in self.pairs:
            teacher.requires_grad_(False)
        queues = F.normalize(torch.randn(2, sizes.projection, sizes.queue), dim=1)
        self.register_buffer("image_queue", queues[0].clone())
        self.register_buffer("text_queue", queues[1].clone())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def _momentum_update(self) -> None:
        for student, teacher in self.pairs:
            for mine, average in zip(student.parameters(), teacher.parameters(), strict=True):
                average.data = average.data * MOMENTUM + mine.data * (1.0 - MOMENTUM)

    @torch.no_grad()
    def _enqueue(self, image: Tensor, text: Tensor) -> None:
        size, pointer = len(image), int(self.queue_ptr)
        assert self.sizes.queue % size == 0
        self.image_queue[:, pointer : pointer + size] = image.T
        self.text_queue[:, pointer : pointer + size] = text.T
        self.queue_ptr[0] = (pointer + size) % self.sizes.queue

    def _corrupt(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """BERT's 80 / 10 / 10: what is read (B, L), and which words are to be predicted (B, L)."""

        def drawn(share: float) -> Tensor:
            return torch.bernoulli(torch.full(ids.shape, share, device=ids.device)).bool()

        chosen = drawn(self.sizes.masked)
        chosen &= (ids != PAD) & (ids != CLS) & (ids != SEP)
        masked = drawn(0.8) & chosen
        other = drawn(0.5) & chosen & ~masked
        read = ids.clone()
        read[masked] = MASK
        read[other] = torch.randint(FIRST_WORD, self.sizes.vocabulary, ids.shape, device=ids.device)[other]
        return read, chosen

    def _negatives(self, weights: Tensor) -> Tensor:
        return torch.tensor([int(torch.multinomial(weights[row], 1).item()) for row in range(len(weights))])

    def forward(self, batch: Captioned, alpha: float = ALPHA, drawn: Drawn | None = None) -> dict[str, Tensor]:
        images, ids, mask = batch.images, batch.token_ids, batch.token_mask
        rows = len(ids)
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        image = self.visual_encoder(images)
        image_feature = F.normalize(self.vision_proj(image[:, 0]), dim=-1)
        text = self.text_encoder.bert.read(ids, mask)
        text_feature = F.normalize(self.text_proj(text[:, 0]), dim=-1)

        with torch.no_grad():
            if drawn is None:  # a comparison of one step brings its own teacher
                self._momentum_update()
            image_m = self.visual_encoder_m(images)
            image_feature_m = F.normalize(self.vision_proj_m(image_m[:, 0]), dim=-1)
            image_keys = torch.cat([image_feature_m.t(), self.image_queue.clone().detach()], dim=1)
            text_m = self.text_encoder_m.bert.read(ids, mask)
            text_feature_m = F.normalize(self.text_proj_m(text_m[:, 0]), dim=-1)
            text_keys = torch.cat([text_feature_m.t(), self.text_queue.clone().detach()], dim=1)
            i2t_m = image_feature_m @ text_keys / self.temp
            t2i_m = text_feature_m @ image_keys / self.temp
            hard = torch.zeros_like(i2t_m)
            hard.fill_diagonal_(1)
            i2t_targets = alpha * F.softmax(i2t_m, dim=1) + (1 - alpha) * hard
            t2i_targets = alpha * F.softmax(t2i_m, dim=1) + (1 - alpha) * hard
        i2t = image_feature @ text_keys / self.temp
        t2i = text_feature @ image_keys / self.temp
        loss_i2t = -torch.sum(F.log_softmax(i2t, dim=1) * i2t_targets, dim=1).mean()
        loss_t2i = -torch.sum(F.log_softmax(t2i, dim=1) * t2i_targets, dim=1).mean()
        itc = (loss_i2t + loss_t2i) / 2
        self._enqueue(image_feature_m, text_feature_m)

        positive = self.text_encoder.bert.fuse(text, mask, image)
        if drawn is None:
            with torch.no_grad():
                of_images, of_texts = F.softmax(i2t[:, :rows], dim=1), F.softmax(t2i[:, :rows], dim=1)
                of_images.fill_diagonal_(0)
                of_texts.fill_diagonal_(0)
            image_index, text_index = self._negatives(of_texts), self._negatives(of_images)
        else:
            image_index, text_index = drawn.image_negatives, drawn.text_negatives
        images_negative = torch.stack([image[index] for index in image_index.tolist()])
        texts_negative = torch.stack([text[index] for index in text_index.tolist()])
        masks_negative = torch.stack([mask[index] for index in text_index.tolist()])
        texts = torch.cat([text, texts_negative])
        masks = torch.cat([mask, masks_negative])
        negative = self.text_encoder.bert.fuse(texts, masks, torch.cat([images_negative, image]))
        logits = self.itm_head(torch.cat([positive[:, 0], negative[:, 0]]))
        labels = torch.cat([torch.ones(rows, dtype=torch.long), torch.zeros(2 * rows, dtype=torch.long)])
        itm = F.cross_entropy(logits, labels.to(logits.device))

        corrupted, predicted = self._corrupt(ids) if drawn is None else (drawn.corrupted, drawn.predicted)
        word_labels = ids.clone()
        word_labels[~predicted] = -100
        with torch.no_grad():
            soft_labels = F.softmax(self.text_encoder_m.predict(corrupted, mask, image_m), dim=-1)
        scores = self.text_encoder.predict(corrupted, mask, image)
        hard_loss = F.cross_entropy(scores.view(-1, scores.shape[-1]), word_labels.view(-1))
        soft_loss = -torch.sum(F.log_softmax(scores, dim=-1) * soft_labels, dim=-1)
        mlm = (1 - alpha) * hard_loss + alpha * soft_loss[word_labels != -100].mean()
        return {"itc": itc, "itm": itm, "mlm": mlm}


def parameter_groups(model: Albef) -> list[dict[str, object]]:
    """Biases and norms without weight decay, as timm divides them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class CommonStep:
    """The whole step, in float32 or under bf16 autocast."""

    def __init__(self, sizes: Sizes, seed: int = 0, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(seed)
        self.model = Albef(sizes).train().to(device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model), lr=LR)

    def __call__(self, batch: Captioned, *, bf16: bool = False, drawn: Drawn | None = None) -> dict[str, float]:
        with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=bf16):
            losses = self.model(batch, drawn=drawn)
            loss = losses["itc"] + losses["itm"] + losses["mlm"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in losses.items()}
