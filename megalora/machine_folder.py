"""Keep small files on this machine, where no other user can change them."""

import os
import stat
import tempfile
from pathlib import Path


def folder_of_this_machine() -> Path | None:
    """A folder among the temporary files that is this user's alone; None where there can be none.

    Who may write to it decides what this user's runs believe: a folder of somebody else under that
    name is left alone.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"megalora-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        # Of the name itself, which may be a link to anywhere.
        found = folder.lstat()
    except OSError:
        return None
    # A folder of root's or a stranger's, or one that a group shares, decides nothing here.
    others_may_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if is_own and not others_may_write else None
