"""Short runs for tests of training."""

from __future__ import annotations

from mainstem import Recipe, fit, network_for

QUIET = {"layout": "contiguous", "precision": "fp32", "threads": 1}


def train(data, *methods, name="mlp-2x16", folder=None, network=None, **changes):
    recipe = Recipe.parse({"budget": "steps=12", "batch_size": 16, **QUIET, "methods": methods, **changes})
    model = network_for(name, data, seed=0) if network is None else network
    return fit(model, data, recipe, folder=folder, progress=False)


class Sees:
    """A method that calls `look(run)` after each step."""

    def __init__(self, look):
        self.look = look

    def step(self, run):
        self.look(run)
