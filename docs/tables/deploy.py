"""Sizes, times and accuracy of exported files."""

from tables.markdown import newest, table, training_of

FORMATS = (None, "float16", "dynamic", "int8", "int16x8")
FORMAT_NAMES = [name or "float32" for name in FORMATS]


def latency_records():
    """Network -> rows of the latency benchmark, by (model, format, threads)."""
    records = newest("deploy_latency.jsonl", lambda record: record["key"]["network"])
    return {
        network: {(row["model"], row["quantization"], row["threads"]): row for row in found["rows"]}
        for network, found in records.items()
    }


def sizes_table():
    """Bytes of every file that the latency benchmark wrote."""
    rows = []
    for network, files in latency_records().items():
        for (model, name, threads), small in files.items():
            if model == "compact" and threads == 1:
                dense = files.get(("dense", name, 1))
                sizes = [small["size"]["raw"], small["size"]["gzip"], small["activations"]]
                sizes = [dense["size"]["raw"] if dense else None, *sizes]
                shown = ["-" if size is None else f"{size:,}" for size in sizes]
                rows.append([network, name or "float32", *shown])
    return table(["network", "format", "dense", "compact", "compact, gzip", "activations"], rows)


def times_table():
    """Time of every compact file, relative to the dense float32 file."""
    rows = []
    for network, files in latency_records().items():
        for threads in sorted({threads for _, _, threads in files}):
            dense = files["dense", None, threads]
            small = [files.get(("compact", name, threads)) for name in FORMATS]
            rows.append(
                [
                    network,
                    threads,
                    f"{dense['microseconds']:,.0f}",
                    f"{small[0]['macs_ratio']:.3f}",
                    *(f"{row['ratio']:.3f}" if row else "-" for row in small),
                    f"{small[0]['time_per_macs']:.1f}",
                ]
            )
    header = ["network", "threads", "dense us", "MACs", *FORMAT_NAMES]
    return table([*header, "float32: time / MACs"], rows)


def accuracy_table():
    """Accuracy of every file on the test images, beside that of the Keras model."""
    rows = []
    records = newest("deploy_networks.jsonl", lambda record: record["key"]["network"])
    for network, record in records.items():
        shown = []
        for name in FORMAT_NAMES:
            found = record["formats"].get(name)
            points = 100 * (found["accuracy"] - record["keras_accuracy"]) if found else None
            shown.append(f"{points:+.2f}" if found else "failed")
        accuracy = f"{100 * record['keras_accuracy']:.2f} %"
        rows.append(
            [network, training_of(record["key"]), f"{record['weights']:,}", accuracy, *shown]
        )
    return table(["network", "epochs x images", "weights", "Keras", *FORMAT_NAMES], rows)


def applications_table():
    """How closely files of compact models of keras.applications follow the Keras model."""
    records = newest(
        "deploy_applications.jsonl", lambda r: (r["key"]["model"], r["key"]["quantization"])
    )
    rows = []
    for model in sorted({model for model, _ in records}):
        cells = []
        for name in (None, "int8"):
            found = records.get((model, name))
            if found is None:
                cells += ["not run", ""]
            elif found["agrees"]:
                cells += [f"{found['rms_error']:.1e}", f"{found['bytes'] / 1e6:.1f} MB"]
            else:
                cells += [found["message"].split("\n")[0].replace("|", "\\|"), ""]
        params = next(records[key]["compact_params"] for key in records if key[0] == model)
        rows.append([f"`{model}`", f"{params / 1e6:.1f}M", *cells])
    header = ["compact model", "params", "float32: error", "float32", "int8: error", "int8"]
    return table(header, rows)
