"""Wrong labels in the training split, and nowhere else."""

import pytest
import torch

from mainstem.data import load
from mainstem.errors import ConfigurationError


def test_a_share_of_the_training_labels_is_another_class():
    clean, noisy = load("digits:500", seed=3), load("digits:500", seed=3, label_noise=0.2)
    assert int((clean.train.y != noisy.train.y).sum()) == 100
    assert torch.equal(clean.train.x, noisy.train.x)
    assert torch.equal(clean.val.y, noisy.val.y) and torch.equal(clean.test.y, noisy.test.y)
    assert clean.sha256 != noisy.sha256 == load("digits:500", seed=3, label_noise=0.2).sha256
    assert torch.equal(clean.train.y, load("digits:500", seed=3).train.y)  # the cached one is untouched


@pytest.mark.parametrize(
    "name, share, text", [("digits", 1.0, "not a share"), ("diabetes", 0.1, "one class an example")]
)
def test_noise_that_cannot_be_is_refused(name, share, text):
    with pytest.raises(ConfigurationError, match=text):
        load(name, label_noise=share)
