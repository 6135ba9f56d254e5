"""The comparison on the synthetic scenes."""

import torch

from acr_reg.demo.scene_task import QUICK, SceneTask


def test_conditions_start_from_one_checkpoint_and_see_the_same_batches() -> None:
    task = SceneTask(0, QUICK)
    first, second = task.fork(), task.fork()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    losses = [task.train(model, None, lambda: None).history[0]["classification"] for model in (first, second)]
    assert losses[0] == losses[1]
    assert not torch.equal(first.class_tokens.head.weight, task.fork().class_tokens.head.weight)
