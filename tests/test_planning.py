"""The scaling model: exact parameter counts, FLOPs by two ways, memory and traffic by hand, and a user's mistakes."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from albef_step import flops  # noqa: E402
from albef_step.sizes import Sizes  # noqa: E402

from crossmask.engine.errors import RecipeError, UserError  # noqa: E402
from crossmask.engine.planning.assumed import Assumed, hidden_patches, masked_words  # noqa: E402
from crossmask.engine.planning.command import load_unopened, plan_recipe  # noqa: E402
from crossmask.engine.planning.estimate import Plan, described, largest_batch, plan  # noqa: E402
from crossmask.engine.planning.tally import Launched, Rates  # noqa: E402
from crossmask.engine.planning.trace import Parameter, Trace, trace  # noqa: E402
from crossmask.engine.planning.zero import Layout, Zero, gathered_elements, held, on_top, persistent, wire  # noqa: E402
from crossmask.engine.recipe import Recipe  # noqa: E402
from crossmask.engine.training.systems import build_system  # noqa: E402
from crossmask.kernels.roofline import DEVICES, Work, cross_attention_backward, soft_contrastive  # noqa: E402

EMOJI = ("albef-emoji", "syncmask-emoji", "sycoca-emoji", "composed-emoji", "recognition-emoji")
H100 = DEVICES["h100"]


def numbers(recipe: Recipe, pairs: int, ranks: int) -> Trace:
    return trace(recipe, Assumed.of(recipe), pairs, ranks)


@pytest.fixture(scope="module")
def albef() -> Recipe:
    return load_unopened("albef", [])


@pytest.fixture(scope="module")
def albef_trace(albef: Recipe) -> Trace:
    return numbers(albef, 8, 16)


@pytest.mark.parametrize("name", EMOJI)
def test_parameters_are_those_of_the_built_models(name: str) -> None:
    recipe = load_unopened(name, ["data.vocabulary_size=700"])
    assumed = Assumed.of(recipe)
    from crossmask.engine.planning.assumed import AssumedMasks

    system = build_system(recipe, assumed.data, AssumedMasks(recipe, assumed))
    student, teacher = system.build_student(), system.build_teacher()
    seen = numbers(recipe, 4, 2)
    assert {p.name: p.numel for p in seen.parameters} == {n: p.numel() for n, p in student.named_parameters()}
    assert seen.teacher == sum(p.numel() for p in teacher.parameters())
    taught = {f"model.{n}" for n, _ in teacher.named_parameters()}
    assert {p.name for p in seen.parameters if p.taught} == taught


def test_albef_has_the_parameters_of_its_towers(albef_trace: Trace) -> None:
    """ViT-B/16 at 256 pixels and BERT-base, whose fusion layers have cross-attention on top (Li et al. 2021)."""
    by_tower = {
        tower: sum(p.numel for p in albef_trace.parameters if p.name.startswith(f"model.{tower}."))
        for tower in ("image", "text", "fusion")
    }
    width, tokens = 768, 257
    layer = 12 * width**2 + 13 * width
    assert by_tower["image"] == 12 * layer + width * 768 + width + tokens * width + width + 2 * width + width
    assert by_tower["text"] == 6 * layer + (30522 + 512 + 2) * width + 2 * width
    assert by_tower["fusion"] == 6 * (layer + 4 * width**2 + 6 * width)


def test_flops_are_those_of_the_formulas(albef: Recipe, albef_trace: Trace) -> None:
    """Two ways to one number: what PyTorch and the rooflines count of the step as it runs, and the algorithm's."""
    B, L, M = 8, 25, masked_words(albef, Assumed.of(albef))
    sizes = Sizes(batch=B, masked=0.15)
    counted: dict[str, float] = {}
    for one in albef_trace.launched:
        counted[one.part] = counted.get(one.part, 0.0) + sum(one.work.flops.values())
    image = flops.image_tower(sizes, B) + flops.patches(sizes, B)
    text = flops.text_tower(sizes, B, L, B * L)
    transform = flops.linear(B * M, 768, 768)
    vocabulary = flops.vocabulary(sizes, B * M)
    masked = flops.fusion(sizes, B, L, B * L, last=M)
    keys = flops.image_keys(sizes, B)
    projections = 2 * flops.linear(B, 768, 256)
    contrast = 2 * 2 * flops.linear(B, 256, 16 * B + 65536)
    similarities = 2 * flops.linear(B, 256, B)
    assert counted["image tower"] == image
    assert counted["text tower"] == 2 * text, "intact and masked captions, in one pass"
    assert counted["images' keys and values"] == keys
    matched = flops.fusion(sizes, 3 * B, L, 3 * B * L, last=1) + flops.linear(3 * B, 768, 2)
    assert counted["fusion for ITM"] == matched + similarities
    assert counted["fusion for MLM"] == masked + transform + 2 * vocabulary
    assert counted["ITC"] == pytest.approx(contrast)
    assert counted["teacher"] == image + 2 * text + keys + masked + transform + projections + flops.linear(B, 768, 256)
    forward = sum(count for part, count in counted.items() if part not in ("teacher", "backward"))
    assert 1.9 * forward < counted["backward"] < 2.6 * forward


def test_kernels_are_those_of_the_gpu_down_to_their_partial_sums() -> None:
    """Two GPUs that differ in their multiprocessors alone; attention of 4 heads by 32, of 16 words to 18² patches and
    a class token; contrast of 2 fp32 queries of width 128 with 4 keys of two ranks and a queue of 2048."""
    recipe = load_unopened("albef-emoji", ["model.image.size=144"])
    for processors in (4, 132):
        gpu = dataclasses.replace(H100, multiprocessors=processors)
        counted = {(one.name, one.work.bytes) for one in trace(recipe, Assumed.of(recipe), 2, 2, gpu).launched}
        shared = {"architecture": "sm_90", "multiprocessors": processors}
        for name, work in {
            "cross_attention_backward": cross_attention_backward(2, 4, 16, 325, 32, "bf16", **shared),
            "soft_contrastive": soft_contrastive(2, 4, 2048, 128, "fp32", **shared),
            "soft_contrastive_backward": soft_contrastive(2, 4, 2048, 128, "fp32", backward=True, **shared),
        }.items():
            assert (f"crossmask::{name}", work.bytes) in counted, (name, processors)


def test_every_part_of_a_step_is_one_that_the_engine_calls() -> None:
    """A step's parts are told apart by the names of what it calls: one that is gone would end up in "rest"."""
    from crossmask.engine.planning.trace import OBJECTIVES
    from crossmask.engine.training import caption_step, step

    assert [name for name in OBJECTIVES if not hasattr(step, name) and not hasattr(caption_step, name)] == []


def test_a_mask_hides_what_the_recipe_says() -> None:
    recipe = load_unopened("syncmask-emoji", ["masking.image_ratio=0.25"])
    assert hidden_patches(recipe) == 9
    ratio = "masking.image_ratio={kind: uniform, start: 0.25, end: 0.75}"
    assert hidden_patches(load_unopened("syncmask-emoji", [ratio])) == 27


def test_saved_activations_are_those_that_autograd_keeps() -> None:
    """The tally's memory at the end of the forward holds all that autograd saves, and little more than it."""
    from crossmask.engine.planning import trace as module

    recipe = load_unopened("albef-emoji", [])
    saved: dict[int, tuple[int, torch.Tensor]] = {}
    original = module.systems.FusionSystem.forward

    def forward(self: Any, *args: Any) -> Any:
        weights = {p.untyped_storage()._cdata for model in (args[0], args[1].model) for p in model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage()._cdata not in weights:
                saved.setdefault(x.untyped_storage()._cdata, (x.untyped_storage().nbytes(), x))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.systems.FusionSystem, "forward", forward)
        seen = numbers(recipe, 16, 2)
    kept = sum(count for count, _ in saved.values())
    queue = 2 * 4 * recipe.objectives.itc.queue_length * recipe.model.projection_width
    assert kept - queue <= seen.saved <= seen.most
    assert seen.saved < 1.12 * (kept - queue)


def layout(stage: int, ranks: int, persistence: int = 10) -> tuple[Layout, Trace]:
    parameters = [
        Parameter("matrix", 101, 0, True, True, (0, 3)),
        Parameter("vector", 7, 1, True, True, (1, 2)),
        Parameter("head", 11, 0, False, False),
    ]
    zero = Zero(stage, 50, False, persistence, 10**9, 10**9, 20, 25)
    seen = Trace(4, ranks, [], 0, 0, [], parameters, 108, 0, [101, 7, 7, 101])
    return Layout.of(zero, parameters, ranks), seen


def test_state_by_stage_by_hand() -> None:
    """119 parameters, 108 of them with a teacher; groups of 112 and 7, padded to multiples of 8 over four ranks."""
    found = {stage: held(layout(stage, 4)[0], layout(stage, 4)[1], 2) for stage in range(4)}
    names = ("weights", "masters", "moments", "teacher's average", "teacher's weights")
    assert [found[0][n] for n in names] == [2 * 119, 4 * 119, 8 * 119, 4 * 108, 2 * 108]
    assert [found[2][n] for n in names] == [2 * 120, 4 * 30, 8 * 30, 4 * 30, 2 * 120]
    parts = 26 + 2 + 3
    assert [found[3][n] for n in names] == [2 * (parts + 8), 4 * parts, 8 * parts, 4 * parts, 2 * parts]
    full = held(*layout(0, 4), 4)
    assert [full[n] for n in names] == [4 * 119, 0, 8 * 119, 4 * 108, 0]


def test_what_comes_and_goes_by_hand() -> None:
    """By backward, step and look; a bucket of 50 elements, of which stage 3 gathers 20 at a time and steps 25."""

    def bytes_of(stage: int, ranks: int, element: int = 2, accumulates: bool = False) -> list[int]:
        return [sum(x.values()) for x in on_top(layout(stage, ranks)[0], element, accumulates).values()]

    assert bytes_of(0, 1) == [2 * 119, (2 + 4) * 119, 0]
    assert bytes_of(0, 4, element=4) == [4 * 119, (4 + 4) * 119, 0], "joined for one all-reduce"
    assert bytes_of(1, 4) == [2 * (120 + 50), 2 * (120 + 50 + 50), 0], "its buckets are more than the step's copies"
    assert bytes_of(2, 1) == [2 * (120 + 50), (2 + 2 + 4) * 120, 0]
    assert bytes_of(2, 1, accumulates=True)[0] == 2 * (240 + 50)
    assert bytes_of(2, 1, element=4)[1] == (4 + 4) * 120, "fp32 needs no fp32 copy"
    assert bytes_of(3, 4) == [2 * (116 + 20 + 50), (2 + 4) * 25, 2 * 112]
    assert bytes_of(3, 1) == [2 * 50, (2 + 4) * 25, 2 * 108], "a single rank gathers its student nowhere"


def test_wire_by_stage_by_hand() -> None:
    def sent(stage: int, accumulation: int = 1) -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        for one in wire(*layout(stage, 4), 2, accumulation, follows=False):
            found[one.kind, one.operation] = found.get((one.kind, one.operation), 0) + one.count
        return found

    assert sent(0) == {("gradients", "all_reduce"): 2 * 119}
    stage1 = {("gradients", "all_reduce"): 2 * 108, ("parameters", "all_gather"): 240, ("teacher", "all_gather"): 240}
    assert sent(1) == sent(2) == sent(1, 3) == stage1
    assert sent(2, 3)["gradients", "all_reduce"] == 3 * 2 * 108, "stage 2 reduces every micro-batch"
    stage3 = {("gradients", "reduce_scatter"): 2 * 112, ("parameters", "all_gather"): 2 * (104 + 8)}
    assert sent(3) == {**stage3, ("teacher", "all_gather"): 2 * 112}
    assert wire(*layout(2, 1), 2, 1, follows=False) == []


def test_stage_3_gathers_again_what_it_has_released() -> None:
    one, seen = layout(3, 4)
    assert persistent(one.zero, seen.parameters) == {"vector"}
    assert gathered_elements(one, seen) == 104
    short = Zero(3, 50, False, 10, 10**9, 14, 20, 25)
    again = Layout.of(short, seen.parameters, 4)
    assert gathered_elements(again, seen) == 208, "14 elements of others lie between its two uses"


def test_rings_share_what_leaves_a_node() -> None:
    found = planned(16)
    for one in found.stages[0].transfers:
        factor = 2 if one.collective.operation == "all_reduce" else 1
        assert one.inside + one.between == pytest.approx(factor * 15 / 16 * one.collective.count)
        assert one.between == pytest.approx((one.inside + one.between) / 8)
        assert one.seconds >= one.between / H100.network


FEW = ["objectives.itm.weight=0", "objectives.mlm.weight=0"]  # contrast alone, which is soon traced


def planned(gpus: int, overrides: list[str] | None = None) -> Plan:
    return plan(load_unopened("albef-emoji", [*FEW, *(overrides or [])]), H100, gpus, Rates())


def test_the_batch_that_fits_fits() -> None:
    stage = planned(8, []).stages[2]
    assert stage.pairs > 0
    assert stage.pairs % 8 == 0
    again = planned(8, [f"training.batch_size={8 * stage.pairs}"])
    assert again.fits(again.stages[2])


@pytest.mark.parametrize(
    ("most", "start", "room"),
    [
        (lambda n: 5.0 + 3 * n, 16, 3000.0),
        (lambda n: 5.0 + 3 * n, 4096, 3000.0),
        (lambda n: 5.0 + 3 * n, 4096, 20.0),
        (lambda n: 3 * n + n**2 / 100, 32, 30000.0),
        (lambda n: max(3 * n, n**2 / 10), 32, 100000.0),
    ],
)
def test_the_largest_batch_is_found(most: Any, start: int, room: float) -> None:
    found = largest_batch(room, most, start)
    assert most(found) <= room
    assert most(1.15 * found + 8) > room
    assert largest_batch(most(0), most, start) == 0


def test_more_gpus_take_less_memory_each_and_the_parts_add_up() -> None:
    few, many = planned(8), planned(64)
    assert many.stages[2].memory["moments"] == pytest.approx(few.stages[2].memory["moments"] / 8, rel=0.01)
    assert many.stages[0].memory["moments"] == few.stages[0].memory["moments"]
    for stage in few.stages:
        assert stage.seconds == pytest.approx(sum(stage.parts.values()))
        assert stage.total == sum(stage.memory.values())


def test_a_launch_takes_as_long_as_its_slowest_resource_at_the_assumed_rates() -> None:
    product = Launched("", "mm", Work({"bf16": 1e12}, read=1e6))
    assert product.seconds(H100, Rates(matrix=0.5)) == pytest.approx(1e12 / 989.4e12 / 0.5)
    copy = Launched("", "clone", Work(read=1e9, written=1e9))
    assert copy.seconds(H100, Rates(memory=0.8)) == pytest.approx(2e9 / 3.35e12 / 0.8)
    assert Launched("", "add", Work(read=8.0)).seconds(H100, Rates(launch=4e-6)) == 4e-6


def shown(*arguments: Any, **options: Any) -> str:
    text = io.StringIO()
    plan_recipe(*arguments, console=Console(file=text, width=80, highlight=False), **options)
    return text.getvalue()


def test_the_tables_fit_80_columns_and_say_predicted(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    text = shown("syncmask-emoji", ["objectives.itm.weight=0"], 2, "a100-80gb", file)
    assert max(map(len, text.splitlines())) <= 80
    for words in ("Predicted", "recommended: ZeRO stage", "data are not opened", "60% of the peak", "ZeRO 3"):
        assert words in text
    found = json.loads(file.read_text())
    assert found["label"] == "predicted"
    assert [stage["stage"] for stage in found["stages"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("albef-emoji", [], 2, "h10"), "--gpu h10: did you mean h100? known are a100-80gb"),
        (("albef-emoji", [], 2, "A100"), "--gpu A100: did you mean a100-80gb? known are"),
        (("albef-emoji", [], 0, "h100"), "--gpus 0"),
        (("albef-emoji", [], 7, "h100"), "training.batch_size: 256 is not divisible by 7 ranks"),
        (("albef-emoj", [], 2, "h100"), "no such recipe"),
        (("albef-emoji", ["model.image.depth=2000"], 2, "h100"), "model.image.depth (2,000): a plan goes through"),
        (("albef-emoji", ["deepspeed.zero_optimization.offload_optimizer={device: cpu}"], 2, "h100"), "no offload"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        shown(*arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_that_fits_nowhere_says_what_would_help() -> None:
    big = [*FEW, "training.batch_size=4194304"]
    with pytest.raises(RecipeError) as error:
        shown("albef-emoji", big, 8, "rtx-4090")
    assert "fit into no rtx-4090 at any ZeRO stage; set training.accumulation_steps to" in str(error.value)
    steps = int(str(error.value).partition("accumulation_steps to ")[2].partition(",")[0])
    assert "recommended" in shown("albef-emoji", [*big, f"training.accumulation_steps={steps}"], 8, "rtx-4090")


def test_nothing_is_opened_that_is_not_there() -> None:
    recipe = load_unopened("albef", ["data.path=/nowhere/pairs.json", "model.image.weights=/nowhere/vit.pth"])
    assert recipe.model.image.weights is None
    assert Assumed.of(recipe).vocabulary == recipe.data.vocabulary_size == 30522


def test_an_efficiency_is_a_share() -> None:
    with pytest.raises(UserError, match=r"--efficiency 1\.5"):
        shown("albef-emoji", [], 2, "h100", None, 1.5)


def test_described_holds_every_stage() -> None:
    recipe = load_unopened("sycoca-emoji", [])
    found: Any = described(plan(recipe, H100, 2, Rates()))
    assert found["parameters"] == 1891305
    kinds = {one["kind"] for stage in found["stages"] for one in stage["wire"]}
    assert kinds == {"gradients", "parameters", "teacher", "features"}
    assert SimpleNamespace(**found).recommended_stage in range(4)
