"""The inspection: groups, savings that come true, and reasons for what stays."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tf_kfacprune as kp
from tf_kfacprune.errors import InvalidArgumentError, UnsupportedModelError
from tf_kfacprune.gates import NeuronGate
from tf_kfacprune.graph import LatencyTable, analyze, layer_signature, reasons
from tf_kfacprune.graph.latency import LayerTimes
from tf_kfacprune.reporting import inspect


def residual(filters=8, units=16):
    image = keras.Input((6, 6, 1), name="image")
    x = keras.layers.Conv2D(filters, 3, name="stem")(image)
    x = keras.layers.Add()([x, keras.layers.Conv2D(filters, 3, padding="same", name="branch")(x)])
    x = keras.layers.Dense(units, name="fc")(keras.layers.Flatten()(x))
    return keras.Model(image, keras.layers.Dense(3, activation="softmax", name="out")(x))


def test_coupled_layers_are_one_group():
    inspection = inspect(residual())
    stem, fc = inspection.groups
    assert (stem.size, stem.producers, stem.consumers) == (8, ("stem", "branch"), ("branch", "fc"))
    assert (fc.name, fc.size) == ("fc", 16)
    assert inspection.num_neurons == 24


def test_savings_are_those_of_the_model_with_one_neuron_left():
    model, inspection = residual(), inspect(residual())
    assert inspection.params == model.count_params()
    expected = 1 - residual(filters=1).count_params() / model.count_params()
    assert inspection.groups[0].params_saved == pytest.approx(expected)
    macs = 16 * 9 * 8 + 16 * 9 * 64 + 128 * 16 + 16 * 3
    assert inspection.macs == macs
    fewer = 16 * 9 * 8 + 16 * 9 * 64 + 128 * 1 + 1 * 3
    assert inspection.groups[1].macs_saved == pytest.approx(1 - fewer / macs)
    least = residual(filters=1, units=1).count_params() / model.count_params()
    assert inspection.least_params == pytest.approx(least)


def test_frozen_channels_have_a_reason_and_a_place():
    (output,) = inspect(residual()).frozen
    assert (output.layer, output.channels) == ("out", 3)
    assert output.reason == reasons.CROSS_CHANNEL_ACTIVATION


def test_inputs_and_exclusions_are_the_callers_choice():
    model = keras.Sequential(
        [keras.Input((8,), name="x"), keras.layers.Dense(4, name="fc"), keras.layers.Dense(2)]
    )
    assert [group.size for group in inspect(model).groups] == [4]
    assert [group.size for group in inspect(model, prune_inputs=True).groups] == [8, 4]
    excluded = inspect(model, exclude=["fc"])
    assert excluded.groups == ()
    assert reasons.EXCLUDED in {frozen.reason for frozen in excluded.frozen}
    with pytest.raises(InvalidArgumentError, match="names no layer"):
        inspect(model, exclude=["fc9"])


def test_gated_model_is_inspected_through_its_own_gates():
    x = keras.Input((8,), name="x")
    hidden = keras.layers.Dense(4, name="fc")(x)
    model = keras.Model(x, keras.layers.Dense(2, name="out")(NeuronGate(name="gate")(hidden)))
    inspection = inspect(model)
    assert [group.name for group in inspection.groups] == ["fc"]
    assert inspection.params == 8 * 4 + 4 + 4 * 2 + 2
    with pytest.raises(UnsupportedModelError, match="already has gates"):
        inspect(model, prune_inputs=True)


def test_text_and_html_show_groups_and_reasons():
    inspection = inspect(residual())
    for shown in [str(inspection), inspection._repr_html_()]:
        assert "stem, branch" in shown
        assert reasons.CROSS_CHANNEL_ACTIVATION in shown
        assert f"{inspection.params:,} parameters" in shown


@pytest.mark.parametrize("width", [80, 200])
def test_tables_are_no_wider_than_the_terminal_and_names_stay_whole(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    x = keras.Input((4, 4, 2), name="a_rather_long_name_of_an_input")
    y = keras.layers.Conv2D(2, 1, name="stage1_block1_b_conv")(x)
    for k in range(3):
        branch = keras.layers.Conv2D(2, 1, name=f"stage1_block{k + 2}_b_conv")(y)
        y = keras.layers.Add()([y, branch])
    model = keras.Model(x, keras.layers.Dense(2)(keras.layers.Flatten()(y)))
    text = str(inspect(model))
    assert max(map(len, text.splitlines())) <= width
    for k in range(4):
        assert f"│ stage1_block{k + 1}_b_conv " in text


def test_remedies_say_what_would_unfreeze_channels():
    x = keras.Input((6,), name="x")
    y = keras.layers.Dense(4, name="left_out")(x)
    y = kp.keep_opaque(keras.layers.Lambda(lambda v: v, name="mine"))(
        keras.layers.Dense(5, name="odd")(y)
    )
    model = keras.Model(x, keras.layers.Dense(2, name="head")(y))
    inspection = inspect(model, exclude=["left_out"])
    remedies = {frozen.layer: frozen.remedy for frozen in inspection.frozen}
    assert "exclude" in remedies["left_out"]
    assert "register_channel_rule" in remedies["odd"]
    assert remedies["head"] is None
    text = " ".join(str(inspection).split())
    assert "What would unfreeze them: excluded by the caller: leave the layer out" in text
    only_head = inspect(keras.Model(x, keras.layers.Dense(2)(keras.layers.Dense(3)(x))))
    assert "unfreeze" not in str(only_head)


def test_every_reason_has_a_remedy_or_is_final():
    texts = {getattr(reasons, name) for name in reasons.__all__ if name.isupper()}
    final = {reasons.MODEL_OUTPUT, reasons.ONLY_NEURON, reasons.NOT_READ}
    assert {text for text in texts if reasons.remedy(text) is None} == final


def test_groups_that_decide_about_a_residual_branch_are_marked():
    x = keras.Input((6,), name="x")
    y = keras.layers.Dense(5, name="stem")(x)
    branch = keras.layers.Dense(4, activation="relu", name="inner")(y)
    y = keras.layers.Add()([y, keras.layers.Dense(5, name="outer")(branch)])
    model = keras.Model(x, keras.layers.Dense(2, name="head")(y))
    inspection = inspect(model)
    stem, inner = inspection.groups
    assert (stem.removable, inner.removable) == (False, True)
    assert inner.params_saved * inspection.params == pytest.approx(5 * 4 + 4 + 4 * 5 + 5)
    assert f"{100 * inner.params_saved:.1f} % *" in str(inspection)
    assert "residual branch goes as a whole" in " ".join(str(inspection).split())
    assert inspection.least_params * inspection.params == pytest.approx(6 + 1 + 2 + 2)


def test_parts_of_a_layer_are_told_apart():
    x = keras.Input((6,), name="x")
    a, b = keras.ops.split(keras.layers.Dense(8, name="wide")(x), 2, axis=-1)
    y = [keras.layers.Dense(2, name=name)(part) for name, part in (("p", a), ("q", b))]
    assert "wide:2" in str(inspect(keras.Model(x, y)))


def test_long_lists_of_layers_are_cut_in_the_table_only():
    x = keras.Input((4, 4, 2))
    y = keras.layers.Conv2D(2, 1, name="c0")(x)
    for i in range(6):
        y = keras.layers.Add()([y, keras.layers.Conv2D(2, 1, name=f"c{i + 1}")(y)])
    model = keras.Model(x, keras.layers.Dense(2)(keras.layers.Flatten()(y)))
    inspection = inspect(model)
    assert len(inspection.groups[0].producers) == 7
    assert "c0, c1, c2 and 4 more" in " ".join(str(inspection).split())


def test_model_without_prunable_neurons_shows_only_reasons():
    model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2, name="out")])
    text = str(inspect(model))
    assert "0 neurons can be pruned" in text
    assert "Neurons that can be pruned" not in text
    assert np.isclose(inspect(model).least_macs, 1.0)


def test_the_latency_is_shown_with_what_it_is_of():
    inputs = keras.Input((8,), name="x")
    net = keras.Model(
        inputs, keras.layers.Dense(4, name="logits")(keras.layers.Dense(16, name="fc")(inputs))
    )
    calls = [call for call in analyze(net).graph.calls if call.path in ("fc", "logits")]
    rows = {layer_signature(call): LayerTimes(constant=2.0) for call in calls}
    table = LatencyTable("a processor", rows, of="int8", overhead=0.5)
    inspection = inspect(net, latency_table=table)
    assert (inspection.latency, inspection.latency_of) == (4.5, "int8")
    assert "int8 file takes 4.5 microseconds on a processor" in " ".join(str(inspection).split())
    assert (
        inspect(kp.PrunableModel(net, kp.Budget(latency=1.0), latency_table=table)).latency == 4.5
    )
    assert inspect(net).latency is None


class WithMaskToken(keras.layers.Layer):
    """Has a weight that only pre-training reads."""

    def build(self, shape):
        self.mask_token = self.add_weight(shape=(1, shape[-1]), name="mask_token")
        self.inner = keras.layers.Dense(shape[-1], name="inner")
        self.inner.build(shape)
        self.built = True

    def call(self, x, masked=False):
        return self.inner(x + self.mask_token if masked else x)


def test_weights_that_no_call_reads_are_listed_and_not_counted():
    x = keras.Input((6,), name="x")
    y = WithMaskToken(name="tokens")(keras.layers.Dense(5, name="stem")(x))
    model = keras.Model(x, keras.layers.Dense(2, name="head")(y))
    inspection = inspect(model)
    assert inspection.unread == (("tokens/mask_token", 5),)
    assert inspection.params == model.count_params() - 5
    assert "no call reads" in str(inspection)
    assert "tokens/mask_token (5)" in " ".join(str(inspection).split())
    reading = keras.Model(x, keras.layers.Dense(2)(WithMaskToken(name="read")(x, masked=True)))
    assert inspect(reading).unread == ()
    assert inspect(reading).params == reading.count_params()
