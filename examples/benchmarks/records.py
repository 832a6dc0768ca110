"""Lines of finished runs, so that a long sweep survives being cut off."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


class Records:
    """A file of JSON lines that knows which runs are in it.

    Args:
        name: Name of the file.
        folder: Where it lies; by default `results/` beside the benchmarks.
    """

    def __init__(self, name, folder=None):
        self.path = Path(folder or RESULTS) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = [json.loads(line) for line in lines]

    def __contains__(self, key):
        return self.get(key) is not None

    def get(self, key):
        """The line of a run, or None."""
        return next((line for line in self.lines if line["key"] == key), None)

    def add(self, key, values):
        """Appends one line, shows it and returns it."""
        self.lines.append({"key": key, **values})
        text = json.dumps(self.lines[-1])
        with self.path.open("a") as stream:
            stream.write(text + "\n")
        print(text, flush=True)
        return self.lines[-1]
