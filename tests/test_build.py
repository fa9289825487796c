"""From config files to objects: what they hold, how they are overridden, and how they fail.

Every config is kept in `golden/configs/`, so that a change shows in review.
After a change on purpose: `python tests/test_build.py`.
"""

import json
import pathlib

import flax.linen as nn
import jax
import pytest
import tiny

from arcond_jax import build
from arcond_jax import config as config_lib
from arcond_jax.sampling import causal, stride

GOLDEN = pathlib.Path(__file__).parent / "golden" / "configs"
VARIANTS = ("joint", "ar", "tensorar", "base")
# And how many parameters the model has; those of MAR are the official counts.
IMAGENET = {
    "mar_base_imagenet256": 207_924_768,
    "mar_large_imagenet256": 478_326_304,
    "mar_huge_imagenet256": 942_403_104,
    "mar_large_imagenet512": 480_685_600,
    "ar_xl_imagenet256": 805_664_032,
    "cdm_xl_imagenet256": 1_068_966_432,
}
# Parameters of the model, the official counts too, and of the tokenizer without its buffers.
OF_CODES = {
    **{
        f"llamagen_{size}_{pixels}": (count, 71_883_403)
        for pixels in (256, 384)
        for size, count in {
            "b": 110_888_448,
            "l": 342_910_976,
            "xl": 774_699_520,
            "xxl": 1_410_972_672,
            "3b": 3_096_659_200,
        }.items()
    },
    "llamagen_t2i_xl_256": (777_923_840, 71_883_403),
    "llamagen_t2i_xl_512": (777_923_840, 71_883_403),
    "rar_b": (260_923_648, 54_515_587),
    "rar_l": (461_668_352, 54_515_587),
    "rar_xl": (955_425_024, 54_515_587),
    "rar_xxl": (1_498_520_704, 54_515_587),
    "magvit2_b": (343_570_432, 115_127_829),
    "magvit2_l": (804_362_240, 115_127_829),
    "magvit2_xl": (1_486_679_040, 115_127_829),
}
TOKENIZERS = tuple(
    f"tokenizers:{name}" for name in ("kl16", "vq16", "vq8", "maskgit_vq", "lfq256", "lfq128")
)
CONFIGS = (
    *(f"digits:{variant}" for variant in (*VARIANTS, "mar")),
    "cifar10",
    *IMAGENET,
    *OF_CODES,
    *TOKENIZERS,
)


def dump(name):
    return json.dumps(build.load_config(name).to_dict(), indent=2) + "\n"


def golden_path(name):
    return GOLDEN / f"{name.replace(':', '_')}.json"


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_the_golden_ones(name):
    golden = json.loads(golden_path(name).read_text())
    now = json.loads(dump(name))
    assert now == golden, "if this is on purpose, run `python tests/test_build.py` and commit"


def tokenizer_count(config, known={}):  # noqa: B006
    """Parameters of the tokenizer, counted once for all configs that have the same."""
    key = (build.tokenizer_network(config), build.image_shape(config), config.tokenizer.patch_size)
    if key not in known:
        tokenizer = build.abstract_tokenizer(config)
        known[key] = sum(x.size for x in jax.tree.leaves(tokenizer))
    return known[key]


@pytest.mark.parametrize(("name", "count"), IMAGENET.items())
def test_full_sizes_are_built(name, count):
    """Shapes alone, of the model and its tokenizer."""
    config = build.load_config(name)
    params = nn.unbox(jax.eval_shape(build.generator(config).init, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert build.empty_bank(config) is None
    assert build.grid(config) == ((32, 32) if "512" in name else (16, 16))
    assert build.sampler(config).solver.num_evaluations == 100
    assert tokenizer_count(config) == 66_456_019  # the official count


# LlamaGen's counts are the same at 256 and 384 pixels: of the four larger sizes one will do.
@pytest.mark.parametrize("name", [*OF_CODES][:1] + [*OF_CODES][5:])
def test_full_sizes_of_models_of_codes_are_built(name):
    config = build.load_config(name)
    params = nn.unbox(build.abstract_params(config))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert (count, tokenizer_count(config)) == OF_CODES[name]
    assert build.grid(config) == 2 * (config.data.image_size // 16,)
    assert build.sampler(config).guided


def test_models_of_captions_are_not_trained():
    config = build.load_config("llamagen_t2i_xl_256")
    for build_it in (build.generator, build.abstract_state):
        with pytest.raises(build.ConfigError, match="backbone captioned has no training: conv"):
            build_it(config)
    with pytest.raises(build.ConfigError, match=r"transport\.kind bures needs images of each cla"):
        build.load_config("llamagen_t2i_xl_256", ["transport.kind=bures"])


def test_the_bank_of_a_thousand_classes_is_one_of_residuals():
    name, overrides = "ar_xl_imagenet256", ["transport.grouping=class", "transport.num_atoms=1024"]
    config = build.load_config(name, [*overrides, "transport.kind=stored"])
    with pytest.raises(build.ConfigError, match=r"would keep 1,250 GiB of conditions, for 256"):
        build.empty_bank(config)
    config = build.load_config(name, [*overrides, "transport.kind=residual"])
    bank = jax.eval_shape(lambda: build.empty_bank(config))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(bank)) < 2**28


def test_the_default_variant_is_joint():
    assert build.load_config("digits") == build.load_config("configs/digits.py:joint")


def test_a_config_survives_json():
    config = tiny.config("joint", "sampling.warm_start=None", "mesh.data=2")
    saved = json.loads(json.dumps(config.to_dict()))
    assert config_lib.flat(config_lib.from_dict(saved)) == config_lib.flat(config)


def test_a_config_of_an_older_version_gets_the_defaults_of_new_keys():
    config = tiny.config("joint")
    saved = json.loads(json.dumps(config.to_dict()))
    del saved["sampling"]["min_p"], saved["rar"]
    assert config_lib.flat(config_lib.from_dict(saved)) == config_lib.flat(config)
    saved["gpt"]["dept"] = 2
    with pytest.raises(build.ConfigError, match=r"is of another version: it has gpt\.dept"):
        config_lib.from_dict(saved)


def test_overrides():
    config = build.load_config(
        "digits:ar",
        [
            "training.learning_rate=1",  # an integer will do for a float
            "gpt.mlp_hidden=None",  # a placeholder may be None
            "sampling.top_k=5",  # and hold what it was made for
            "sampling.solver=ddim",  # a bare word is a string
            "gpt.qk_norm=True",
        ],
    )
    assert (config.training.learning_rate, config.gpt.mlp_hidden) == (1.0, None)
    assert type(config.training.learning_rate) is float
    assert (config.sampling.top_k, config.sampling.solver) == (5, "ddim")
    assert config.gpt.qk_norm is True


WRONG_OVERRIDES = {
    "gpt.dept=3": r"unknown config key gpt\.dept: did you mean gpt\.depth\?",
    "qqqqqq=3": r"unknown config key qqqqqq: sections are backbone, captioned, data, diffusion",
    "gpt=3": r"config key gpt wants ConfigDict, not '3'",
    "gpt.depth.more=3": r"unknown config key gpt\.depth\.more: did you mean gpt\.depth\?",
    "gpt.depth=three": r"config key gpt\.depth wants int, not 'three'",
    "gpt.depth=3.0": r"config key gpt\.depth wants int, not '3\.0'",
    "gpt.depth=True": r"config key gpt\.depth wants int, not 'True'",
    "gpt.depth=None": r"config key gpt\.depth wants int, not 'None'",
    "gpt.depth": r"config key gpt\.depth wants int, not ''",
    "gpt.qk_norm=1": r"config key gpt\.qk_norm wants bool, not '1'",
    "sampling.top_k=0.5": r"config key sampling\.top_k wants int or None, not '0\.5'",
    "data.name=imagenet": r"data\.name 'imagenet' is not one of digits, folder",
    "tokenizer.name=vae": r"tokenizer\.name 'vae' is not one of patches",
    "tokenizer.name=vq": r"data\.image_size 8 is not divisible by 16, the edge of a token",
    "backbone=rar": r"loss\.w_diffusion 1\.0 needs latents, which backbone rar on tok",
    "training.dtype=float16": r"training\.dtype 'float16' is not one of float32, bfloat16",
    "transport.kind=exact": r"transport\.kind 'exact' is not one of none, stored, bures, residual",
    "gpt.remat=some": r"gpt\.remat 'some' is not one of none, full, dots",
    "data.batch_size=0": r"data\.batch_size 0 must be at least 1",
    "gpt.depth=0": r"gpt\.depth 0 must be at least 1",
    "gpt.num_heads=3": r"gpt\.width 64 is not divisible by gpt\.num_heads 3",
    "tensorar.window=0": r"tensorar\.window 0 must be from 1 to the 16 positions",
    "tensorar.window=17": r"tensorar\.window 17 must be from 1 to the 16 positions",
    "tensorar.drafts=some": r"drafts 'some' is not one of masked, noised, random",
    "tensorar.noise_schedule=up": r"noise_schedule 'up' is not one of",
    "loss.w_tensor=-1": r"loss\.w_diffusion 1\.0 and loss\.w_tensor -1\.0 must not be negative",
    "training.num_accumulations=3": r"training\.num_accumulations 3 does not divide data\.batch",
    "training.decay=square": r"decay 'square' is not one of constant, linear, cosine",
    "training.num_warmup_steps=2000": r"num_warmup_steps 2000 is more than num_train_steps 1200",
    "sampling.solver=heun": r"unknown solver 'heun': choose one of ancestral, ddim",
    "sampling.code_temperature=0": r"code_temperature 0\.0 must be positive",
    "sampling.drafts=on": r"drafts 'on' is not one of off, draw, feed",
    "rar.num_heads=5": r"rar\.width 768 is not divisible by rar\.num_heads 5",
    "transport.epsilon=0": r"epsilon is 0\.0; set it to a finite number > 0",
    "transport.grouping=row": r"transport\.grouping 'row' is not one of class, shared",
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_wrong_overrides_end_in_one_line(override):
    with pytest.raises(build.ConfigError, match=WRONG_OVERRIDES[override]) as raised:
        build.load_config("digits", [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", r"no config file nothing: the library comes with ar_xl"),
        ("configs/nothing.py:joint", r"no config file configs/nothing\.py: the library comes"),
        ("digits:big", r"digits: digits has no variant 'big': choose one of joint, ar, tensorar"),
    ],
)
def test_missing_configs_end_in_one_line(path, message):
    with pytest.raises(build.ConfigError, match=message) as raised:
        build.load_config(path)
    assert "\n" not in str(raised.value)


def test_config_files_may_be_anywhere(tmp_path):
    path = tmp_path / "configs" / "mine.py"
    path.parent.mkdir()
    path.write_text(
        "from configs import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        "    config.name = 'mine'\n"
        "    return config\n"
    )
    assert build.load_config(str(path)).name == "mine"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_only_the_parts_it_trains(variant):
    params = nn.unbox(build.abstract_state(tiny.config(variant)).params)
    has_latents, has_codes = variant in ("joint", "ar"), variant != "ar"
    assert ("denoiser" in params, "latent_in" in params) == (has_latents, has_latents)
    assert ("code_embed" in params, "code_head" in params) == (has_codes, has_codes)
    assert ("code_cond" in params) == (variant == "joint")
    assert ("window_decoder" in params) == (variant in ("joint", "tensorar"))


def test_bank_and_tokenizer_have_the_shapes_of_the_config():
    config = tiny.config()
    bank = jax.eval_shape(lambda: build.empty_bank(config))
    assert bank.atoms.shape == (16, 10, 32, 16)
    config.transport.grouping = "shared"
    assert jax.eval_shape(lambda: build.empty_bank(config)).atoms.shape == (16, 1, 32, 16)
    fitted, abstract = build.tokenizer(config), build.abstract_tokenizer(config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fitted) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )


def test_the_noise_of_a_codebook_needs_the_fitted_tokenizer():
    config = tiny.config("joint", "tensorar.noise=codebook")
    assert build.abstract_state(config).params  # shapes do not
    fitted = build.tokenizer(config)
    assert build.generator(config, fitted).codebook.shape == (8, 4)
    with pytest.raises(ValueError, match="needs the tokenizer's codebook"):
        build.generator(config)


def test_sampling_loops():
    config = tiny.config()
    loop = build.sampler(config)
    assert isinstance(loop, causal.CausalSampler) and loop.warm
    assert loop.solver.num_evaluations == 1
    assert build.sampler(tiny.config("base")).solver is None
    assert isinstance(
        build.sampler(tiny.config("tensorar", "sampling.stride=2")), stride.StrideSampler
    )


if __name__ == "__main__":
    for name in CONFIGS:
        golden_path(name).write_text(dump(name))
