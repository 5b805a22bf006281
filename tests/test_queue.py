"""The momentum queue against a plain list, and the gathers in a world of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dispatched import NoWaiting
from safetensors.torch import load_file, save_file

from crossmask.engine.teacher import FeatureQueue, all_gather_with_grad, gather_features


def rows(start: int, count: int, width: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    numbers = torch.arange(start, start + count)
    features = numbers[:, None].float().expand(count, width).contiguous()
    return features, -features, numbers


@pytest.mark.parametrize("batches", [[4, 4, 4], [10], [11], [23, 1], [3, 10, 9], [1] * 12, [25, 25], [7, 0, 7]])
def test_holds_the_latest_rows_whatever_the_batch_size(batches: list[int]) -> None:
    queue, written = FeatureQueue(10, 3), 0
    for count in batches:
        queue.enqueue(*rows(written, count))
        written += count
        kept = list(range(max(0, written - 10), written))
        assert sorted(queue.group_id.tolist()) == kept
        assert len(queue) == len(kept)
        assert queue.pointer == written % 10
        assert torch.equal(queue.image, queue.group_id[:, None].float().expand(-1, 3))
        assert torch.equal(queue.text, -queue.image)
    # row by row gives the very same ring
    single = FeatureQueue(10, 3)
    for number in range(written):
        single.enqueue(*rows(number, 1))
    assert torch.equal(single.group_id, queue.group_id)


def test_can_start_full_of_random_directions_that_are_nobodys_match() -> None:
    """As in ALBEF: ready at once, written over oldest first, the same for a seed, whatever was drawn before."""
    queue = FeatureQueue(10, 3, random_seed=4)
    torch.rand(7)
    again, other = FeatureQueue(10, 3, random_seed=4), FeatureQueue(10, 3, random_seed=5)
    assert len(queue) == 10
    assert (queue.group_id == -1).all()
    for features, same, different in ((queue.image, again.image, other.image), (queue.text, again.text, other.text)):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(10))
        assert torch.equal(features, same)
        assert not torch.equal(features, different)
    assert not torch.equal(queue.image, queue.text)
    queue.enqueue(*rows(0, 4))
    assert queue.group_id.tolist() == [0, 1, 2, 3] + [-1] * 6
    assert torch.equal(queue.image[4:], again.image[4:])
    queue.load_state_dict(FeatureQueue(10, 3).state_dict())
    assert len(queue) == 0


def test_writing_never_waits_for_the_device() -> None:
    queue = FeatureQueue(10, 3)
    given = [rows(0, count) for count in (4, 4, 4, 13)]
    with NoWaiting():
        for one in given:
            queue.enqueue(*one)
            assert queue.image.shape == (len(queue), 3)


def test_starts_empty_and_length_zero_stays_empty() -> None:
    assert FeatureQueue(8, 3).image.shape == (0, 3)
    none = FeatureQueue(0, 3)
    none.enqueue(*rows(0, 5))
    assert (len(none), none.image.shape, none.group_id.shape) == (0, (0, 3), (0,))
    none.load_state_dict(none.state_dict())


def test_views_are_not_copies_and_autograd_notices_a_write_before_backward() -> None:
    queue = FeatureQueue(4, 3)
    queue.enqueue(*rows(0, 4))
    assert queue.image.data_ptr() == queue._image.data_ptr()
    feature = torch.ones(1, 3, requires_grad=True)
    loss = (feature @ queue.image.T).sum()
    queue.enqueue(*rows(9, 1))
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_takes_no_gradient() -> None:
    queue = FeatureQueue(4, 3)
    image, text, groups = rows(0, 2)
    queue.enqueue(image.requires_grad_(), text, groups)
    assert not queue.image.requires_grad


@pytest.mark.parametrize("written", [0, 3, 10, 14])
def test_state_round_trip(written: int) -> None:
    queue, other = FeatureQueue(10, 3), FeatureQueue(10, 3)
    queue.enqueue(*rows(0, written))
    other.enqueue(*rows(50, 7))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.enqueue(*rows(100, 4))
    assert torch.equal(queue.image, other.image)
    assert torch.equal(queue.text, other.text)
    assert torch.equal(queue.group_id, other.group_id)
    assert queue.pointer == other.pointer


def test_a_queue_of_an_earlier_checkpoint_is_read(tmp_path: Path) -> None:
    """The filled rows and (length, pointer), through a file, as every version has written them."""
    numbers = torch.tensor([10, 11, 12, 13, 4, 5, 6, 7, 8, 9])
    feature = numbers[:, None].float().expand(10, 3).contiguous()
    state = {"image": feature, "text": -feature, "group_id": numbers, "position": torch.tensor([10, 4])}
    save_file(state, tmp_path / "queue.safetensors")
    queue = FeatureQueue(10, 3)
    queue.load_state_dict(load_file(tmp_path / "queue.safetensors"))
    queue.enqueue(*rows(14, 3))
    assert queue.group_id.tolist() == [10, 11, 12, 13, 14, 15, 16, 7, 8, 9]
    written = FeatureQueue(10, 3)
    written.enqueue(*rows(0, 14))
    assert written.state_dict().keys() == state.keys()
    for name, value in written.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_refuses_what_does_not_fit() -> None:
    queue = FeatureQueue(4, 3)
    with pytest.raises(ValueError, match="do not match"):
        queue.enqueue(torch.ones(2, 5), torch.ones(2, 5), torch.arange(2))
    with pytest.raises(ValueError, match="do not match"):
        queue.enqueue(torch.ones(2, 3), torch.ones(1, 3), torch.arange(2))
    with pytest.raises(ValueError, match="the saved queue is 5 x 3, this one is 4 x 3"):
        queue.load_state_dict(FeatureQueue(5, 3).state_dict())
    state = FeatureQueue(4, 3).state_dict()
    with pytest.raises(ValueError, match="has 0 of 4 rows and goes on at row 9"):
        FeatureQueue(4, 3).load_state_dict(state | {"position": torch.tensor([4, 9])})
    with pytest.raises(ValueError, match="the saved queue is 4 x 3, this one is 4 x 2"):
        FeatureQueue(4, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="cannot be built"):
        FeatureQueue(-1, 3)


def test_gathers_without_a_process_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert torch.equal(gather_features(x), x)
    assert not gather_features(x).requires_grad
    all_gather_with_grad(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 2))
