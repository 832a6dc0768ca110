"""Lines about long epochs in a log."""

from types import SimpleNamespace

from tf_kfacprune.cli.step_lines import StepLines


def test_long_epochs_are_told_of_with_steps_done_before_a_resume(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines = StepLines(SimpleNamespace(start=100, steps=938), seconds=60)
    lines.set_params({"epochs": 30})
    lines.on_epoch_begin(2)
    for batch in range(5):
        now[0] += 25.0
        lines.on_train_batch_end(batch, {"loss": 0.123456, "macs": 1.0})
    assert capsys.readouterr().out == "Epoch 3/30, step 103/938 - loss: 0.1235 - macs: 1\n"
