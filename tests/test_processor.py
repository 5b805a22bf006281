"""Processors of one name and two generations are told apart."""

from __future__ import annotations

from crossmask.engine import processor
from crossmask.engine.evaluation import describe_machine

X86 = "processor\t: {}\nvendor_id\t: X\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n\n"


def test_family_and_model_stand_behind_the_name() -> None:
    assert processor.named_in(X86.format(0) + X86.format(1).replace("17", "2")) == "AMD EPYC, family 25 model 17"


def test_a_machine_that_tells_less() -> None:
    assert processor.named_in("processor : 0\nBogoMIPS : 50\n") == ""
    assert processor.named_in("model name : POWER9\n") == "POWER9"
    assert processor.named_in("") == ""


def test_arms_have_no_name_and_a_part() -> None:
    told = "processor : 0\nCPU implementer : 0x41\nCPU variant : 0x0\nCPU part : 0xd4f\n\nprocessor : 1\n"
    assert processor.named_in(told) == "ARM, implementer 0x41 part 0xd4f variant 0x0"


def test_this_one_has_a_name() -> None:
    assert processor.processor_name()
    assert describe_machine()["processor"] == processor.processor_name()
