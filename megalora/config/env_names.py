"""Say which environment variables a config may read, as ``${oc.env:NAME}``.

What it reads is written down in every checkpoint's state and in the run's ``config.yaml``, and is
uploaded with them: a token would go with it.
"""

import os
import re

from omegaconf import OmegaConf

_ALLOWED = re.compile(
    r"HOME|USER|LOGNAME|HOSTNAME|PWD|TMPDIR|SCRATCH|WORK|WORKDIR|STORE|DATA|PROJECT"
    r"|(HF|XDG|SLURM|PBS|WANDB|MLFLOW|MEGALORA)_[A-Z0-9_]+"
    r"|[A-Z0-9_]+_(DIR|HOME|ROOT|PATH|FOLDER|DATA|CACHE|SCRATCH|NAME|ID)"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE|JWT|URI|URL")


def read_variable(name: str, *default: str | None) -> str | None:
    """The value of an environment variable, for OmegaConf's ``oc.env``.

    Raises:
        ValueError: its name may be that of a secret, or there is none and no default.
    """
    if not _ALLOWED.fullmatch(name) or _SECRET.search(name):
        raise ValueError(
            f"the variable {name[:60]!r} is not read: configs are kept with every checkpoint, and"
            " may name variables that say where or who (HOME, USER, HF_HOME, SLURM_JOB_ID,"
            " MY_DATA_DIR), and no secret; name it so, or give the value as an override"
        )
    if name in os.environ:
        return os.environ[name]
    if default:
        return default[0]
    raise ValueError(f"there is no environment variable {name}; set it, or give a default")


# By the resolver, not by the text: a name may be put together from other options.
OmegaConf.register_new_resolver("oc.env", read_variable, replace=True)
