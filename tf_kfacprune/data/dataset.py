"""A labelled data set in memory, checked once so that training never meets malformed arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tf_kfacprune.data.targets import checked_targets
from tf_kfacprune.errors import DataError
from tf_kfacprune.validation import is_count

__all__ = ["Dataset", "checked_dataset", "validation_split"]


@dataclass(frozen=True)
class Dataset:
    """A labelled data set, held in memory.

    Attributes:
        x_train: float32 inputs, shape ``(n, ...)``; images are ``(n, height, width, channels)``
            with values in [0, 1].
        y_train: labels. Classes are int64, shape ``(n,)``, each in ``range(num_classes)``; other
            kinds are float32, shape ``(n, num_classes)``.
        x_test: as ``x_train``, for the test examples.
        y_test: as ``y_train``, for the test examples.
        num_classes: number of classes, or of decisions or values for each example: how many outputs
            a network needs.
        name: the name or file it was loaded from.
        scale: what the stored inputs were multiplied with, such as 1 / 255 for uint8 images.
        labels: names of the classes; empty if unknown.
        kind: what the labels are: ``"classes"``, ``"binary"`` decisions or ``"values"``.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    name: str
    scale: float = 1.0
    labels: tuple[str, ...] = ()
    kind: str = "classes"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, without the batch axis."""
        return tuple(self.x_train.shape[1:])

    def __repr__(self) -> str:
        return (
            f"Dataset(name={self.name!r}, train={len(self.x_train)}, test={len(self.x_test)}, "
            f"input_shape={self.input_shape}, num_classes={self.num_classes})"
        )


def validation_split(dataset: Dataset, count: int) -> Dataset:
    """Holds out the last training examples, and hides the test set.

    Every choice (a threshold, an epoch, a learning rate) is made on the result, whose "test"
    arrays are the held-out training examples; the true test set is touched once, at the end.

    Args:
        dataset: the data set to split.
        count: number of training examples to hold out, at least 1 and fewer than there are.

    Returns:
        A data set that trains on the first ``n - count`` examples and tests on the last ``count``.

    Raises:
        DataError: if ``count`` leaves one side empty.

    Examples:
        >>> import tf_kfacprune as kp
        >>> tuning = kp.data.validation_split(kp.data.load("digits"), 300)
        >>> len(tuning.x_train), len(tuning.x_test)
        (1137, 300)
    """
    total = len(dataset.x_train)
    if not is_count(count) or count >= total:
        raise DataError(
            f"validation_split of data set {dataset.name!r}: count must be an integer from 1 to "
            f"{total - 1}, because there are {total} training examples. Received: count={count!r}."
        )
    cut = total - count
    return replace(
        dataset,
        x_train=dataset.x_train[:cut],
        y_train=dataset.y_train[:cut],
        x_test=dataset.x_train[cut:],
        y_test=dataset.y_train[cut:],
        name=f"{dataset.name} (last {count} held out)",
    )


def checked_dataset(
    arrays: dict[str, np.ndarray],
    *,
    name: str,
    source: str,
    num_classes: int | None = None,
    kind: str | None = "classes",
) -> Dataset:
    """Builds a `Dataset` from raw arrays, or says what is wrong with them.

    uint8 inputs are taken for images: scaled to [0, 1], and given a channel axis if they have
    none. Floating-point inputs are taken as they are.

    Args:
        arrays: ``x_train``, ``y_train``, ``x_test``, ``y_test``.
        name: name of the data set.
        source: where the arrays come from (a file, usually), for messages.
        num_classes: number of classes; by default one more than the largest training label.
        kind: what the labels are, as for `checked_targets`.

    Returns:
        The checked data set.

    Raises:
        InvalidArgumentError: if ``kind`` is unknown.
        DataError: naming the source, the array, what was found and the remedy.
    """
    inputs = {}
    for part in ("train", "test"):
        inputs[part] = _checked_inputs(arrays[f"x_{part}"], f"x_{part}", source)
    targets = checked_targets(
        arrays["y_train"], arrays["y_test"], source=source, kind=kind, num_classes=num_classes
    )
    for part, labels in (("train", targets.train), ("test", targets.test)):
        if len(inputs[part]) != len(labels):
            raise DataError(
                f"{source}: 'x_{part}' and 'y_{part}' must have the same length. Found "
                f"{len(inputs[part])} inputs and {len(labels)} labels. Save one label for "
                "each input."
            )
    if inputs["train"].shape[1:] != inputs["test"].shape[1:]:
        raise DataError(
            f"{source}: 'x_train' and 'x_test' must hold examples of one shape. Found "
            f"{inputs['train'].shape[1:]} and {inputs['test'].shape[1:]}."
        )
    return Dataset(
        x_train=inputs["train"],
        y_train=targets.train,
        x_test=inputs["test"],
        y_test=targets.test,
        num_classes=targets.outputs,
        name=name,
        scale=1 / 255 if all(arrays[f"x_{part}"].dtype == np.uint8 for part in inputs) else 1.0,
        labels=targets.names,
        kind=targets.kind,
    )


def _checked_inputs(array: np.ndarray, key: str, source: str) -> np.ndarray:
    """float32 inputs: uint8 images are scaled and given a channel axis, floats are kept."""
    where = f"{source}: {key!r}"
    if array.ndim < 2 or 0 in array.shape:
        raise DataError(
            f"{where} must hold at least one example along axis 0, with at least one value each. "
            f"Found shape {array.shape}."
        )
    if array.dtype == np.uint8:
        if array.ndim == 3:
            array = array[..., np.newaxis]
        # One float32 buffer, divided in place: CIFAR-10 is 0.6 GB already.
        scaled = array.astype(np.float32)
        scaled /= 255.0
        return scaled
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(
            f"{where} must be uint8 (images, 0 to 255) or floating point. Found {array.dtype}. "
            f"Convert it, for example with {key}.astype('float32')."
        )
    result = array.astype(np.float32)
    finite = np.isfinite(result)
    if not finite.all():
        bad = np.flatnonzero(~finite.reshape(len(result), -1).all(axis=1))
        raise DataError(
            f"{where} must be finite. Found NaN or infinite values in {len(bad)} of {len(result)} "
            f"examples, the first at index {bad[0]}. Remove or repair these examples."
        )
    return result
