"""The published Inception-v3 of FID to a folder that `evaluation/inception.py` opens."""

import pathlib

from etils import epath

from arcond_jax.convert import files, shards, table
from arcond_jax.convert import inception as weights
from arcond_jax.evaluation import inception

NAME = "inception"  # as --family


def convert(source: pathlib.Path, out: epath.PathLike) -> str:
    """Writes `out` from a file of weights; nothing is written unless all of it fits.

    Weights of the same layout that are not the published ones are taken too, and said to be others:
    a score that is measured with them is no FID.

    Args:
      source: A file, the index of its shards, or a folder with one of them.

    Returns:
      What was found, in words, with the sha256 of the source.

    Raises:
      table.ConvertError: The file cannot be read, or is of another network.
      checkpoint.CheckpointError: `out` holds such weights already or cannot be written.
    """
    abstract = inception.abstract_params()
    try:
        state = weights.weights(files.load_state(source, containers=("state_dict", "model")))
        params = table.to_ours(weights.rows(abstract), state, abstract)
    except table.ConvertError as error:
        where = "" if str(source) in str(error) else f"{source}: "
        raise table.ConvertError(
            f"{where}{error}; FID's Inception-v3 is {' or, the same, '.join(weights.FILES)}"
        ) from None
    sha256 = files.digest(shards.files_of(shards.find(source)))
    published = sha256 == weights.SHA256
    metadata = {"source": source.absolute().name, "source_sha256": sha256, "published": published}
    inception.save(out, params, metadata)
    if published:
        return f"FID's Inception-v3, the published weights (sha256 {sha256})"
    return (
        f"Inception-v3 with OTHER weights than the published ones (sha256 {sha256}, not "
        f"{weights.SHA256}): what it measures is no FID"
    )
