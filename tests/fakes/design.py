"""What the fake claims share."""

from mainstem.claims import Check, Claim, Contrast, Effect


def exact():
    yield Check.equal("one and one is two", 1 + 1, 2)


def fake(gain, scrambled, exact=exact):
    """A claim whose effect is `gain`, and that of its control `scrambled`, with a little spread over seeds."""

    def measure(lab):
        noise = [0.01 * (-1) ** seed for seed in lab.seeds]
        return {"gain": [gain + each for each in noise], "scrambled": [scrambled + each for each in noise]}

    contrasts = (Contrast("gain", 0.5, unit="points"), Contrast("scrambled", 0.5, role="control", unit="points"))
    effect = Effect(
        expected="The gain lies above 0.5.", contrasts=contrasts, measure=measure, seconds=1, seeds=range(4)
    )
    return Claim(exact=exact, effect=effect)
