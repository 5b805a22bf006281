"""EmaTeacher in plain loops: the average, half precision, buffers, wrappers, checkpoints, and what it imports."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from crossmask.engine.teacher import Cosine, EmaTeacher, LightningEma, standalone


class Student(nn.Module):
    """Tied and frozen weights, a batch norm, a buffer that no checkpoint has."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(width, 1)
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        found: Tensor = self.frozen(self.second(self.norm(self.first(x)).relu()))
        return found


def sgd(student: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.3, **options)


def train(student: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        dtype = next(student.parameters()).dtype
        student(torch.randn(8, 6, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_average_of_a_plain_loop() -> None:
    student = Student()
    teacher, optimizer = EmaTeacher(student, 0.9), sgd(student)
    wanted = {name: p.detach().double() for name, p in student.named_parameters()}
    for step in range(1, 6):
        train(student, optimizer)
        teacher.follow()
        for name, p in student.named_parameters():
            wanted[name] = 0.9 * wanted[name] + 0.1 * p.detach().double()
        assert teacher.updates == step
    for name, p in teacher.model.named_parameters():
        torch.testing.assert_close(p.double(), wanted[name], rtol=1e-6, atol=1e-7)
        assert not p.requires_grad
    assert teacher.model.second.weight is teacher.model.first.weight
    assert teacher.model.first.weight is not student.first.weight
    assert not teacher.model.training
    assert torch.equal(teacher.model.norm.running_mean, student.norm.running_mean)
    assert torch.equal(teacher.model.seen, student.seen)
    assert not teacher(torch.randn(2, 6)).requires_grad


def test_an_update_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    update = standalone.ema_update_
    monkeypatch.setattr(standalone, "ema_update_", lambda own, *a, **k: (calls.append(len(own)), update(own, *a, **k)))
    student = Student()
    teacher = EmaTeacher(student, 0.9)
    teacher.follow()
    assert calls == [len(list(student.parameters()))]  # tied ones once


def test_a_schedule_is_asked_with_the_updates_made() -> None:
    student = Student()
    teacher, optimizer = EmaTeacher(student, Cosine(0.5, 2)), sgd(student)
    train(student, optimizer)
    before = teacher.model.first.weight.clone()
    teacher.follow()
    torch.testing.assert_close(teacher.model.first.weight, 0.5 * (before + student.first.weight.detach()))
    teacher.follow()
    kept = teacher.model.first.weight.clone()
    train(student, optimizer)
    teacher.follow()  # a decay of 1: the teacher stays
    assert torch.equal(teacher.model.first.weight, kept)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_student_in_bfloat16_is_averaged_in_float32(dtype: torch.dtype | None) -> None:
    student = Student().bfloat16()
    teacher, optimizer = EmaTeacher(student, 0.999, dtype=dtype), sgd(student)
    wanted = student.first.weight.detach().float()
    for _ in range(20):
        train(student, optimizer)
        teacher.follow()
        wanted = wanted + 0.001 * (student.first.weight.detach().float() - wanted)
    average = teacher.state_dict()["average"]["first.weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, wanted, rtol=1e-6, atol=1e-7)
    assert not torch.equal(average, average.bfloat16().float())  # finer than the student's own dtype
    own = teacher.model.first.weight
    assert own.dtype == (dtype or torch.bfloat16)
    assert torch.equal(own, wanted.to(own.dtype)) if dtype is None else torch.allclose(own, wanted, rtol=1e-6)
    assert teacher(torch.randn(3, 6, dtype=own.dtype)).dtype == own.dtype  # its buffers go along


def test_a_teacher_in_bfloat16_of_a_student_in_float32() -> None:
    student = Student()
    teacher = EmaTeacher(student, 0.0, dtype=torch.bfloat16)
    train(student, sgd(student))
    teacher.follow()
    assert torch.equal(teacher.model.first.weight, student.first.weight.detach().bfloat16())
    assert torch.equal(teacher.state_dict()["average"]["first.weight"], student.first.weight.detach())
    assert teacher(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_buffers_can_be_averaged() -> None:
    student = Student()
    teacher, optimizer = EmaTeacher(student, 0.9, buffers="average"), sgd(student)
    before = student.norm.running_mean.clone()
    train(student, optimizer)
    teacher.follow()
    torch.testing.assert_close(teacher.model.norm.running_mean, before.lerp(student.norm.running_mean, 0.1))
    assert torch.equal(teacher.model.norm.num_batches_tracked, student.norm.num_batches_tracked)


def test_a_checkpoint_goes_on_as_if_nothing_had_happened() -> None:
    student = Student()
    teacher, optimizer = EmaTeacher(student, Cosine(0.9, 10), buffers="average"), sgd(student)
    train(student, optimizer, 2)
    teacher.follow()
    state = copy.deepcopy(teacher.state_dict())
    other = EmaTeacher(student, Cosine(0.9, 10), buffers="average", dtype=torch.bfloat16)
    train(student, optimizer)
    teacher.follow()
    other.load_state_dict(state)
    assert other.updates == 1
    other.follow()
    ours, theirs = other.state_dict()["average"], teacher.state_dict()["average"]
    assert list(ours) == list(theirs)
    assert "seen" not in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(other.model.first.weight, theirs["first.weight"].bfloat16())
    assert state["average"]["first.weight"].data_ptr() != teacher.model.first.weight.data_ptr()


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    teacher = EmaTeacher(Student(), 0.9)
    before = {name: p.clone() for name, p in teacher.model.named_parameters()}
    state = EmaTeacher(Student(), 0.9).state_dict()
    missing = {**state, "average": {k: v for k, v in state["average"].items() if k != "frozen.bias"}}
    more = {**state, "average": state["average"] | {"other": torch.zeros(1)}}
    wide = {**state, "average": state["average"] | {"frozen.bias": torch.zeros(2)}}
    for broken, message in (
        (missing, "the saved teacher has no frozen.bias"),
        (more, "the saved teacher has other, this one has not"),
        (wide, r"the saved teacher's frozen.bias is \(2,\), this one's \(1,\)"),
        (state["average"], "not the state of an EmaTeacher"),
    ):
        with pytest.raises(ValueError, match=message):
            teacher.load_state_dict(broken)
    assert all(torch.equal(p, before[name]) for name, p in teacher.model.named_parameters())


def test_weights_that_are_put_in_place_are_followed() -> None:
    student = Student()
    teacher = EmaTeacher(student, 0.0)
    student.load_state_dict({name: x + 1 for name, x in student.state_dict().items()}, assign=True)
    teacher.follow()
    assert torch.equal(teacher.model.frozen.weight, student.frozen.weight)
    another = Student()
    teacher.follow(another)
    assert torch.equal(teacher.model.frozen.weight, another.frozen.weight)
    with pytest.raises(ValueError, match=r"the teacher's first.weight is \(6, 6\), the student's is \(7, 7\)"):
        teacher.follow(Student(7))


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    if dist.is_initialized():  # by a training run in an earlier test: DeepSpeed keeps it to the end of the process
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_inside_distributed_data_parallel_and_torch_compile() -> None:
    bare = Student()
    wrapped = nn.parallel.DistributedDataParallel(bare)
    teacher = EmaTeacher(torch.compile(wrapped, backend="eager"), 0.5)  # type: ignore[arg-type]
    optimizer = sgd(bare)
    before = bare.first.weight.detach().clone()
    train(wrapped, optimizer)
    teacher.follow(wrapped)
    assert type(teacher.model) is Student
    torch.testing.assert_close(teacher.model.first.weight, 0.5 * (before + bare.first.weight.detach()))


def test_in_student_lends_the_weights_and_takes_them_back() -> None:
    student = Student()
    teacher, optimizer = EmaTeacher(student, 0.9), sgd(student)
    train(student, optimizer, 3)
    teacher.follow()
    before = copy.deepcopy(student.state_dict())
    student.eval()
    x = torch.randn(4, 6)
    wanted = teacher(x)
    with teacher.in_student() as lent:
        assert lent is student
        assert torch.equal(student(x), wanted)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    with pytest.raises(RuntimeError), teacher.in_student():
        student(torch.randn(4, 7))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


# -- without a line in the loop --------------------------------------------------------------------------------------


def test_attached_it_follows_steps_and_no_others() -> None:
    student = Student()
    optimizer, teacher = sgd(student), EmaTeacher(student, 0.9)
    handle = teacher.attach(optimizer)
    train(student, optimizer, 3)
    assert teacher.updates == 3
    handle.remove()
    train(student, optimizer)
    assert teacher.updates == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_is_none(fused: bool) -> None:
    student = Student()
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3, fused=fused)
    teacher, scaler = EmaTeacher(student, 0.9), torch.amp.GradScaler("cpu", init_scale=4.0)
    teacher.attach(optimizer)
    for broken in (False, True, False):
        loss = student(torch.randn(8, 6)).square().mean()
        scaler.scale(loss * torch.inf if broken else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert teacher.updates == 2


class AcceleratedOptimizer(torch.optim.Optimizer):
    """As Accelerate's: it holds a torch optimizer, and steps it where gradients were synchronised."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.sync_gradients = optimizer, True

    def step(self, closure: Any = None) -> None:
        if self.sync_gradients:
            self.optimizer.step(closure)

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups


def accelerated(model: nn.Module) -> nn.Module:
    """What Accelerate does to a model in mixed precision: a forward on the object that closes over the object's own."""
    model._original_forward = model.forward  # type: ignore[assignment]
    forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model.forward = forward  # type: ignore[method-assign]
    return model


def test_in_a_loop_of_accelerate() -> None:
    student = accelerated(Student())
    optimizer = AcceleratedOptimizer(sgd(student))
    teacher = EmaTeacher(student, 0.5)
    teacher.attach(optimizer)
    for synchronised in (False, True, False, True):
        optimizer.sync_gradients = synchronised
        student(torch.randn(8, 6)).float().square().mean().backward()
        optimizer.step()
    assert teacher.updates == 2
    assert not {"forward", "_original_forward"} & vars(teacher.model).keys()
    student.first.weight.data.fill_(torch.nan)
    assert teacher(torch.randn(2, 6)).isfinite().all()  # it calls its own weights, not the student's


class Callback:
    """As Lightning's: every hook is there and does nothing."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_train_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_train_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Ema(LightningEma, Callback):
    pass


class Trainer:
    """The order in which Lightning's Trainer calls a callback while it fits."""

    def __init__(self, callback: Callback) -> None:
        self.callback, self.optimizers, self.validated = callback, [], []

    def fit(self, module: nn.Module, steps: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
        callback = self.callback
        if state is not None:
            callback.load_state_dict(state)  # before on_fit_start, with most strategies
        self.optimizers = [sgd(module)]
        callback.on_fit_start(self, module)
        self.validate(module)  # the sanity check
        callback.on_train_start(self, module)
        for index in range(steps):
            train(module, self.optimizers[0])
            callback.on_train_batch_end(self, module, None, None, index)
        self.validate(module)
        saved = callback.state_dict()
        callback.on_train_end(self, module)
        return saved

    def validate(self, module: nn.Module) -> None:
        self.callback.on_validation_start(self, module)
        self.validated.append(next(module.parameters()).detach().clone())
        self.callback.on_validation_end(self, module)


def test_as_a_callback_of_lightning() -> None:
    module = nn.ModuleDict({"encoder": Student()})
    module.forward = lambda x: module["encoder"](x)  # type: ignore[method-assign]
    callback = Ema(0.9, of="encoder", buffers="average")
    trainer = Trainer(callback)
    saved = trainer.fit(module, 3)
    assert callback.teacher is not None
    assert callback.teacher.updates == saved["updates"] == 3
    assert type(callback.teacher.model) is Student
    assert torch.equal(trainer.validated[1], callback.teacher.model.first.weight)
    assert not torch.equal(trainer.validated[1], module["encoder"].first.weight)
    resumed = Ema(0.9, of="encoder", buffers="average")
    Trainer(resumed).fit(module, 2, state=saved)
    assert resumed.teacher is not None
    assert resumed.teacher.updates == 5
    callback.load_state_dict(saved)  # with strategies that restore after the fit has begun
    assert callback.teacher.updates == 3
    train(module, trainer.optimizers[0])
    assert callback.teacher.updates == 3  # after on_train_end it follows nothing


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line() -> None:
    class DeepSpeedEngine(nn.Module):
        pass

    sharded, patched = Student(), Student()
    sharded.frozen.bias.ds_id = 3  # type: ignore[attr-defined]
    patched.frozen.forward = lambda x: x  # type: ignore[method-assign]
    held = Student()
    held.activation = held.first(torch.randn(1, 6))  # no leaf, which deepcopy refuses
    for student, options, message in (
        (DeepSpeedEngine(), {}, "crossmask.engine.teacher.Teacher follows its masters"),
        (sharded, {}, "the student's frozen.bias is sharded"),
        (Student().double(), {}, "the student's first.weight is torch.float64"),
        (Student().to("meta"), {}, "on meta and has no values"),
        (patched, {}, "frozen has been given a forward of its own.*give model="),
        (held, {}, "the student cannot be copied .*give model="),
        ("student", {}, "the student is a str, not a torch.nn.Module"),
        (Student(), {"buffers": "none"}, "buffers 'none' is neither"),
        (Student(), {"dtype": torch.int8}, "dtype torch.int8 is none of"),
        (Student(), {"decay": 1.0}, "decay 1.0 is not a number in"),
        (Student(), {"model": Student(7)}, r"the teacher's first.weight is \(7, 7\), the student's is \(6, 6\)"),
        (nn.ReLU(), {}, "the teacher has no parameters"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            EmaTeacher(student, **({"decay": 0.9} | options))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="object is no torch optimizer: call follow"):
        EmaTeacher(Student(), 0.9).attach(object())
    student = Student()
    with pytest.raises(ValueError, match="student's own parameter"):
        EmaTeacher(student, 0.9, model=student)
    assert student.training
    assert student.first.weight.requires_grad


def test_nothing_heavy_is_imported() -> None:
    heavy = ["deepspeed", "transformers", "timm", "torchvision", "matplotlib", "PIL", "triton", "lightning"]
    own = "crossmask.engine.teacher, crossmask.engine.masking, crossmask.kernels.modules"
    code = f"import sys, {own}; print([name for name in {heavy} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
