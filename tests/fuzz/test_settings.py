"""Settings and config files that nobody should write: used, or refused in one line by name."""

import random

import pytest

from arcond_jax import build
from arcond_jax import config as config_lib

VALUES = (
    *("-1", "0", "1", "2", "3", "7", "64", "100000", "10**9", "1_0", "0x1f", "9" * 400),
    *("-0.5", "0.5", "1.5", "1e-9", "1e30", "1e400", "nan", "True", "False"),
    *("None", "''", "'None'", "x", "é", "a=b", "[]", "[1]", "{}", "()", "(1,2)", "(" * 300),
    *("lambda: 0", "__import__('os').abort()"),
)
CONFIGS = ("digits:joint", "digits:mar", "digits:tensorar", "rar_b", "magvit2_b", "llamagen_b_256")
LINES = (
    "config.seed = -1",
    "config.model.depth = 'deep'",
    "config.model = 3",
    "del config.transport.kind",
    "del config.training",
    "config.data.update(image_size=7)",
    "config = None",
    "config.lock()",
    "config.model.name = 'none'",
    "config.tokenizer.name = ['pixels']",
    "raise KeyError('x')",
    "raise SystemExit(3)",
    "return 5",
    "return",
    "config[3] = 4",
    "config.new = {'a': 1}",
    "config.training.learning_rate = float('nan')",
    "import no_such_module",
    "1 / 0",
    "config.mesh.data = 2.0",
    ")",
)


def refusal(load):
    """The message it is refused with, None where it is used; any other error fails the test."""
    try:
        load()
    except build.ConfigError as error:
        return str(error)
    return None


def one_line_each(messages):
    return all("\n" not in message and len(message) > 10 for message in messages)


@pytest.mark.parametrize("count", [150, pytest.param(6_000, marks=pytest.mark.slow)])
def test_overrides(count):
    rng, messages = random.Random(0), []
    configs = [build.load_config(name) for name in CONFIGS]
    keys = [key for config in configs for key in config_lib.flat(config)]
    for _ in range(count):
        names = rng.sample(keys, rng.choice((1, 1, 1, 2, 3)))
        names = [name[: rng.randrange(len(name))] if rng.random() < 0.1 else name for name in names]
        texts = [f"{name}={rng.choice(VALUES)}" for name in names]
        config = rng.choice(configs)
        messages.append(refusal(lambda c=config, t=texts: build.with_overrides(c, t)))
    messages = [message for message in messages if message is not None]
    assert count / 2 < len(messages) < count and one_line_each(messages)


@pytest.mark.parametrize("count", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_config_files(count, tmp_path):
    rng, messages = random.Random(0), []
    path = tmp_path / "mine.py"
    for _ in range(count):
        body = ["from arcond_jax.configs import digits", "def get_config(variant='joint'):"]
        body.append("    config = digits.get_config(variant)")
        body += [f"    {line}" for line in rng.sample(LINES, rng.choice((0, 1, 2)))]
        body += ["    return config"] * (rng.random() < 0.9)
        text = "\n".join(body)
        if rng.random() < 0.3:
            at = rng.randrange(len(text))
            text = text[:at] + chr(rng.randrange(1, 300)) + text[at + rng.randrange(3) :]
        path.write_text(text)
        variant = rng.choice(("", ":ar", ":nothing", ":"))
        messages.append(refusal(lambda v=variant: build.load_config(f"{path}{v}")))
    messages = [message for message in messages if message is not None]
    assert len(messages) > count / 3 and one_line_each(messages)
