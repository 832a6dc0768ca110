"""The registry of channel rules, open to layers of users."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import keras

from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.graph.rules.base import ChannelRule

__all__ = [
    "existing_layers",
    "has_rule",
    "register_channel_rule",
    "register_internal_rule",
    "registered_rules",
    "rule_for",
    "take_rule_of",
]

RuleClass = TypeVar("RuleClass", bound="type[ChannelRule]")

_LAYER_RULES: dict[type, ChannelRule] = {}
_INTERNAL_RULES: dict[str, ChannelRule] = {}
_UNKNOWN = ChannelRule()
_OWN_RULE = "_kfacprune_rule"


def register_channel_rule(*layer_classes: type) -> Callable[[RuleClass], RuleClass]:
    """Class decorator: registers a `ChannelRule` for layer types.

    A rule holds for exactly the classes it is registered for. Subclasses may do anything in
    their `call`, so they need a registration of their own.

    Args:
        *layer_classes: Layer (or `keras.Operation`) classes.

    Returns:
        The decorator.

    Raises:
        InvalidArgumentError: If something else than an operation class or a rule is given.

    Examples:
        >>> @kp.register_channel_rule(MyActivation)
        ... class MyActivationRule(kp.ChannelRule):
        ...     def propagate(self, call, flow):
        ...         return [flow.of(call.inputs[0])]
    """
    for layer_class in layer_classes:
        if not (inspect.isclass(layer_class) and issubclass(layer_class, keras.Operation)):
            raise InvalidArgumentError(
                "register_channel_rule takes Keras layer classes. "
                f"Received: {layer_class!r} (of type {type(layer_class).__name__})"
            )

    def register(rule_class: RuleClass) -> RuleClass:
        if not (inspect.isclass(rule_class) and issubclass(rule_class, ChannelRule)):
            raise InvalidArgumentError(
                f"A channel rule must be a subclass of ChannelRule. Received: {rule_class!r}"
            )
        _LAYER_RULES.update(dict.fromkeys(layer_classes, rule_class()))
        return rule_class

    return register


def existing_layers(*names: str) -> list[type]:
    """Public layers of Keras by name, without those that the installed version does not have."""
    return [getattr(keras.layers, name) for name in names if hasattr(keras.layers, name)]


def register_internal_rule(*names: str) -> Callable[[RuleClass], RuleClass]:
    """Class decorator: registers a rule for classes that Keras does not export, by name.

    These are the operations behind `x + y` and `keras.ops.*`, and a few layers of
    `keras.applications`. Only classes that are part of Keras match.
    """

    def register(rule_class: RuleClass) -> RuleClass:
        _INTERNAL_RULES.update(dict.fromkeys(names, rule_class()))
        return rule_class

    return register


def take_rule_of(layer: keras.Layer, kind: type) -> None:
    """Treats one layer as those of another class, whatever its own class may do elsewhere."""
    vars(layer)[_OWN_RULE] = _LAYER_RULES[kind]


def registered_rules() -> list[tuple[str, bool, ChannelRule]]:
    """All rules, for documentation: `(name, whether it is a public layer's, rule)`.

    Layers of this package and of users are left out.
    """
    public = {kind: name for name, kind in vars(keras.layers).items() if inspect.isclass(kind)}
    public |= {kind: kind.__name__ for kind in public if hasattr(keras.layers, kind.__name__)}
    exported = [(public[kind], True, rule) for kind, rule in _LAYER_RULES.items() if kind in public]
    return exported + [(name, False, rule) for name, rule in _INTERNAL_RULES.items()]


def has_rule(operation: Any) -> bool:
    """Whether there is a rule for a layer or operation."""
    return rule_for(operation) is not _UNKNOWN


def rule_for(operation: Any) -> ChannelRule:
    """The rule of a layer or operation; the all-freezing one if there is none."""
    kind = type(operation)
    if kind in _LAYER_RULES:
        return _LAYER_RULES[kind]
    own: ChannelRule | None = vars(operation).get(_OWN_RULE)
    if own is not None:
        return own
    is_internal = kind.__module__.startswith("keras.src.")
    exported = isinstance(operation, keras.Layer) and hasattr(keras.layers, kind.__name__)
    if not is_internal or exported:
        return _UNKNOWN
    return _INTERNAL_RULES.get(kind.__name__, _UNKNOWN)
