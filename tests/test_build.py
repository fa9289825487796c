"""From config files to objects: what they hold, how they are overridden, and how they fail.

Every config is kept in `golden/configs/`, so that a change shows in review.
After a change on purpose: `python tests/test_build.py`.
"""

import json
import pathlib
import re

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny

from arcond_jax import build
from arcond_jax import config as config_lib
from arcond_jax.build import checking, data, defaults, family, models, saved, tokens, transport
from arcond_jax.sampling import raster, speculative, stride

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
# ar_xl_imagenet256 with three tables of 16,384 codes and a row for no code; windows of 48 matrices
# of the width's square and 20 vectors.
JOINT = {
    "joint_xl_imagenet256": 805_664_032 + (3 * 16384 + 1) * 1280,
    "joint_xl_imagenet256:joint_tensorar": 868_579_872 + (48 * 1280 + 20) * 1280,
}
TOKENIZERS = tuple(
    f"tokenizers:{name}" for name in ("kl16", "vq16", "vq8", "maskgit_vq", "lfq256", "lfq128")
)
CONFIGS = (
    *(f"digits:{variant}" for variant in (*VARIANTS, "mar")),
    "cifar10",
    *IMAGENET,
    "ar_xl_imagenet256:refined",
    *JOINT,
    *OF_CODES,
    *TOKENIZERS,
)


def dump(name):
    return json.dumps(saved.dump(build.load_config(name)), indent=2) + "\n"


def golden_path(name):
    return GOLDEN / f"{name.replace(':', '_')}.json"


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_the_golden_ones(name):
    golden = json.loads(golden_path(name).read_text())
    now = json.loads(dump(name))
    assert now == golden, "if this is on purpose, run `python tests/test_build.py` and commit"


def tokenizer_count(config, known={}):  # noqa: B006
    """Parameters of the tokenizer, counted once for all configs that have the same."""
    settings = {name: x for name, x in config.tokenizer.items() if "path" not in name}
    key = (str(settings), build.image_shape(config))
    if key not in known:
        tokenizer = build.abstract_tokenizer(config)
        known[key] = sum(x.size for x in jax.tree.leaves(tokenizer))
    return known[key]


# Of each model the smallest, at every image size: the others differ in numbers alone.
SMALLEST = {
    *("mar_base_imagenet256", "mar_large_imagenet512", "ar_xl_imagenet256", "cdm_xl_imagenet256"),
    *("llamagen_b_256", "llamagen_b_384", "llamagen_t2i_xl_256", "rar_b", "magvit2_b"),
}


def sized(name, *values):
    return pytest.param(name, *values, marks=[] if name in SMALLEST else [pytest.mark.slow])


@pytest.mark.parametrize(("name", "count"), [sized(*x) for x in IMAGENET.items()])
def test_full_sizes_are_built(name, count):
    """Shapes alone, of the model and its tokenizer."""
    config = build.load_config(name)
    params = nn.unbox(jax.eval_shape(build.generator(config).init, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert build.empty_bank(config) is None
    assert build.grid(config) == ((32, 32) if "512" in name else (16, 16))
    loop = build.sampler(config)
    solver = loop.heads[-1].solver if isinstance(loop, raster.Raster) else loop.solver
    assert solver.num_evaluations == 100
    assert tokenizer_count(config) == 66_456_019  # the official count


@pytest.mark.parametrize(("name", "count"), JOINT.items())
def test_full_sizes_of_joint_models_are_built(name, count):
    assert count_of(build.load_config(name)) == count


def test_the_joint_model_has_two_tokenizers_on_one_grid():
    config = build.load_config("joint_xl_imagenet256")
    assert build.grid(config) == (16, 16)
    assert (build.num_codes(config), build.token_channels(config)) == (16384, 16)
    assert tokenizer_count(config) == 66_456_019 + 71_883_403
    assert build.abstract_tokenizer(config).code_law is None
    cached = build.changed(config, {"data.name": "cache"})
    assert build.abstract_tokenizer(cached).code_law.cholesky.shape == (16384, 16, 16)
    few = ("warm_start=0.4", "solver=ddim", "spacing=trailing", "num_head_evaluations=1")
    few = build.with_overrides(cached, [f"sampling.{x}" for x in few])
    assert build.sampler(few).heads[1].warm
    with pytest.raises(
        build.ConfigError, match=r"the kl_ settings give 16x16 latents, the vq_ set"
    ):
        build.with_overrides(config, ["tokenizer.vq_multipliers=(1,2,2,4)"])
    with pytest.raises(build.ConfigError, match=r"tokenizer\.kl_path is not set: give the folder"):
        build.tokenizer(config)


@pytest.mark.parametrize(("tokenizer", "gives"), [("kl", "latents"), ("vq", "codes")])
def test_the_joint_model_needs_latents_and_codes(tokenizer, gives):
    config = build.config(model="joint", tokenizer=tokenizer)
    with pytest.raises(build.ConfigError, match=f"codes and latents, tokenizer .* gives {gives}$"):
        build.check(config)


# LlamaGen's counts are the same at 256 and 384 pixels: of the four larger sizes one will do.
@pytest.mark.parametrize("name", [sized(x) for x in [*OF_CODES][:1] + [*OF_CODES][5:]])
def test_full_sizes_of_models_of_codes_are_built(name):
    config = build.load_config(name)
    params = nn.unbox(build.abstract_params(config))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert (count, tokenizer_count(config)) == OF_CODES[name]
    assert build.grid(config) == 2 * (config.data.image_size // 16,)
    assert build.sampler(config).guidance.on


@pytest.mark.parametrize("name", ["llamagen_t2i_xl_256", "cdm_xl_imagenet256"])
def test_what_has_no_conditions_of_classes_is_not_refined(name):
    with pytest.raises(build.ConfigError, match=r"transport\.kind bures needs a condition for"):
        build.load_config(name, ["transport.kind=bures"])


def test_the_bank_of_a_thousand_classes_is_one_of_residuals():
    config = build.load_config("ar_xl_imagenet256:refined", ["transport.kind=stored"])
    with pytest.raises(build.ConfigError, match=r"would keep 1,250 GiB of conditions, for 256"):
        build.empty_bank(config)
    config = build.load_config("ar_xl_imagenet256:refined")
    bank = jax.eval_shape(lambda: build.empty_bank(config))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(bank)) < 2**28


def test_the_default_variant_is_joint():
    assert build.load_config("digits") == build.load_config("configs/digits.py:joint")


def test_a_config_survives_json():
    config = tiny.config("joint", "sampling.warm_start=None", "mesh.data=2")
    again = saved.load(json.loads(json.dumps(saved.dump(config))))
    assert config_lib.flat(again) == config_lib.flat(config)


def test_a_config_saved_before_a_key_existed_has_its_default():
    config = tiny.config("joint")
    values = json.loads(json.dumps(saved.dump(config)))
    del values["sampling"]["min_p"], values["mesh"]
    assert config_lib.flat(saved.load(values)) == config_lib.flat(config)
    values["model"]["dept"] = 2
    with pytest.raises(build.ConfigError, match=r"is of another version: it has model\.dept"):
        saved.load(values)
    with pytest.raises(build.ConfigError, match="of version 99, this library knows up to 2"):
        saved.load({"version": 99})


def test_overrides():
    config = build.load_config(
        "digits:ar",
        [
            "training.learning_rate=1",  # an integer will do for a float
            "model.mlp_hidden=None",  # what is optional may be None
            "training.clip_norm=None",
            "sampling.clip_latents=5",  # and hold what it was made for
            "sampling.solver=ddim",  # a bare word is a string
            "model.qk_norm=True",
            "transport.kind=bures",  # this changes what its section holds
            "transport.num_sources=7",
            "seed=3",
        ],
    )
    assert (config.training.learning_rate, config.model.mlp_hidden) == (1.0, None)
    assert type(config.training.learning_rate) is float
    assert (config.sampling.clip_latents, config.sampling.solver) == (5.0, "ddim")
    assert config.training.clip_norm is None and config.model.qk_norm is True
    assert "epsilon" not in config.transport and config.transport.num_sources == 7
    assert config.seed == 3


def test_changing_the_refinement_keeps_what_both_kinds_have():
    config = build.load_config("digits:ar", ["transport.num_atoms=9", "transport.epsilon=0.2"])
    config = build.changed(config, {"transport.kind": "residual"})
    assert (config.transport.num_atoms, config.transport.epsilon) == (9, 0.2)
    assert config.transport.num_directions == 64
    config = build.changed(config, {"transport.kind": "none"})
    assert config.transport.to_dict() == {"kind": "none"}


WRONG_OVERRIDES = {
    "model.dept=3": r"unknown config key model\.dept: did you mean model\.depth\?",
    "qqqqqq=3": r"unknown config key qqqqqq: sections are data, diffusion_head, evaluation, loss",
    "model=3": r"unknown config key model: did you mean ",
    "model.depth.more=3": r"unknown config key model\.depth\.more: did you mean model\.depth\?",
    "model.depth=three": r"config key model\.depth wants int, not 'three'",
    "model.depth=3.0": r"config key model\.depth wants int, not '3\.0'",
    "model.depth=True": r"config key model\.depth wants int, not 'True'",
    "model.depth=None": r"config key model\.depth wants int, not 'None'",
    "model.depth": r"config key model\.depth wants int, not ''",
    "model.qk_norm=1": r"config key model\.qk_norm wants bool, not '1'",
    "sampling.top_k=0.5": r"config key sampling\.top_k wants int or None, not '0\.5'",
    "model.name=rar": r"config key model\.name cannot be changed: it decides what else there is",
    "tokenizer.name=vq": r"config key tokenizer\.name cannot be changed",
    "data.name=imagenet": r"data\.name 'imagenet' is not one of digits, folder",
    "training.dtype=float16": r"training\.dtype 'float16' is not one of float32, bfloat16",
    "transport.kind=exact": r"transport\.kind 'exact' is not one of none, stored, bures, residual",
    "transport.num_directions=3": r"it goes with transport\.kind residual, and this config has mod",
    "rar.width=100": r"unknown config key rar\.width: ",
    "model.mask_rate_min=0.5": r"unknown config key model\.mask_rate_min: ",
    "loss.mask_rate_min=0.5": r"it goes with model mar, and this config has model joint",
    "model.remat=some": r"model\.remat 'some' is not one of none, full, dots",
    "data.batch_size=0": r"data\.batch_size 0 must be at least 1",
    "model.depth=0": r"model\.depth 0 must be at least 1",
    "model.num_heads=3": r"model\.width 64 is not divisible by model\.num_heads 3",
    "model.dropout=1.0": r"model\.dropout 1\.0 must be at least 0 and at most 0\.999999",
    "tensorar.window=0": r"tensorar\.window 0 must be at least 1",
    "tensorar.window=17": r"tensorar\.window 17 must be from 1 to the 16 positions",
    "tensorar.drafts=some": r"drafts 'some' is not one of masked, noised, random",
    "tensorar.noise_schedule=up": r"noise_schedule 'up' is not one of",
    "loss.w_tensor=-1": r"loss\.w_tensor -1\.0 must be at least 0",
    "training.num_accumulations=3": r"training\.num_accumulations 3 does not divide data\.batch",
    "training.decay=square": r"decay 'square' is not one of constant, linear, cosine",
    "training.num_warmup_steps=2000": r"^training\.num_warmup_steps 2000 is more than training\.nu",
    "training.learning_rate=nan": r"config key training\.learning_rate wants float, not 'nan'",
    "training.learning_rate=1e999": r"training\.learning_rate inf must be at least 1e-12 and",
    "training.b1=1": r"training\.b1 1\.0 must be at least 0 and at most 0\.999999",
    "sampling.solver=heun": r"sampling\.solver 'heun' is not one of ancestral, ddim",
    "sampling.latent_temperature=0.9": r"latent_temperature 0\.9 does nothing while sampling\.sol",
    "tensorar.noise=codebook": r"tensorar\.noise 'codebook' does nothing while tensorar\.drafts is",
    "sampling.code_temperature=0": r"code_temperature 0\.0 must be at least 1e-06",
    "sampling.guidance_power=2": r"^sampling\.guidance_power 2\.0 and sampling\.guidance_sch",
    "sampling.guidance_schedule=power_cosine": r"power None and sampling\.guidance_schedule 'power",
    "tensorar.drafter=True": r"drafter guesses codes alone, and model joint draws latents too",
    "tensorar.draft_weights=(1,1)": r"draft_weights \(1\.0, 1\.0\) must be 3, one for each entry",
    "tensorar.draft_weights=(1,0,1)": r"draft_weights \(1, 0, 1\) must hold numbers of at least",
    "tensorar.draft_weights=()": r"draft_weights \(\) must hold numbers of at least 1e-06",
    "tensorar.draft_weights=3": r"config key tensorar\.draft_weights wants tuple or None, not '3'",
    "tensorar.base_rate=2": r"tensorar\.base_rate 2\.0 must be at least 0 and at most 1",
    "sampling.drafts=on": r"drafts 'on' is not one of off, draw, feed",
    "sampling.renoise=True": r"renoise True does nothing while sampling\.drafts is not feed",
    "transport.epsilon=0": r"transport\.epsilon 0\.0 must be at least 1e-06",
    "transport.grouping=row": r"transport\.grouping 'row' is not one of class, shared",
    "sampling.warm_start=1e-10": r"sampling\.warm_start 1e-10 must be at least 1e-06",
    "sampling.warm_start=1e-5": r"^sampling\.num_head_evaluations 1, sampling\.spacing trailing, ",
    "sampling.num_head_evaluations=1000": r"^sampling\.num_head_evaluations 1000, .* take fewer",
    "sampling.guided_positions=999": r"sampling\.guided_positions 999 must be at most 16, the posi",
    "seed=-1": r"seed -1 must be at least 0",
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_wrong_overrides_end_in_one_line(override):
    with pytest.raises(build.ConfigError, match=WRONG_OVERRIDES[override]) as raised:
        build.load_config("digits", [override])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", ["1e-40", "1e39", "1e308"])
def test_numbers_that_float32_cannot_hold_are_refused_by_key(value):
    for name in ("digits:joint", "digits:mar", "magvit2_b", "tokenizers:kl16"):
        config = build.load_config(name)
        settings = defaults.sections(**defaults.choices_of(config))
        for section, named in settings.items():
            for leaf, key in named.items():
                if key.kind is float and not (value == "1e-40" and key.low in (0.0, -1000.0)):
                    with pytest.raises(ValueError, match=rf"^{section}\.{leaf} .* must be at "):
                        key.accept(f"{section}.{leaf}", float(value))


@pytest.mark.parametrize("leaf", ["b1", "b2", "ema_decay"])
def test_decays_that_float32_takes_for_1_are_refused(leaf):
    with pytest.raises(build.ConfigError, match=f"{leaf} 0.99999999 must be at least 0 and at mo"):
        build.load_config("digits", [f"training.{leaf}=0.99999999"])


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ((), r"by tensorar\.noise categorical or codebook, not tensorar\.drafts masked: set it"),
        (
            ("drafts=random", "noise=self"),
            r"categorical or codebook, not tensorar\.noise self: set",
        ),
        (
            ("drafts=noised", "noise=none"),
            r"categorical or codebook, not tensorar\.noise none: set",
        ),
        (("drafts=noised", "noise=codebook"), None),
    ],
)
def test_drafts_get_the_noise_of_training_or_none(noise, message):
    overrides = ["sampling.drafts=feed", "sampling.renoise=True"]
    overrides += [f"tensorar.{text}" for text in noise]
    if message is None:
        config = build.load_config("digits:tensorar", overrides)
        head = family.code_head(config)
        assert head.renoise is not None and head.renoise.kind == "codebook"
        return
    with pytest.raises(build.ConfigError, match=message):
        build.load_config("digits:tensorar", overrides)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", r"no config file nothing: give one, or the name of one that comes with the"),
        ("configs/nothing.py:joint", r"no config file configs/nothing\.py: give one, or the"),
        ("gs://x/y.py:joint", r"^gs://x/y\.py:joint: configs are read from files on this machine"),
        ("my/digits.py:base", r"no config file my/digits\.py: give one, or the name of one that"),
        ("cifar10:big", r"cifar10 has no variants, so not 'big'"),
        ("digits:big", r"digits: digits has no variant 'big': choose one of joint, ar, tensorar"),
    ],
)
def test_missing_configs_end_in_one_line(path, message):
    with pytest.raises(build.ConfigError, match=message) as raised:
        build.load_config(path)
    assert "\n" not in str(raised.value)


def test_config_files_may_be_anywhere(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from arcond_jax.configs import digits\n"
        "def get_config():\n"
        "    config = digits.get_config('base')\n"
        "    config.name = 'mine'\n"
        "    return config\n"
    )
    assert build.load_config(str(path)).name == "mine"


def test_config_files_with_foreign_settings_are_refused(tmp_path):
    path = tmp_path / "mine.py"
    for line, message in {
        "config.gpt = {'depth': 3}": r"unknown config key gpt\.depth: ",
        "config.sampling.drafts = 'feed'": r"sampling\.drafts: it goes with configs of windows",
        "del config.training.b1": r"the config lacks training\.b1",
        "del config.transport": r"the config lacks transport\.kind",
        "config.training.b1 = 1.5": r"training\.b1 1\.5 must be at least 0 and at most 0\.9",
    }.items():
        path.write_text(
            "from arcond_jax.configs import digits\n"
            f"def get_config():\n    config = digits.get_config('base')\n    {line}\n"
            "    return config\n"
        )
        with pytest.raises(build.ConfigError, match=message):
            build.load_config(str(path))


def test_own_images_takes_classes_from_the_folder(tmp_path):
    for name in ("cat", "dog", ".hidden"):
        (tmp_path / "a:b" / "train" / name).mkdir(parents=True)
    config = build.load_config(f"own_images:{tmp_path / 'a:b'}", ["data.image_size=64"])
    assert config.data.num_classes == 2 and config.data.directory == str(tmp_path / "a:b")
    for folder, message in (
        ("", r"name the folder that holds train/<class>/"),
        (f":{tmp_path}", r"train does not exist: put the images into"),
        (f":{tmp_path / 'a:b' / 'train' / '..' / '..'}", r"does not exist"),
    ):
        with pytest.raises(build.ConfigError, match=message):
            build.load_config(f"own_images{folder}")


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("digits:base", "model.num_kv_heads=3", "model.num_heads 4 is not divisible by model.num"),
        ("digits:base", "model.num_heads=64", "rotary positions in rows and columns need a mult"),
        ("digits:mar", "model.decoder_depth=1", "model.decoder_depth 1 must be at least 2"),
        ("digits:ar", "loss.w_diffusion=0", "loss.w_diffusion 0.0 must be at least 1e-06"),
        ("digits:joint", "seed=1.5", "config key seed wants int, not '1.5'"),
        ("digits:joint", "seed=4294967296", "seed 4294967296 must be at least 0 and at most 4294"),
        ("digits:joint", "transport.kind=[1]", "config key transport.kind wants str"),
        ("digits:joint", "sampling.stride=2", "it goes with configs of windows over codes alone"),
        (
            "digits:joint",
            "sampling.speculative=True",
            "it goes with configs of windows over codes alone",
        ),
        (
            "digits:tensorar",
            "sampling.relaxed_acceptance=2",
            "sampling.relaxed_acceptance 2.0 does nothing while sampling.speculative is False",
        ),
        (
            "digits:tensorar",
            "sampling.relaxed_acceptance=0.5",
            "sampling.relaxed_acceptance 0.5 must be at least 1",
        ),
        ("digits:tensorar", "sampling.stride=7", "sampling.stride 7 must be from 1 to the window"),
        ("digits:mar", "sampling.num_ar_steps=99", "sampling.num_ar_steps 99 is out of range"),
        ("imagenet", "seed=0", "no config file imagenet"),
        ("digits:tensorar", "tensorar.drafter=True", "loss.w_tensor 0.3 does nothing while tensor"),
        ("llamagen_b_256:drafter", "tensorar.window=1", "tensorar.window 1 leaves tensorar.draft"),
        ("llamagen_b_256:drafter", "tensorar.base_rate=0.5", "0.5 does nothing while tensorar.dra"),
        ("llamagen_b_256:drafter", "tensorar.noise=self", "'self' does nothing while tensorar.dra"),
        ("llamagen_b_256:drafter", "sampling.drafts=feed", "does nothing while tensorar.drafter"),
        ("llamagen_b_256:drafter", "sampling.stride=2", "stride 2 does nothing while tensorar.dra"),
        ("magvit2_b:tensorar_v1", "tensorar.noise=codebook", "tokenizer lfq are signs, and a mix"),
    ],
)
def test_settings_that_fit_nothing(name, override, message):
    with pytest.raises(build.ConfigError, match=re.escape(message)):
        build.load_config(name, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.drafts=feed", "does not go with sampling.drafts feed: set it to off"),
        ("sampling.stride=2", "does not go with sampling.stride 2: set it to 1"),
        ("tensorar.window=1", "True does nothing while tensorar.window is 1"),
        ("transport.inverse_weight=0.5", "does not go with transport.inverse_weight 0.5: set it"),
        ("transport.kind=in_batch", "does not go with transport.kind in_batch, which needs all"),
    ],
)
def test_settings_that_speculation_does_not_go_with(override, message):
    with pytest.raises(build.ConfigError, match=f"sampling.speculative {re.escape(message)}"):
        build.load_config("digits:tensorar", ["sampling.speculative=True", override])


def test_nothing_is_run_but_the_file_that_is_named(tmp_path, monkeypatch):
    """Names are the package's own, whatever lies in the folder one is in."""
    for place in (tmp_path, tmp_path / "configs"):
        place.mkdir(exist_ok=True)
        for name in ("base", "digits", "imagenet"):
            (place / f"{name}.py").write_text("raise SystemExit('this was run')\n")
    monkeypatch.chdir(tmp_path)
    config = build.load_config("digits:base")
    assert config_lib.flat(saved.load(saved.dump(config))) == config_lib.flat(config)


def all_keys():
    """Every key that any choice of model, tokenizer, data or refinement brings, and windows."""
    keys = {f"tensorar.{x}" for x in family.TENSORAR}
    keys |= {f"sampling.{x}" for x in family.DRAFTS | family.STRIDE}
    for section, records in (
        ("tokenizer", tokens.TOKENIZERS),
        ("data", data.DATA),
        ("transport", transport.KINDS),
    ):
        keys |= {f"{section}.{x}" for record in records.values() for x in record.section}
    for record in models.FAMILIES.values():
        keys |= {f"{section}.{x}" for section, named in record.sections.items() for x in named}
    return keys


@pytest.mark.parametrize("name", CONFIGS)
def test_foreign_keys_are_refused_by_name(name):
    config = build.load_config(name)
    foreign = sorted(all_keys() - config_lib.flat(config).keys())
    assert len(foreign) > 20
    settings = defaults.sections(**defaults.choices_of(config))
    for key in foreign:
        with pytest.raises(build.ConfigError, match=f"unknown config key {key}: it goes with "):
            checking.key_of(config, key, settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_has_only_the_parts_it_trains(variant):
    params = nn.unbox(build.abstract_state(tiny.config(variant)).params)
    has_latents, has_codes = variant in ("joint", "ar"), variant != "ar"
    assert ("denoiser" in params, "latent_in" in params) == (has_latents, has_latents)
    assert ("code_embed" in params, "code_head" in params) == (has_codes, has_codes)
    assert ("code_cond" in params) == (variant == "joint")
    assert ("window_decoder" in params) == (variant in ("joint", "tensorar"))


# Millions of parameters, printed in arXiv v1 without the rest, in ICLR 2026 to the next one.
OF_V1 = {
    "llamagen_b_256": 139,
    "llamagen_l_384": 393,
    "llamagen_xl_384": 853,
    "rar_b": 289,
    "magvit2_b": 393,
}
OF_ICLR = {"b_256": 116, "l_384": 352, "xl_384": 789, "xxl_384": 1432}


def count_of(config):
    return sum(x.size for x in jax.tree.leaves(nn.unbox(build.abstract_params(config))))


@pytest.mark.parametrize("name", OF_V1)
def test_windows_of_the_first_version_have_their_published_size(name):
    assert count_of(build.load_config(f"{name}:tensorar_v1")) // 10**6 == OF_V1[name]


@pytest.mark.parametrize("name", OF_ICLR)
def test_windows_of_the_second_version_have_their_published_size(name):
    config = build.load_config(f"llamagen_{name}:tensorar_iclr")
    assert round(count_of(config) / 1e6) == OF_ICLR[name]


@pytest.mark.parametrize("name", OF_CODES)
def test_variants_of_models_of_codes_tune_these(name):
    plain = config_lib.flat(build.load_config(name))
    for variant in ("tensorar_v1", "tensorar_iclr", "drafter"):
        config = build.load_config(f"{name}:{variant}")
        assert config.name == f"{name}_{variant}"
        now, free = config_lib.flat(config), ("training.", "tensorar.", "loss.", "name")
        changed = {x for x in now if now[x] != plain.get(x) and not x.startswith(free)}
        of_model = {"model.dropout", "model.token_dropout", "model.attention_dropout"}
        drafts = set() if variant == "drafter" else {"sampling.drafts"}
        added = {x for x in now if x.startswith("sampling.")} - plain.keys()
        assert drafts <= changed <= {"data.batch_size"} | of_model | added
        assert (config.training.num_train_steps, config.data.batch_size) == (100_080, 256)
        signs = "magvit2" in name
        v1 = variant == "tensorar_v1"
        assert config.tensorar.noise == ("codebook" if v1 and not signs else "categorical")
    with pytest.raises(build.ConfigError, match="has no variant 'v2': choose of tensorar_v1, tens"):
        build.load_config(f"{name}:v2")


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
    config = tiny.config("joint", "tensorar.drafts=noised", "tensorar.noise=codebook")
    fitted = build.tokenizer(config)
    codebook = build.generator(config, fitted).drafts.codebook
    assert codebook.shape == (8, 4)
    np.testing.assert_allclose(codebook.mean(axis=0), 0.0, atol=1e-6)


def test_the_table_of_a_quantiser_is_the_codebook_of_the_noise():
    sizes = ("tokenizer.num_codes=16", "tokenizer.code_width=4", "tokenizer.width=32")
    for name in ("llamagen_b_256", "rar_b"):
        config = build.load_config(f"{name}:tensorar_v1", sizes)
        table = jax.numpy.arange(64.0).reshape(16, 4)
        fitted = build.abstract_tokenizer(config).replace(params={"codebook": {"table": table}})
        codebook = build.generator(config, fitted).drafts.codebook
        np.testing.assert_array_equal(codebook, table)


def test_weights_of_drafts_survive_json():
    config = tiny.config("tensorar", "tensorar.window=3", "tensorar.draft_weights=(1,0.5)")
    again = saved.load(json.loads(json.dumps(saved.dump(config))))
    assert again.tensorar.draft_weights == (1.0, 0.5)
    assert build.generator(again).losses[0].draft_weights == (1.0, 0.5)


def test_sampling_loops():
    loop = build.sampler(tiny.config())
    codes, latents = loop.heads
    assert isinstance(loop, raster.Raster) and latents.warm
    assert latents.solver.num_evaluations == 1 and codes.drafts == "off"
    assert len(build.sampler(tiny.config("base")).heads) == 1
    assert isinstance(
        build.sampler(tiny.config("tensorar", "sampling.stride=2")), stride.StrideSampler
    )
    loop = build.sampler(
        tiny.config("tensorar", "sampling.speculative=True", "sampling.relaxed_acceptance=1.5")
    )
    assert isinstance(loop, speculative.Speculative) and loop.relaxed == 1.5
    with pytest.raises(build.ConfigError, match="model joint draws every token: only mar can"):
        build.sampler(tiny.config(), num_known=3)


def test_other_data_keep_whether_images_are_mirrored():
    def switched(name, *overrides):
        return build.load_config(name, overrides).data

    assert switched("llamagen_b_256", "data.name=records").random_flip is True
    assert switched("mar_base_imagenet256", "data.name=cache").views == "flip"
    assert switched("digits:ar", "data.name=cache").views == "one"
    assert switched("digits:ar", "data.name=cache", "data.views=ten").views == "ten"
    once = build.load_config("digits:ar", ["data.name=cache"])
    assert build.changed(once, {"data.name": "digits"}).data.random_flip is False


if __name__ == "__main__":
    for name in CONFIGS:
        golden_path(name).write_text(dump(name))
