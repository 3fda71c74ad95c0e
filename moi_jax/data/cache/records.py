"""Records of the cache: an instruction as bytes, and back."""

import json

import numpy as np

from moi_jax.text.instructions import Instruction

# Begins the text of a record that has more than the row's system text.
MORE = "\0"


def to_record(instruction: Instruction) -> bytes:
    """int32 header (tokens, system_length, spans), tokens, spans, then text in UTF-8.

    The text is row_system. Where there are weights or a conversation, too, it is MORE and a JSON
    object of the three.
    """
    tokens, spans, text = instruction.tokens, instruction.spans, instruction.row_system
    if instruction.weights is not None or instruction.conversation or text.startswith(MORE):
        weights = None if instruction.weights is None else instruction.weights.tolist()
        more = {
            "row_system": text,
            "weights": weights,
            "conversation": instruction.conversation,
        }
        text = MORE + json.dumps(more, ensure_ascii=False)
    header = np.array([len(tokens), instruction.system_length, len(spans)], np.int32)
    return b"".join([header.tobytes(), tokens.tobytes(), spans.tobytes(), text.encode()])


def from_record(record: bytes) -> Instruction:
    """The instruction that `to_record` wrote."""
    length, system_length, spans = np.frombuffer(record, np.int32, 3).tolist()
    numbers = np.frombuffer(record, np.int32, length + 3 * spans, offset=12)
    text, weights, conversation = record[12 + numbers.nbytes :].decode(), None, ""
    if text.startswith(MORE):
        more = json.loads(text[len(MORE) :])
        text, conversation = more["row_system"], more["conversation"]
        weights = None if more["weights"] is None else np.array(more["weights"], np.float32)
    return Instruction(
        numbers[:length],
        system_length,
        numbers[length:].reshape(-1, 3),
        text,
        weights,
        conversation,
    )
