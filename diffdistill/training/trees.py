"""Trees of arrays as checkpoints see them: nested dicts with string keys, and tensors by path."""

from collections.abc import Mapping
from typing import Any

import jax


def to_dict(tree: Any) -> dict[str, Any]:
    """Any tree as nested dicts: {"0": {"mu": {"dense": {"kernel": leaf}}}} for an optax state. Empty nodes vanish.

    So a file does not depend on the Python classes that were in memory when it was written.
    """
    result: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = [_name(key) for key in path] or ["value"]
        node = result
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return result


def from_dict(like: Any, nested: Mapping[str, Any]) -> Any:
    """The leaves of `nested` (made by `to_dict` from a tree with the structure of `like`) in that structure."""
    leaves = flat(nested)
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree.unflatten(structure, [leaves["/".join(map(_name, path)) or "value"] for path, _ in paths])


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by their path, "block_0/conv/kernel"."""
    result: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{name}/"))
        else:
            result[f"{prefix}{name}"] = value
    return result


def _name(key: Any) -> str:
    """A dict key, an attribute or an index as a string."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
