"""A converted checkpoint through ``crossmask evaluate``, against ALBEF's published evaluation, plainly written.

Published: an image's k most similar captions get the match logit as their score, all others -100; captions alike.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from albef_official import Size, official
from PIL import Image
from rich.console import Console
from test_albef_oracle import fusion, linear, text_encoder, visual_encoder
from torch import Tensor

from crossmask.engine.convert import convert_albef
from crossmask.engine.data.normalisation import CLIP
from crossmask.engine.data.pictures import read_picture, square
from crossmask.engine.errors import CheckpointError
from crossmask.engine.model_evaluation import evaluate_model

SIZE = Size()
IMAGES, EACH, K = 24, 2, 10
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flickr")
    luck = np.random.default_rng(1)
    entries = []
    for i in range(IMAGES):
        Image.fromarray(luck.integers(0, 255, (30 + i, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        captions = [
            " ".join(f"word{n}" for n in luck.integers(0, 80, int(luck.integers(2, 9)))) for _ in range(EACH)
        ]  # of 4 to 10 tokens
        entries.append({"image": f"{i}.png", "caption": captions})
    (folder / "test.json").write_text(json.dumps(entries))
    words = [*SPECIALS, *(f"word{n}" for n in range(SIZE.words - len(SPECIALS)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "recipe.yaml").write_text(
        "data: {source: pairs, path: test.json, validation_path: test.json, max_words: 9}\n"
        f"evaluation: {{rerank: {K}, rerank_queries: 0, rerank_score: match_logit}}\n"
    )
    return folder


def published(state: dict[str, Tensor], m: str, folder: Path) -> dict[str, list[float]]:
    """TR and IR at 1, 5 and 10, by features and re-ranked."""
    entries = json.loads((folder / "test.json").read_text())
    pictures = [np.array(square(read_picture(str(folder / e["image"]), ""), SIZE.image)) for e in entries]
    images = CLIP.apply_(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255)
    captions = [caption for entry in entries for caption in entry["caption"]]
    rows = [[2, *(int(word[4:]) + len(SPECIALS) for word in caption.split()), 3] for caption in captions]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = ids != 0
    v, w = visual_encoder(state, m, images), text_encoder(state, m, ids, mask, SIZE.text_layers)
    f_v = F.normalize(linear(state, f"vision_proj{m}", v[:, 0]), dim=-1)
    f_w = F.normalize(linear(state, f"text_proj{m}", w[:, 0]), dim=-1)
    similarity, owner = f_v @ f_w.T, torch.arange(len(captions)) // EACH
    layers = range(SIZE.text_layers, SIZE.text_layers + SIZE.fusion_layers)

    match = torch.stack(
        [linear(state, "itm_head", fusion(state, m, w, mask, x.expand(len(w), -1, -1), layers)[:, 0])[:, 1] for x in v]
    )
    scores = {name: torch.full_like(x, -100.0) for name, x in (("i2t", similarity), ("t2i", similarity.T))}
    for image in range(IMAGES):
        for text in similarity[image].topk(K).indices.tolist():
            scores["i2t"][image, text] = match[image, text]
    for text in range(len(captions)):
        for image in similarity[:, text].topk(K).indices.tolist():
            scores["t2i"][text, image] = match[image, text]
    right = owner[None] == torch.arange(IMAGES)[:, None]
    found = {}
    for kind, of in (("features", {"i2t": similarity, "t2i": similarity.T}), ("reranked", scores)):
        found[kind] = []
        for name, true in (("i2t", right), ("t2i", right.T)):
            order = of[name].argsort(1, descending=True)
            first = true.gather(1, order).float().argmax(1)
            found[kind] += [100 * float((first < k).double().mean()) for k in (1, 5, 10)]
    return found


@pytest.mark.parametrize(("retrieval", "teacher", "seed"), [(False, False, 0), (False, True, 1), (True, False, 2)])
def test_recalls_are_those_of_the_published_evaluation(
    home: Path, tmp_path: Path, retrieval: bool, teacher: bool, seed: int
) -> None:
    torch.save({"model": official(SIZE, seed, retrieval=retrieval)}, tmp_path / "ALBEF.pth")
    convert_albef(tmp_path / "ALBEF.pth", tmp_path / "albef", home / "vocab.txt")
    weights = "teacher" if teacher else None
    console = Console(file=io.StringIO())
    result = evaluate_model(tmp_path / "albef", str(home / "recipe.yaml"), weights=weights, console=console)  # type: ignore[arg-type]
    (split,) = result["splits"].values()
    assert (split["images"], split["captions"]) == (IMAGES, IMAGES * EACH)
    assert (result["weights"], result["temperature"]) == (weights or "student", 0.0625)
    state = official(SIZE, seed, retrieval=retrieval)
    if retrieval:  # the oracle reads names with bert. in them
        state = {re.sub(r"^(text_encoder(_m)?)\.", r"\1.bert.", name): value for name, value in state.items()}
    wanted = published(state, "_m" if teacher else "", home)
    for kind, of in (("features", split), ("reranked", split["reranked"])):
        found = [of[direction][f"r{k}"] for direction in ("i2t", "t2i") for k in (1, 5, 10)]
        assert found == pytest.approx(wanted[kind]), kind
    assert wanted["features"] != wanted["reranked"]


def test_a_checkpoint_without_words_cannot_be_evaluated(home: Path, tmp_path: Path) -> None:
    torch.save({"model": official(SIZE)}, tmp_path / "ALBEF.pth")
    convert_albef(tmp_path / "ALBEF.pth", tmp_path / "albef")
    with pytest.raises(CheckpointError, match=r"no tokenizer.json in it, .*; convert it again with --vocabulary"):
        evaluate_model(tmp_path / "albef", str(home / "recipe.yaml"))
