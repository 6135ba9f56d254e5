"""Under DistributedDataParallel the added lines leave every rank with the mean gradient: small models of each host's
interface, in two gloo processes that serve all of them."""

import pytest
import test_host_acr_wsss
import test_host_afa
import test_host_toco
import test_host_transcam
from host_checks import check_mean_of_ranks, gradients_of_two_ranks

FAMILIES = {
    "toco": test_host_toco.small_gradients,
    "afa": test_host_afa.small_gradients,
    "acr_wsss": test_host_acr_wsss.small_gradients,
    "transcam": test_host_transcam.small_gradients,
}


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
