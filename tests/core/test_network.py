"""Named networks: names, sizes from data, and folders that rebuild them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mainstem import Layer, Network, Stream, load, network, network_for, networks
from mainstem.connections import ReZero
from mainstem.errors import ConfigurationError, DamagedFileError
from mainstem.network import CONFIG, WEIGHTS, papers_of
from mainstem.stream import Connection


def test_networks_are_listed():
    assert {"resnet-<depth>", "preact-resnet-<depth>", "wrn-<depth>-<k>", "mlp-<layers>x<width>"} <= set(networks())


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnte-20", "network: unknown 'resnte-20'; did you mean .*'resnet-<depth>'"),
        ("wrn-28", "network: unknown 'wrn-28'; did you mean 'wrn-<depth>-<k>'"),
        ("mlp-4-64", "network: unknown 'mlp-4-64'; did you mean 'mlp-<layers>x<width>'"),
        ("resnet", "network: unknown 'resnet'; did you mean .*'resnet-<depth>'"),
        ("resnet-21", "network resnet-21: depth 21 is not 6n.2; nearest: 20 or 26"),
        ("resnet-2", "network resnet-2: depth 2 is not 6n.2; nearest: 8"),
        ("wrn-12-2", "network wrn-12-2: depth 12 is not 6n.4; nearest: 10 or 16"),
    ],
)
def test_wrong_names_get_the_nearest(name, message):
    with pytest.raises(ConfigurationError, match=message):
        network(name, classes=3, in_channels=1)


def test_options_that_are_not_the_familys_are_refused():
    with pytest.raises(ConfigurationError, match="network mlp-2x8: unknown 'shortcuts'.*valid: .*placement"):
        network("mlp-2x8", classes=2, in_channels=3, shortcuts="A")
    with pytest.raises(ConfigurationError, match="network wrn-10-1: unknown 'drop'; did you mean 'dropout'"):
        network("wrn-10-1", classes=2, drop=0.3)


def test_parts_may_be_given_as_factories():
    class Half(Connection):
        def write(self, x, y):
            return x + 0.5 * y

    for given in (Half, lambda width, **place: Half(width, **place)):
        model = network("mlp-2x8", classes=2, in_channels=3, connection=given, norm=lambda width, dim: nn.Identity())
        assert all(isinstance(layer.connection, Half) for layer in model.stream)
        assert [layer.connection.index for layer in model.stream] == [0, 1]


# Sizes from data


def test_sizes_come_from_the_data(tiny):
    images, vectors = tiny.images(n=6, classes=3), tiny.vectors(n=6, width=4)
    assert network_for("resnet-8", images).config == {"name": "resnet-8", "classes": 3, "in_channels": 1}
    assert network_for("mlp-2x8", vectors).config["in_channels"] == 4
    assert network_for("mlp-2x8", images)(images.train.x).shape == (6, 3)  # images are flattened
    assert network_for("mlp-2x8", tiny.numbers(n=6)).config["classes"] == 2
    assert network_for("resnet-8", images, classes=5, seed=0).config["classes"] == 5


@pytest.mark.parametrize(
    "name, kind, options, message",
    [
        ("resnet-8", "images", {"classes": 2}, "classes: images has 3 classes, more than the network's 2"),
        ("resnet-8", "vectors", {}, "network: resnet-8 takes images; vectors holds vector data"),
        ("mlp-2x8", "tokens", {}, "network: mlp-2x8 takes numbers; tokens holds tokens"),
    ],
)
def test_data_that_do_not_fit_are_refused(tiny, name, kind, options, message):
    with pytest.raises(ConfigurationError, match=message):
        network_for(name, getattr(tiny, kind)(n=6), **options)


def test_images_as_targets_are_refused(tiny):
    data = tiny.images(n=6)
    data.task, data.train.y = "regression", data.train.x
    with pytest.raises(ConfigurationError, match="network: mlp-2x8 gives one row of outputs an example; images asks"):
        network_for("mlp-2x8", data)


# Folders


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet-14", {"connection": "stochastic-depth(rezero(alpha=0.3), final=0.8)", "norm": "group(groups=4)"}),
        ("resnet-8", {"shortcuts": "B", "zero_init": True, "activation": "leaky-relu(slope=0.2)"}),
        ("resnet-20", {"block": "bottleneck", "stride_on": "1x1"}),
        ("preact-resnet-8", {"order": "relu-only", "checkpoint": True}),
        ("wrn-10-2", {"dropout": 0.25}),
        ("mlp-3x8", {"placement": "post", "norm": "rms"}),
    ],
)
def test_a_folder_rebuilds_a_network_exactly(randomise, tmp_path, name, options):
    model = randomise(network(name, classes=3, in_channels=2, **options)).eval()
    model.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == model.config and repr(loaded) == repr(model)
    assert loaded.stream.checkpoint == model.stream.checkpoint
    x = torch.randn(2, 2, 8, 8) if model.inputs == "image" else torch.randn(2, 2)
    assert torch.equal(loaded(x), model(x))
    assert papers_of(loaded) == papers_of(model)


def test_tied_parameters_are_saved_once_and_stay_tied(tmp_path):
    model = network("mlp-2x8", classes=2, in_channels=3, connection="rezero(alpha=0.5)").eval()
    model.stream[1].connection.tie(model.stream[0].connection)
    model.save(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded(torch.ones(1, 3)), model(torch.ones(1, 3)))
    assert loaded.stream[1].connection.alpha is loaded.stream[0].connection.alpha


def test_saving_again_replaces(tmp_path, randomise):
    model = network("mlp-2x8", classes=2, in_channels=3)
    model.save(tmp_path)
    randomise(model).eval().save(tmp_path)
    assert torch.equal(load(tmp_path)(torch.ones(1, 3)), model(torch.ones(1, 3)))
    assert len(list(tmp_path.iterdir())) == 2


def test_papers_of_the_parts(tmp_path):
    model = network("wrn-10-1", classes=2, connection="stochastic-depth(rezero)")
    assert papers_of(model) == ["wrn", "stochastic-depth", "rezero"]
    model.save(tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["papers"] == ["wrn", "stochastic-depth", "rezero"]


def test_parts_without_a_name_are_not_saved(tmp_path):
    model = network("mlp-2x8", classes=2, in_channels=3, connection=ReZero)
    with pytest.raises(ConfigurationError, match="connection: .*ReZero.* has no name to be saved under; declare it"):
        model.save(tmp_path)
    reconnected = network("mlp-2x8", classes=2, in_channels=3)
    reconnected.stream.reconnect(ReZero)
    with pytest.raises(ConfigurationError, match="connection: .*ReZero.* has no name to be saved under"):
        reconnected.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_was_put_together_by_hand_is_not_saved(tmp_path):
    stream = Stream([Layer(nn.Linear(4, 4), Connection(4))])
    model = Network(nn.Identity(), stream, nn.Identity())
    assert torch.equal(model(torch.ones(1, 4)), stream(torch.ones(1, 4)))
    with pytest.raises(ConfigurationError, match="network: it was not built by name"):
        model.save(tmp_path)


@pytest.fixture
def saved(tmp_path):
    network("mlp-2x8", classes=2, in_channels=3).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_damaged_weights_are_named(saved, keep):
    path = saved / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedFileError, match=f"{path} is damaged or is not of this network"):
        load(saved)


def test_weights_of_another_network_are_named(saved, tmp_path_factory):
    other = network("mlp-3x8", classes=2, in_channels=3).save(tmp_path_factory.mktemp("other"))
    (saved / WEIGHTS).write_bytes((other / WEIGHTS).read_bytes())
    with pytest.raises(DamagedFileError, match=f"{saved / WEIGHTS} is damaged or is not of this network"):
        load(saved)


@pytest.mark.parametrize(
    "text", ["", '{"network": {"name"', "[]", "3", '{"network": 3}', '{"network": {"classes": 2}}', '{"network": null}']
)
def test_a_damaged_config_is_named(saved, text):
    (saved / CONFIG).write_text(text)
    with pytest.raises(DamagedFileError, match=str(saved / CONFIG)):
        load(saved)


def test_a_config_of_an_unknown_network_names_the_nearest(saved):
    (saved / CONFIG).write_text('{"network": {"name": "mpl-2x8", "classes": 2}}')
    with pytest.raises(ConfigurationError, match="network: unknown 'mpl-2x8'; did you mean 'mlp-<layers>x<width>'"):
        load(saved)


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(saved, file):
    (saved / file).unlink()
    with pytest.raises(ConfigurationError, match=f"no such file: {saved / file}"):
        load(saved)
