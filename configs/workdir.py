"""The config of a run that exists, to continue it or to add stages to it.

    python main.py --config=configs/workdir.py:runs/imported --workdir=runs/imported \
        --config.data.path=PATH --config.progressive.num_updates=50000

What a finished stage was trained with cannot be changed; the stages that have not begun can.
"""

from typing import Any

from ml_collections import ConfigDict

from diffdistill import workdir
from diffdistill.config import default_config, to_dict


def get_config(folder: str = "") -> Any:
    """The settings in the config.json of the workdir `folder`."""
    if not folder:
        raise ValueError("configs/workdir.py needs the folder of a run: --config=configs/workdir.py:FOLDER.")
    config = default_config()
    config.unlock()
    config.update(ConfigDict(_tuples(to_dict(workdir.read_alone(folder).config))))
    config.lock()
    return config


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: _tuples(each) for name, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
