"""The similarity of texts by sentence embeddings."""

from collections.abc import Callable, Sequence

import numpy as np

from moi_jax.common.errors import UserError

# Texts -> float[texts, width], one vector per text.
Embedder = Callable[[list[str]], np.ndarray]

# The models of the published figures, by language of the data.
UPSTREAM = {"": "all-mpnet-base-v2", "zh": "thenlper/gte-large-zh"}
INSTALL = "pip install sentence-transformers"


class Similarity:
    """Cosine similarity of texts, clipped to [0, 1]; 1 for equal texts. Embeds each text once."""

    def __init__(self, embed: Embedder):
        self._embed = embed
        self._directions: dict[str, np.ndarray] = {}

    def __call__(self, rows: Sequence[str], columns: Sequence[str]) -> np.ndarray:
        """The similarities, float64[rows, columns]."""
        new = [text for text in {*rows, *columns} if text not in self._directions]
        if new:
            new.sort()  # the order of a set changes from run to run
            vectors = np.asarray(self._embed(new), np.float64)
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            directions = vectors / np.where(lengths > 0, lengths, 1)
            self._directions.update(zip(new, directions, strict=True))
        left, right = (
            np.stack([self._directions[text] for text in texts]) for texts in (rows, columns)
        )
        equal = np.array(rows, object)[:, None] == np.array(columns, object)
        return np.where(equal, 1.0, np.clip(left @ right.T, 0, 1))


def load_embedder(name: str, *, download: bool) -> Embedder:
    """A model of sentence-transformers on the CPU, so that it takes no accelerator memory.

    Args:
      name: a name at the hub, or a directory.
      download: whether it may be fetched from the hub.

    Raises:
      UserError: the package or the model is missing. The message says how to get it.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(f"cannot import sentence-transformers ({error}): {INSTALL}") from None
    try:
        model = SentenceTransformer(name, device="cpu", local_files_only=not download)
    except Exception as error:  # hub, files and model classes can raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the sentence embedder {name!r} ({reason}); --teval-embedder takes a "
            f"name at the hub or a directory"
        ) from None
    return lambda texts: model.encode(texts, show_progress_bar=False)
