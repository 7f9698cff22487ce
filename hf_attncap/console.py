"""What the commands of `attncap` share: messages on stderr and folders for their files."""

import os
import re
import sys
from pathlib import Path


def print_error(error: Exception | str, file: str = "") -> None:
    """Prints one line on stderr. `file` is a path in it that may have line breaks."""
    text = str(error)
    text = text.replace(file, escape_path(file)) if file else text
    print("attncap:", re.sub(r"\s*[\r\n]\s*", " ", text), file=sys.stderr)


def escape_path(file: str) -> str:
    """A path without line breaks and tabs."""
    return file.translate({ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"})


def make_folder(folder: Path, option: str) -> None:
    """Creates the folder of an option; raises an OSError if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be created as a folder ({error.strerror}); give another {option}") from error
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} is a folder without write permission; give another {option}")


def silence_libraries() -> None:
    """Turns off progress bars and hints of transformers and huggingface_hub: stderr is for errors."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
