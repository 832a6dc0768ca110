"""The command line: `kfacprune train | inspect | compact | export | evaluate`."""

from tf_kfacprune.cli.main import run

__all__ = ["run"]
