"""FID's Inception-v3 after both preprocessings, with weights drawn by the archive's recipe.

Left out are averages of earlier layers, which the last ones follow from.
"""

import golden as golden_lib
import jax
import numpy as np

from arcond_jax.convert import inception as inception_table
from arcond_jax.convert import table
from arcond_jax.evaluation import inception

TOLERANCE = 1e-4  # of the largest value


def drawn_weights(config: dict) -> dict[str, np.ndarray]:
    """The official state dict of the recipe: normal numbers in the order of sorted names."""
    rng = np.random.default_rng(config["weight_seed"])
    state = {}
    for name, shape in sorted(dict(config["weight_shapes"]).items()):
        drawn = rng.standard_normal(shape)
        of = {
            "conv.weight": lambda x: 0.22 * x * np.sqrt(2.0 / np.prod(x.shape[1:])),
            "bn.weight": lambda x: 1.0 + 0.1 * x,
            "bn.bias": lambda x: 0.1 * x,
            "running_mean": lambda x: 0.02 * x,
            "running_var": lambda x: 0.05 * np.exp(0.2 * x),
            "fc.weight": lambda x: 2.0 * x / np.sqrt(2048.0),
            "fc.bias": lambda x: 0.1 * x,
        }
        law = next(law for end, law in of.items() if name.endswith(end))
        state[name] = law(drawn).astype(np.float32)
    return state


def check(golden: golden_lib.Golden) -> None:
    state = drawn_weights(golden.config)
    assert len(state) == golden.outputs["check/num_tensors"]
    for name in golden.config["check_names"]:
        np.testing.assert_array_equal(state[name].ravel()[:8], golden.outputs[f"check/{name}"])

    abstract = inception.abstract_params()
    rows = inception_table.rows(abstract)
    params = table.to_ours(rows, state, abstract)
    back = table.to_theirs(rows, params)
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)

    sizes = list(golden.config["sizes"])
    images = [golden.inputs[f"images_{size}"] for size in sizes]
    prepared = {
        kind: [inception.prepare(x, preprocessing=kind) for x in images]
        for kind in inception.PREPROCESSINGS
    }
    # One batch, so that the network is compiled once.
    batch = np.concatenate([x for each in prepared.values() for x in each])
    read = jax.device_get(inception.outputs(params, batch, dtype="float32"))
    probabilities, biased = jax.nn.softmax(read.logits), read.logits + state["fc.bias"]
    ours = {
        "tf": {
            "tf_2048": read.features,
            "tf_logits_unbiased": read.logits,
            "tf_logits": biased,
            "tf_probs_nobias": probabilities,
            "tf_sfid2023": read.spatial,
            "tf_input_corner": batch[:, :9, :9].transpose(0, 3, 1, 2),
            "tf_input_mean": batch.mean((1, 2)),
        },
        "pytorch_fid": {
            "ptfid_pool3": read.features,
            "ptfid_logits_nobias": read.logits,
            "ptfid_logits": biased,
            "ptfid_probs_nobias": probabilities,
        },
    }
    start = 0
    for kind, named in ours.items():
        for size, image in zip(sizes, images, strict=True):
            end = start + len(image)
            for name, value in named.items():
                expected = golden.outputs[f"{size}/{name}"]
                difference = np.abs(value[start:end] - expected).max()
                assert difference <= TOLERANCE * np.abs(expected).max(), (kind, size, name)
            start = end
    assert start == len(batch)


CHECKS = {"fid_inception": check}
