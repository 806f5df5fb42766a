import pytest

from mainstem.bench.experiment import Arm, Choices, Experiment, Range, load_yaml, parse_arm, portable
from mainstem.errors import ConfigurationError
from mainstem.recipe import Recipe


def make(**changes):
    return Experiment.parse({"arms": ["resnet-20", "plain-20"], "data": "digits", **changes})


def test_an_arm_in_text_sorts_its_keys_between_network_and_recipe():
    arm = parse_arm("resnet-20+connection=rezero+norm=none+lr=0.05+weight_decay=1e-4")
    assert arm.network == "resnet-20"
    assert arm.overrides == {"connection": "rezero", "norm": "none"}
    assert arm.recipe == {"lr": 0.05, "weight_decay": 1e-4}
    assert arm.name == "resnet-20+connection=rezero+norm=none+lr=0.05+weight_decay=1e-4"
    assert arm.description == "resnet-20, connection=rezero, norm=none, lr=0.05, weight_decay=0.0001"


def test_an_arms_values_may_hold_plus_parentheses_and_commas():
    arm = parse_arm("mlp-4x8+connection=stochastic-depth(rezero+a=1, final=0.8)+name=a+b+norm=x+y")
    assert arm.overrides == {"connection": "stochastic-depth(rezero+a=1, final=0.8)", "norm": "x+y"}
    assert arm.name == "a+b"


@pytest.mark.parametrize(
    "text, message",
    [
        ("resnet-20+rezero", "'rezero' is not of the form key=value"),
        ("+lr=1", "not of the form"),
        ("resnet-20+lr=1+lr=2", "lr is given twice"),
        ("resnet-20+norm={a", "norm, line 1: not YAML"),
    ],
)
def test_an_arm_that_cannot_be_read(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_arm(text)


def test_numbers_without_a_point_are_numbers():
    assert load_yaml("{a: 1e-3, b: 5E+2, c: -.5, d: 12, e: e3, f: 1.5e3}", "") == {
        "a": 1e-3, "b": 5e2, "c": -0.5, "d": 12, "e": "e3", "f": 1.5e3,
    }  # fmt: skip


def test_the_search_space_is_the_learning_rate_around_its_default():
    experiment = make(arms=["resnet-20", "plain-20+lr=0.02"], recipe={"lr": 0.5})
    first, second = experiment.arms
    assert experiment.space_of(first) == {"lr": Range(low=0.05, high=5, log=True)}
    assert experiment.space_of(second) == {"lr": Range(low=0.002, high=0.2, log=True)}
    assert experiment.default(second) == {"lr": 0.02}


def test_an_arms_space_and_recipe_replace_the_experiments():
    experiment = make(
        arms={"a": {"network": "resnet-20", "space": {"clip": [1.0, 2.0]}, "recipe": {"clip": 2.0}}, "b": "plain-20"},
        space={"lr": {"low": 0.01, "high": 1}},
    )
    a, b = experiment.arms
    assert experiment.space_of(a) == {"lr": Range(low=0.01, high=1), "clip": Choices(choices=(1.0, 2.0))}
    assert experiment.default(a) == {"lr": 0.1, "clip": 2.0}
    assert experiment.space_of(b) == {"lr": Range(low=0.01, high=1)}
    assert experiment.recipe_of(a, {"lr": 0.3, "norm": "x"}, 5).lr == 0.3
    assert experiment.recipe_of(a, {}, 5).seed == 5


def test_final_seeds_are_fresh():
    experiment = make(seeds=3, seed=10)
    assert experiment.final_seeds == (10, 11, 12)
    assert experiment.tuning_seed not in experiment.final_seeds
    chosen = make(seeds=[7, 1_000_003])
    assert chosen.final_seeds == (7, 1_000_003)
    assert chosen.tuning_seed == 1_000_004


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seads": 3}, "seads: unknown field; did you mean seed"),
        ({"seeds": "many"}, "seeds"),
        ({"seeds": 0}, "seeds: 0 is not a positive number"),
        ({"seeds": [1, 1]}, "distinct"),
        ({"tune": -1}, r"tune: .*greater than or equal to 0 \(given: -1\)"),
        ({"budget": "steps=-3"}, "steps"),
        ({"budget": {"steps": "x"}}, "steps"),
        ({"budget": {"stepz": 3}}, "stepz: unknown field; did you mean steps"),
        ({"baseline": "resnet-2"}, "baseline: unknown 'resnet-2'; did you mean 'resnet-20'"),
        ({"arms": ["a", "a"]}, "more than one is called 'a'"),
        ({"arms": []}, "arms"),
        ({"arms": "resnet-20"}, "arms"),
        ({"arms": [3]}, "3 is not an arm"),
        ({"arms": [{"network": "a", "overides": {}}]}, "overides: unknown field; did you mean overrides"),
        ({"arms": [{"network": 3, "name": "a"}]}, "network: give a network's name"),
        ({"arms": ["a+lr=fast"]}, "arm a[+]lr=fast: lr"),
        ({"arms": ["a+lr=-1"]}, "lr: .*greater than 0"),
        ({"arms": ["a+seed=3"]}, "seed is the same for every arm"),
        ({"recipe": {"precision": "bf16"}}, "precision is the same for every arm"),
        ({"recipe": {"lrr": 1}}, "lrr: unknown field; did you mean lr"),
        ({"space": {"lr": {"low": 1}}}, "space.lr: high"),
        ({"space": {"lr": {"low": 1, "high": 0.1}}}, "low must lie below high"),
        ({"space": {"lr": {"low": 0, "high": 1, "log": True}}}, "log range needs a low above 0"),
        ({"space": {"lr": {"low": -1, "high": 1}}}, "space.lr: recipe: lr"),
        ({"space": {"lr": {"low": 1, "high": 2}}}, "trial 0 is the arm's own value 0.1, which is outside"),
        ({"space": {"drop": {"low": 0, "high": 1}}}, "say where its search starts, with [+]drop=VALUE"),
        ({"precision": "fp8"}, "precision"),
        ({"data": ([[1.0]], [1]), "target": "y"}, "need data that is given by name"),
        ({"data": ([[1.0]], [1]), "data_seeds": "redrawn"}, "redrawn needs data that is given by name, or a function"),
    ],
)
def test_a_wrong_experiment_says_what_is_wrong(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        make(**changes)


def test_an_experiment_file(tmp_path):
    path = tmp_path / "experiment.yaml"
    path.write_text(
        "data: digits:300\nbudget: epochs=2\nseeds: [3, 4]\n"
        "arms:\n  - resnet-20+norm=none\n  - {name: slow, network: resnet-20, recipe: {lr: 1e-2}}\nbaseline: slow\n"
    )
    experiment = Experiment.from_yaml(path, tune=2)
    assert [arm.name for arm in experiment.arms] == ["resnet-20+norm=none", "slow"]
    assert experiment.recipe_of(experiment.arms[1]).lr == 0.01
    assert (experiment.tune, experiment.budget.epochs) == (2, 2)
    again = Experiment.parse({**experiment.to_json(), "data": "digits:300"})
    assert again == experiment


@pytest.mark.parametrize(
    "text, message",
    [("arms: [", "line 1: not YAML"), ("- a\n- b\n", "a mapping with arms and data is needed"), ("data: x", "arms")],
)
def test_a_wrong_experiment_file_is_named(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=f"experiment {path}.*{message}"):
        Experiment.from_yaml(path)


def test_a_missing_experiment_file():
    with pytest.raises(ConfigurationError, match="No such file"):
        Experiment.from_yaml("/nowhere/x.yaml")


def test_functions_are_described_by_source_and_values():
    def scaled(k):
        return lambda: k

    one, two = scaled(1), scaled(2)
    assert portable(one) == portable(scaled(1)) != portable(two)
    arm = Arm.of(one, "mine")
    assert arm.name == "mine" and "scaled" in arm.description
    assert portable(arm)["network"] == portable(one)


def test_a_recipe_covers_what_the_experiment_shares():
    recipe = make(precision="bf16", threads=2, budget="steps=9").recipe_of(make().arms[0])
    assert isinstance(recipe, Recipe)
    shared = make(precision="bf16", threads=2, budget="steps=9")
    assert shared.recipe_of(shared.arms[0]).budget.steps == 9
    assert shared.recipe_of(shared.arms[0]).precision == "bf16"
