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
        return any(line["key"] == key for line in self.lines)

    def add(self, key, values):
        """Appends one line and shows it."""
        self.lines.append({"key": key, **values})
        line = json.dumps(self.lines[-1])
        with self.path.open("a") as stream:
            stream.write(line + "\n")
        print(line, flush=True)
