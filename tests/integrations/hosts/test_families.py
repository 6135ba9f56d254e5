"""What the small models of all hosts' interfaces show alike: equal gradients on two ranks, and the floor of noise."""

import pytest
import torch

import acr_reg
from acr_reg.integrations import acr_wsss, afa, toco, transcam
from tests.integrations.hosts import test_acr_wsss as test_host_acr_wsss
from tests.integrations.hosts import test_afa as test_host_afa
from tests.integrations.hosts import test_toco as test_host_toco
from tests.integrations.hosts import test_transcam as test_host_transcam
from tests.support.hosts import check_mean_of_ranks, gradients_of_two_ranks

FAMILIES = {
    "toco": test_host_toco.small_gradients,
    "afa": test_host_afa.small_gradients,
    "acr_wsss": test_host_acr_wsss.small_gradients,
    "transcam": test_host_transcam.small_gradients,
}

MODELS = {
    "toco": (toco, test_host_toco.Network, lambda model, images: model(images)),
    "afa": (afa, test_host_afa.Network, lambda model, images: model(images)),
    "acr_wsss": (acr_wsss, test_host_acr_wsss.Small, lambda model, images: model.forward_cls(images)),
    "transcam": (transcam, test_host_transcam.Small, lambda model, images: model("convcam", images)),
}


@pytest.mark.parametrize("family", MODELS)
def test_two_passes_on_the_same_images_differ_by_dropped_paths_alone(family):
    host_file, build, forward = MODELS[family]
    torch.manual_seed(0)
    model = build()
    model.forward = getattr(model, "forward_cls", model.forward)
    images = torch.randn(2, 3, 64, 64)
    acr = acr_reg.AllPairsConsistencyLoss(acr_reg.Identity(), activation_weight=0 if family == "afa" else None)
    floors = {}
    for training in (True, False):
        model.train(training)
        with host_file.capture(model) as host:
            found = []
            for _ in range(8):  # a path is dropped one time in ten
                forward(model, images)
                first, second = host.take(), host_file.second_view(host, images)
                maps = host_file.cams(first), host_file.cams(second)
                loss = acr(first.attention, second.attention, *maps)
                found.append(loss.item())
        floors[training] = sum(found)
    assert floors[True] > 1e-3
    assert floors[False] == 0


@pytest.fixture(scope="module")
def found():
    calls = [(gradients,) for gradients in FAMILIES.values()]
    return dict(zip(FAMILIES, gradients_of_two_ranks(*calls), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_have_the_mean_gradient(found, family):
    check_mean_of_ranks(found[family])


def test_the_check_tells_ranks_that_are_not_synchronised(found):
    (_, alone), (_, other_alone) = found["toco"]
    with pytest.raises(AssertionError, match="differs between ranks"):
        check_mean_of_ranks([[alone, alone], [other_alone, other_alone]])
