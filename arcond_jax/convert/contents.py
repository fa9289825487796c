"""What a file is, told by its content: endings of downloaded weights are often wrong or gone."""

import codecs
import pathlib
import zipfile
from typing import Literal

from arcond_jax.convert import table

HEAD_BYTES = 512
TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # opens the files of torch.save before 1.6

# First bytes of what people give by mistake, and what to say of it.
MISTAKEN = (
    (b"version https://git-lfs", "a git-lfs pointer: fetch the file itself with `git lfs pull`"),
    (b"\x1f\x8b", "a gzip archive: unpack it and give the weights in it"),
    (b"BZh", "a bzip2 archive: unpack it and give the weights in it"),
    (b"\xfd7zXZ\x00", "an xz archive: unpack it and give the weights in it"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive: unpack it and give the weights in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it and give the weights in it"),
    (b"Rar!", "a rar archive: unpack it and give the weights in it"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x93NUMPY", "an array of numpy"),
    (b"\x89HDF\r\n", "an HDF5 file, of Keras or TensorFlow"),
    (b"GGUF", "a GGUF file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "a program"),
)
PAGE = "page: the download gave a page instead of the file (a login or a licence may be needed)"


def weights_format(path: pathlib.Path) -> Literal["safetensors", "torch"]:
    """The format of a weights file, whatever its name; no tensor is read and nothing is unpickled.

    Raises:
      table.ConvertError: It is none; the message says what it is.
      OSError: It cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    # A header of JSON after its length in eight bytes, which hold a zero and so are no text.
    if head[8:9] == b"{" and not _is_text(head[:8]):
        return "safetensors"
    if head[:1] == b"\x80" and TORCH_MAGIC in head[:64]:
        return "torch"
    what = _of_zip(path) if head.startswith(b"PK\x03\x04") else _mistaken(head)
    if what is None:
        return "torch"
    raise table.ConvertError(
        f"{path} is {what}; official weights are safetensors or PyTorch's files"
    )


def is_weights(path: pathlib.Path) -> bool:
    """Whether the content of a file is that of weights."""
    try:
        weights_format(path)
    except (table.ConvertError, OSError):
        return False
    return True


def _of_zip(path: pathlib.Path) -> str | None:
    """What a zip archive is; None for a file of `torch.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:  # zipfile raises many types for bad files
        return "damaged: it begins as a zip archive, such as PyTorch writes, and has no whole end"
    names = [member.filename for member in members]
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript program: take the state dict of its model"
    if not any(name.count("/") == 1 and name.endswith("/data.pkl") for name in names):
        if all(name.endswith(".npy") for name in names):
            return "an npz archive of numpy"
        return f"a zip archive of other things, {names[0]!r} first: unpack it"
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        return "a PyTorch file that was compressed later, which PyTorch does not read: unpack it"
    return None


def _mistaken(head: bytes) -> str:
    """What the first bytes of a file that is no weights say."""
    if not head:
        return "empty: the download failed"
    for magic, what in MISTAKEN:
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it and give the weights in it"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle that PyTorch did not write: not read, since it might run code"
    if not _is_text(head):
        return f"damaged, or of an unknown format (it begins with the bytes {head[:8].hex(' ')})"
    text = head.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n")
    if text[:9].lower() == "<!doctype" or text[:5].lower() == "<html":
        return f"an HTML {PAGE}"
    if text.startswith("<"):
        return f"an XML {PAGE}"
    if text.startswith(("{", "[")):
        return "a JSON file"
    return f"a text file ({(text.splitlines() or [''])[0][:40]!r})"


def _is_text(head: bytes) -> bool:
    """Whether bytes are UTF-8 without control characters; the last character may be cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(c.isprintable() or c in "\ufeff\t\r\n\f" for c in text)
