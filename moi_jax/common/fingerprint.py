"""Short fingerprints of values, to tell whether two of them are equal."""

import hashlib
import json
from typing import Any


def json_fingerprint(value: Any) -> str:
    """16 hex digits that depend on the content of a JSON value; the order of keys plays no part."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
