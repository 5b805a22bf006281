"""A few steps of a tiny ALBEF recipe on every rank under ZeRO 0 to 3; writes what it saw as JSON.

python tests/distributed/albef_steps.py OUTPUT CASES    CASES: {name: {recipe's dotted path: value}} in JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import ranks
import torch
import torch.distributed as dist

from crossmask.engine.data.batch import Batch
from crossmask.engine.recipe import Recipe
from crossmask.engine.training.pretrainer import Pretrainer
from crossmask.kernels.linear import api as products

STEPS, VOCABULARY, SIZE = 3, 40, 64
TOWER = {"width": 24, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
TINY: dict[str, Any] = {
    "model": {
        "image": {**TOWER, "size": 16, "patch_size": 4},
        "text": {**TOWER, "dropout": 0.0},
        "fusion": {"depth": 2, "heads": 2, "mlp_ratio": 2.0, "dropout": 0.0, "norm": "post"},
        "projection_width": 8,
    },
    "masking": {"policy": "random", "options": {"independent_words": True}, "text_ratio": 0.3},
    "objectives": {
        "itc": {"queue_length": 13, "queue_initial": "random"},
        "mlm": {"teacher_reads": "masked"},
        "mim": {"weight": 0.0},
        "distillation_ramp": 0.0,
    },
    "teacher": {"momentum": 0.9},
    "optimizer": {"lr": 1e-3, "warmup_steps": 0},
    "training": {"batch_size": 8, "max_steps": STEPS, "precision": "fp32"},
}


class Pairs:
    """Samples that are functions of their index; every third shares the caption of the one before."""

    train_size, max_tokens, classes = SIZE, 9, None
    tokenizer = SimpleNamespace(mask_id=4, pad_id=0, vocabulary_size=VOCABULARY, word_ids=None)

    def notices(self) -> list[str]:
        return []

    def train_batch(self, indices: Any, epoch: int) -> Batch:
        images, texts, groups = [], [], []
        for index in indices.tolist():
            group = index - (index % 3 == 2)
            images.append(torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index)))
            words = torch.randint(5, VOCABULARY, (9,), generator=torch.Generator().manual_seed(1000 + group))
            length = 4 + group % 6
            words[0], words[length - 1], words[length:] = 2, 3, 0
            texts.append(words)
            groups.append(group)
        ids = torch.stack(texts)
        return Batch(torch.stack(images), ids, ids != 0, ids > 4, torch.tensor(groups), torch.from_numpy(indices))

    def name_of(self, index: int) -> str:
        return str(index)


def same_everywhere(tensor: torch.Tensor) -> bool:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return all(torch.equal(one, tensor) for one in found)


def run(case: dict[str, Any]) -> dict[str, Any]:
    values = json.loads(json.dumps(TINY))
    for path, value in case.items():
        *sections, field = path.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
        target[field] = value
    recipe = Recipe.model_validate(values)
    pretrainer = Pretrainer(recipe, Pairs(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))  # type: ignore[arg-type]
    queue, modes = pretrainer.queue, []
    tower = pretrainer.teacher._model
    tower.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    rings = [queue._image, queue._text, queue._group_id, queue.pointer]
    equal = [all(same_everywhere(ring) for ring in rings)]
    first = queue.image.clone()
    terms: list[dict[str, float]] = []
    for _ in range(STEPS):
        pretrainer.step()
        assert pretrainer.last is not None
        found = pretrainer.last.terms
        terms.append({name: value.item() for name, value in found.items()})
        equal.append(all(same_everywhere(ring) for ring in rings))
    left = queue.group_id == -1
    return {
        "terms": terms,
        "equal": equal,
        "initial": [
            len(first),
            bool(torch.equal(queue.image[left], first[left[: len(first)]])) if len(first) else True,
        ],
        "queue": [len(queue), int(queue.pointer), int(left.sum())],
        "modes": modes,
        "eval": not any(module.training for module in tower.modules()),
        "updates": pretrainer.teacher.updates,
        "notices": pretrainer.notices(),
        "own": queue.image.data_ptr() == queue._image.data_ptr(),
    }


def main() -> None:
    output, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # ranks have different numbers of words, here on both sides of where another library multiplies
        products.applies, products.SMALLEST = (lambda: True), 5 * TOWER["width"] ** 2
    rank, _ = ranks.join()
    seen = {name: run(case) for name, case in cases.items()}
    Path(f"{output}.{rank}.json").write_text(json.dumps(seen))
    ranks.leave()


if __name__ == "__main__":
    main()
