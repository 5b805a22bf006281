"""ALBEF (Li et al. 2021) once more, plainly from the official state dict's names, and the engine against it.

The first half imports nothing of the engine: it is what the second half is held to. Weights are random, float32.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from albef_official import Size, official
from safetensors.torch import load_file
from torch import Tensor

HEAD = 64
State = dict[str, Tensor]


# ---- what the paper and its state dict say


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N, width) each; ``mask`` (B, keys), True = may be read."""
    q, k, v = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (q, k, v))
    s = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
    if mask is not None:
        s = s.masked_fill(~mask[:, None, None], -1e9)
    return (s.softmax(-1) @ v).transpose(1, 2).flatten(2)


def visual_encoder(state: State, m: str, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1 + patches, width)"""
    name = f"visual_encoder{m}"
    kernel = state[f"{name}.patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, state[f"{name}.patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{name}.pos_embed"]
    n = 0
    while f"{name}.blocks.{n}.norm1.weight" in state:
        block = f"{name}.blocks.{n}"
        q, k, v = linear(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(state, f"{block}.attn.proj", attend(q, k, v))
        hidden = linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6))
        x = x + linear(state, f"{block}.mlp.fc2", F.gelu(hidden))
        n += 1
    return norm(state, f"{name}.norm", x, 1e-6)


def bert_attention(state: State, name: str, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (linear(state, f"{name}.self.{part}", y) for part, y in (("query", x), ("key", keys), ("value", keys)))
    return norm(
        state, f"{name}.output.LayerNorm", x + linear(state, f"{name}.output.dense", attend(q, k, v, mask)), 1e-12
    )


def bert_layer(state: State, layer: str, x: Tensor, mask: Tensor, image: Tensor | None = None) -> Tensor:
    x = bert_attention(state, f"{layer}.attention", x, x, mask)
    if image is not None:
        x = bert_attention(state, f"{layer}.crossattention", x, image, None)
    hidden = F.gelu(linear(state, f"{layer}.intermediate.dense", x))
    return norm(state, f"{layer}.output.LayerNorm", x + linear(state, f"{layer}.output.dense", hidden), 1e-12)


def text_encoder(state: State, m: str, ids: Tensor, mask: Tensor, layers: int) -> Tensor:
    """(B, L) -> (B, L, width)"""
    name = f"text_encoder{m}.bert.embeddings"
    x = F.embedding(ids, state[f"{name}.word_embeddings.weight"])
    x = x + state[f"{name}.token_type_embeddings.weight"][0]
    x = x + state[f"{name}.position_embeddings.weight"][: ids.shape[1]]
    x = norm(state, f"{name}.LayerNorm", x, 1e-12)
    for n in range(layers):
        x = bert_layer(state, f"text_encoder{m}.bert.encoder.layer.{n}", x, mask)
    return x


def fusion(state: State, m: str, words: Tensor, mask: Tensor, image: Tensor, layers: range) -> Tensor:
    for n in layers:
        words = bert_layer(state, f"text_encoder{m}.bert.encoder.layer.{n}", words, mask, image)
    return words


def mlm_logits(state: State, m: str, rows: Tensor) -> Tensor:
    name = f"text_encoder{m}.cls.predictions"
    hidden = F.gelu(linear(state, f"{name}.transform.dense", rows))
    hidden = norm(state, f"{name}.transform.LayerNorm", hidden, 1e-12)
    return F.linear(hidden, state[f"{name}.decoder.weight"], state[f"{name}.decoder.bias"])


def itc(state: State, f: dict[str, Tensor], alpha: float, groups: Tensor) -> Tensor:
    """``f``: features v, w and the teacher's v_m, w_m. The target is uniform over the keys of a group."""
    tau, count = state["temp"].clamp(0.001, 0.5), len(groups)
    keys_v, keys_w = (torch.cat([f[x], state[q].T]) for x, q in (("v_m", "image_queue"), ("w_m", "text_queue")))
    hard = torch.zeros(count, len(keys_v))
    hard[:, :count] = (groups[:, None] == groups[None]).float()
    hard = hard / hard.sum(1, keepdim=True)
    losses = []
    for student, teacher, keys in ((f["v"], f["v_m"], keys_w), (f["w"], f["w_m"], keys_v)):
        target = alpha * (teacher @ keys.T / tau).softmax(1) + (1 - alpha) * hard
        losses.append(-(target.detach() * (student @ keys.T / tau).log_softmax(1)).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def mlm(logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float) -> Tensor:
    soft = -(teacher_logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * soft


# ---- the engine beside it

ALPHA, COUNT, LENGTH = 0.4, 5, 9
CLS, SEP, MASK = 1, 2, 5
SIZES = {"2 + 2": Size(), "1 + 1, one block": Size(48, 16, 64, 1, 61, 12, 128, 1, 1, 3, 8, 7)}


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A converted checkpoint, student and teacher in float32, and a batch."""
    from crossmask.engine.convert import convert_albef
    from crossmask.engine.exported import load_exported

    folder: Path = tmp_path_factory.mktemp("albef")
    size, state = request.param, official(request.param)
    torch.save({"model": state}, folder / "ALBEF.pth")
    convert_albef(folder / "ALBEF.pth", folder / "out")
    student, _, config = load_exported(folder / "out", whole=True)
    teacher, _, _ = load_exported(folder / "out", weights="teacher")
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([9, 4, 7, 6, 3])
    ids = torch.randint(10, size.words, (COUNT, LENGTH), generator=generator)
    ids[:, 0], ids[torch.arange(COUNT), lengths - 1] = CLS, SEP
    mask = torch.arange(LENGTH) < lengths[:, None]
    images = torch.randn(COUNT, 3, size.image, size.image, generator=generator)
    found = SimpleNamespace(
        size=size, state=state, student=student, teacher=teacher, config=config, folder=folder / "out"
    )
    found.images, found.ids, found.mask = images, ids.masked_fill(~mask, 0), mask
    found.layers = range(size.text_layers, size.text_layers + size.fusion_layers)
    return found


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("m", ["", "_m"])
def test_features_and_logits(case: SimpleNamespace, m: str) -> None:
    """Image, text and fused features, ITM logits and MLM logits, of student and teacher."""
    c, state = case, case.state
    model = c.student.model if m == "" else c.teacher
    v, w = visual_encoder(state, m, c.images), text_encoder(state, m, c.ids, c.mask, c.size.text_layers)
    f_v = F.normalize(linear(state, f"vision_proj{m}", v[:, 0]), dim=-1)
    f_w = F.normalize(linear(state, f"text_proj{m}", w[:, 0]), dim=-1)
    image, text = model.encode_image(c.images), model.encode_text(c.ids, c.mask)
    close(image.tokens, v)
    close(text.tokens[c.mask], w[c.mask])
    close(image.feature, f_v)
    close(text.feature, f_w)
    other = torch.tensor([3, 0, 0, 4, 1])
    for images in (torch.arange(COUNT), other):
        wanted = fusion(state, m, w, c.mask, v[images], c.layers)
        index = (None,) if images is not other else (images,)
        keys = model.project_image(image.tokens)
        fused = model.fuse(text.tokens, c.mask, keys, image_index=index).tokens
        close(fused[c.mask], wanted[c.mask])
        close(model.match_logits(fused, c.mask), linear(state, "itm_head", wanted[:, 0]))
        close(model.word_logits(fused[c.mask]), mlm_logits(state, m, wanted[c.mask]))
        rows = torch.tensor([[0, 2]]).expand(COUNT, -1)
        close(model.fuse(text.tokens, c.mask, keys, image_index=index, rows=rows).tokens, wanted[:, [0, 2]])


@pytest.mark.parametrize("groups", [[0, 1, 2, 3, 4], [7, 1, 7, 3, 4]], ids=["all differ", "two alike"])
@pytest.mark.parametrize("ramp", [1.0, 0.25])
def test_losses(case: SimpleNamespace, groups: list[int], ramp: float) -> None:
    """ITC against batch and queue, ITM with the negatives that were drawn, MLM with the teacher on the masked caption,
    and the gradient of their sum, as the training step computes them."""
    from crossmask.engine.data.batch import Batch
    from crossmask.engine.masking import Draws
    from crossmask.engine.objectives import Keys, RunMasks, StudentView, look
    from crossmask.engine.objectives.itm import draw_negatives
    from crossmask.engine.recipe import Recipe
    from crossmask.engine.teacher import FeatureQueue
    from crossmask.engine.training.step import Schedule, compute_losses

    c, state, size = case, case.state, case.size
    itc_section = {"queue_length": size.queue, "distillation": ALPHA}
    objectives = {"itc": itc_section, "mlm": {"teacher_reads": "masked", "distillation": ALPHA}, "mim": {"weight": 0}}
    values = {"model": c.config.model.model_dump(), "masking": {"policy": "random", "text_ratio": 0.4}}
    recipe = Recipe.model_validate(values | {"objectives": objectives})
    words = torch.arange(6, size.words).numpy()
    tokenizer = SimpleNamespace(mask_id=MASK, vocabulary_size=size.words, word_ids=words)
    masks = RunMasks(recipe, SimpleNamespace(tokenizer=tokenizer, train_size=COUNT))  # type: ignore[arg-type]
    group = torch.tensor(groups)
    batch = Batch(c.images, c.ids, c.mask, c.ids > SEP, group, torch.arange(COUNT))
    schedule = Schedule(distillation=ramp, fusion=True, hardness=1.0, queue=True)
    queue = FeatureQueue(size.queue, size.projection)
    queue.load_state_dict(load_file(c.folder / "queue.safetensors"))

    view = look(c.teacher, batch, masks, 0, COUNT)
    keys = Keys(view.image_feature, view.text_feature, group, queue=Keys(queue.image, queue.text, queue.group_id))
    c.student.requires_grad_()
    loss, terms = compute_losses(c.student, batch, view, keys, recipe, schedule, masks.planner)

    # the same from the state dict
    plain = {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in state.items()}
    for m in ("", "_m"):  # tied
        plain[f"text_encoder{m}.cls.predictions.decoder.weight"] = plain[
            f"text_encoder{m}.bert.embeddings.word_embeddings.weight"
        ]
        plain[f"text_encoder{m}.cls.predictions.decoder.bias"] = plain[f"text_encoder{m}.cls.predictions.bias"]
    features, tokens = {}, {}
    for m in ("", "_m"):
        v, w = visual_encoder(plain, m, c.images), text_encoder(plain, m, c.ids, c.mask, size.text_layers)
        features[f"v{m}"] = F.normalize(linear(plain, f"vision_proj{m}", v[:, 0]), dim=-1)
        features[f"w{m}"] = F.normalize(linear(plain, f"text_proj{m}", w[:, 0]), dim=-1)
        tokens[m] = v, w
        if m == "_m":
            features = {name: x if name in "vw" else x.detach() for name, x in features.items()}
    wanted: dict[str, Tensor] = {"itc": itc(plain, features, ramp * ALPHA, group)}

    seen = StudentView(*(SimpleNamespace(feature=features[x].detach()) for x in "vw"))  # type: ignore[arg-type]
    draws = Draws(recipe.seed, 0, batch.index)
    negatives, texts, legal = draw_negatives(seen, view, group, state["temp"], COUNT, 1.0, draws)
    assert legal.all()
    assert (group[negatives] != group).all()
    assert (group[texts] != group).all()
    v, w = tokens[""]
    pairs = [(w, c.mask, v), (w, c.mask, v[negatives]), (w[texts], c.mask[texts], v)]
    fused = torch.cat([fusion(plain, "", *pair, c.layers)[:, 0] for pair in pairs])
    labels = torch.cat([torch.ones(COUNT), torch.zeros(2 * COUNT)]).long()
    wanted["itm"] = F.cross_entropy(linear(plain, "itm_head", fused), labels)

    assert view.plan is not None
    hidden = view.plan.text
    assert 3 < hidden.sum() < hidden.numel()
    read = view.plan.read(c.ids)
    assert (read != c.ids).any()
    logits: dict[str, Tensor] = {}
    for m in ("", "_m"):
        masked = text_encoder(plain, m, read, c.mask, size.text_layers)
        logits[m] = mlm_logits(plain, m, fusion(plain, m, masked, c.mask, tokens[m][0], c.layers)[hidden])
    wanted["mlm"] = mlm(logits[""], logits["_m"].detach(), c.ids[hidden], ramp * ALPHA)

    for name, value in wanted.items():
        close(terms[name], value.detach())
    total = torch.stack(list(wanted.values())).sum()
    close(loss.detach(), total.detach())
    own, expected = gradients(c.student, loss, plain, total)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(own[name] / scale, gradient / scale, atol=2e-5, rtol=0, msg=name)


def gradients(student: Any, loss: Tensor, plain: State, total: Tensor) -> tuple[State, State]:
    """By official names, of some parameters of every part."""
    fusion_layer = student.model.fusion.layers[-1]
    last = max(int(n.split(".")[4]) for n in plain if n.startswith("text_encoder.bert.encoder.layer."))
    layer = f"text_encoder.bert.encoder.layer.{last}"
    text_layer = student.model.text.bert.encoder.layer[0]
    pairs = {
        "temp": student.temperature,
        "visual_encoder.pos_embed": student.model.image.vit.pos_embed,
        "visual_encoder.blocks.0.attn.qkv.weight": student.model.image.vit.blocks[0].attn.qkv.weight,
        "text_encoder.bert.embeddings.word_embeddings.weight": student.model.text.word_embeddings.weight,
        "text_encoder.bert.encoder.layer.0.output.dense.weight": text_layer.output.dense.weight,
        f"{layer}.crossattention.self.query.weight": fusion_layer.cross_attention.query.weight,
        f"{layer}.attention.output.LayerNorm.weight": fusion_layer.self_norm.weight,
        f"{layer}.output.dense.bias": fusion_layer.feed_forward[2].bias,
        "text_encoder.cls.predictions.bias": student.model.word_bias,
        "vision_proj.weight": student.model.image_projection.weight,
        "itm_head.weight": student.model.match_head.weight,
    }  # fmt: skip
    own = dict(zip(pairs, torch.autograd.grad(loss, list(pairs.values())), strict=True))
    expected = dict(zip(pairs, torch.autograd.grad(total, [plain[name] for name in pairs]), strict=True))
    own["temp"] = own["temp"].reshape(())
    return own, expected
