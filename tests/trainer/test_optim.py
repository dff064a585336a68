import pytest
import torch
from torch import nn

from trainer.config import OptimSection
from trainer.optim import lr_factor, make_optimizer, set_lr


def parameters():
    return {
        "lora_A.weight": nn.Parameter(torch.zeros(2, 3)),
        "lora_B.weight": nn.Parameter(torch.zeros(3, 2)),
        "gain": nn.Parameter(torch.zeros(3)),
        "frozen": nn.Parameter(torch.zeros(3, 3), requires_grad=False),
    }


def group_of(optimizer, parameter):
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def test_weight_decay_spares_tensors_of_fewer_than_two_dimensions():
    named = parameters()

    optimizer = make_optimizer(named.items(), OptimSection(weight_decay=0.1), global_batch=16)

    assert group_of(optimizer, named["lora_A.weight"])["weight_decay"] == 0.1
    assert group_of(optimizer, named["gain"])["weight_decay"] == 0.0
    assert all(p is not named["frozen"] for g in optimizer.param_groups for p in g["params"])


@pytest.mark.parametrize(("batch", "lr"), [(16, 1e-4), (64, 4e-4), (8, 5e-5)])
def test_the_learning_rate_scales_with_the_batch(batch, lr):
    optimizer = make_optimizer(parameters().items(), OptimSection(lr=1e-4), global_batch=batch)

    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr, lr])


def test_lora_plus_gives_lora_b_a_higher_rate():
    named = parameters()

    optimizer = make_optimizer(named.items(), OptimSection(lora_plus_ratio=4), global_batch=16)

    rates = [group_of(optimizer, named[f"lora_{x}.weight"])["lr"] for x in "AB"]
    assert rates[1] == pytest.approx(4 * rates[0])


def test_adam_settings_arrive():
    section = OptimSection(betas=(0.8, 0.9), eps=1e-3)

    group = make_optimizer(parameters().items(), section, global_batch=16).param_groups[0]

    assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-3)


def test_the_constant_schedule_is_constant():
    assert {lr_factor(step, 10, OptimSection()) for step in range(10)} == {1.0}


def test_warm_up_rises_to_the_full_rate():
    section = OptimSection(warmup=0.4)

    assert [lr_factor(step, 10, section) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_cosine_falls_to_the_final_rate():
    section = OptimSection(schedule="cosine", warmup=0.2, final_lr=0.1)

    factors = [lr_factor(step, 1000, section) for step in range(200, 1000)]

    assert factors[0] == pytest.approx(1.0)
    assert factors == sorted(factors, reverse=True)
    assert factors[400] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=1e-4)


def test_setting_the_rate_keeps_the_ratio_of_the_groups():
    section = OptimSection(lora_plus_ratio=4)
    optimizer = make_optimizer(parameters().items(), section, global_batch=16)

    set_lr(optimizer, 0.5)
    set_lr(optimizer, 0.5)

    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([5e-5, 2e-4])
