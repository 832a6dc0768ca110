"""From a gated network to a small, ordinary Keras model that computes the same."""

from __future__ import annotations

import warnings
from typing import Any

import keras

from tf_kfacprune.compaction.compensation import compensate as absorb_removed
from tf_kfacprune.compaction.compensation import warn_of_skipped
from tf_kfacprune.compaction.plan import RemovalPlan
from tf_kfacprune.compaction.rebuilding import rebuild_compact
from tf_kfacprune.compaction.verification import verify_parity
from tf_kfacprune.errors import InvalidArgumentError
from tf_kfacprune.gates import GatedNetwork
from tf_kfacprune.graph import CostModel, network_of

__all__ = ["compact", "compaction_report", "missed_budget"]


def compact(
    model: Any,
    *,
    verify: bool = True,
    tolerance: float | None = None,
    verify_data: Any = None,
    compensate: bool = False,
    data: Any = None,
) -> keras.Model:
    """Removes all closed neurons and all gates.

    The result is a plain Functional Keras model: layers have their original names and classes,
    gates that are neither open nor closed are folded into the weights that read them, and if input
    features were pruned, the model still takes all of them and picks what it needs.

    A `PrunableModel` that is over its budget, because its gates have not settled, is warned of.

    Args:
        model: A `PrunableModel`, or a Keras model that contains gates.
        verify: Whether to compare the result with the gated model in inference mode.
        tolerance: Largest relative error allowed, `max |gated - compact| / max |gated|`; by
            default what rounding explains (1e-5 in float32).
        verify_data: Inputs for the comparison, in the structure of the model's inputs; random
            ones by default. Inputs that are text have none.
        compensate: Whether the layers that read removed channels absorb what the kept ones predict
            of them, W_K += W_R A_RK (A_KK + eps I)^-1. That changes the function on purpose, from
            that of the gated network (with which the result is compared before) toward that of the
            network with its closed gates open: for gates that were closed in a trained network
            without training it further. Layers for which it is impossible are named in a warning.
        data: What A is taken over, if `compensate`: inputs in the structure of the model's inputs,
            or a `tf.data.Dataset` of batches `x` or `(x, y)`. Some hundred examples do.

    Returns:
        The compact model. It shares no weights with `model`.

    Raises:
        UnsupportedModelError: If the model has no gates or cannot be made smaller exactly.
        ParityError: If the result differs from the gated model.
        InvalidArgumentError: If `model` is not a model, or only one of `compensate` and `data` is
            given.
        DataError: If `data` holds no example.

    Examples:
        >>> small = kp.compact(pm)

    References:
        Ebrahimi & Klabjan, arXiv 2111.08577.
    """
    net = _net_of(model)
    if compensate != (data is not None):
        raise InvalidArgumentError(
            "compact compensates from data: pass `compensate=True` and `data`, or neither. "
            f"Received: compensate={compensate!r}, data of type {type(data).__name__}"
        )
    if (missed := missed_budget(model)) is not None:
        warnings.warn(missed, stacklevel=2)
    small, _ = rebuild_compact(_plan(model, net))
    if verify:
        verify_parity(net, small, tolerance, verify_data)
    if compensate:
        warn_of_skipped(absorb_removed(model, small, data))
    return small


def missed_budget(model: Any) -> str | None:
    """What a network costs that was not pruned to the end, if that is more than it was to cost.

    Args:
        model: A `PrunableModel`, or any other model, of which nothing was asked.

    Returns:
        A sentence for people, or None if there is nothing to say.
    """
    if getattr(model, "has_settled", True):
        return None
    missed = {m: o for m, o in model.budget_outcomes().items() if o.ratio > 1}
    if not missed:
        return None
    costs = "; ".join(f"{measure}: {outcome}" for measure, outcome in missed.items())
    return (
        f"Model {model.name!r} is not on its budget ({costs}). Train it to the end of its run. If "
        "it has been: a callback may have put back, or a file may hold, weights of an epoch before "
        "the gates had settled; `model.has_settled` tells."
    )


def compaction_report(model: Any, compact_model: keras.Model) -> dict[str, Any]:
    """What was kept, for records.

    Args:
        model: What `compact` was given, in the same state.
        compact_model: What it returned.

    Returns:
        A dictionary of plain Python values: `layers`, for each layer or input that creates
        channels the number of channels before and the `kept` ones; `macs` and `params`, each
        `dense` and `compact`.

    Raises:
        InvalidArgumentError: If the two models do not belong together.
    """
    net = _net_of(model)
    plan = _plan(model, net)
    gated = _gated_of(model, net)
    cost = gated.cost if gated is not None else CostModel(plan.channels)
    costs = {
        measure: {"dense": cost.dense(measure), "compact": cost.count(measure, plan.keep)}
        for measure in cost.measures
    }
    if costs["params"]["compact"] != compact_model.count_params():
        raise InvalidArgumentError(
            f"Model {compact_model.name!r} has {compact_model.count_params()} parameters, but "
            f"compacting the given gated model makes {costs['params']['compact']}. Pass the model "
            "that it was made from, with unchanged gates."
        )
    layers = {}
    for producer in plan.channels.flow.producers:
        kept = plan.positions(plan.channels.neurons(producer.labels))
        layers[producer.name] = {"channels": len(producer.labels), "kept": kept.tolist()}
    return {"layers": layers, **costs}


def _net_of(model: Any) -> keras.Model:
    net = network_of(model)
    if not isinstance(net, keras.Model):
        raise InvalidArgumentError(
            "compact takes a PrunableModel or a Keras model with gates. "
            f"Received: {model!r} (of type {type(model).__name__})"
        )
    return net


def _gated_of(model: Any, net: keras.Model) -> GatedNetwork | None:
    # A PrunableModel without a budget trains an ordinary network: nothing goes, nothing is wrong.
    return model.gated if hasattr(model, "gated") else GatedNetwork(net)


def _plan(model: Any, net: keras.Model) -> RemovalPlan:
    return RemovalPlan(net, _gated_of(model, net))
