"""`push_to_hub`: the captioner on the Hugging Face Hub as its users expect it, with the code that loads it."""

import logging
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from hf_attncap.hub import export_to_hub

from ..arguments import CaptionTrainingArguments, SettingError
from ..processes import on_main_process

logger = logging.getLogger(__name__)


class HubSharing(TrainerCallback):
    """Uploads what `export_to_hub` makes of checkpoints, as `hub_strategy` says, and of the captioner at the end.

    It takes the place of the Trainer's own uploads, which are of the whole output folder: without code, but with logs, samples and
    whatever else lies there. A `README.md` in the output folder goes along; with the strategies `checkpoint` and
    `all_checkpoints` so does what training can be resumed from. An upload while training goes on runs beside it, and if it
    fails there is a warning.

    Args:
        args: as parsed; the Trainer's own uploads are switched off in it, and the token is taken out, which the Trainer would save.

    Raises:
        SettingError: on all processes, if nobody is logged in or the repository can neither be found nor made.
    """

    def __init__(self, args: CaptionTrainingArguments):
        self.output = Path(str(args.output_dir))
        self.strategy, self.revision, self.always = HubStrategy(args.hub_strategy), args.hub_revision, args.hub_always_push
        self.api = HfApi(token=args.hub_token)
        name = args.hub_model_id or self.output.absolute().name

        def make() -> str:
            if not (args.hub_token or get_token()):
                raise SettingError("`push_to_hub` needs a token that may write to the Hub: `hf auth login`, or set HF_TOKEN.")
            try:
                return self.api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
            except Exception as error:  # of many kinds: names, rights, networks
                raise SettingError(f"`push_to_hub`: no repository {name} to push to (`--hub_model_id`): {_said(error)}") from error

        self.repo: str = on_main_process(make)
        self.running: Future | None = None
        args.push_to_hub, args.hub_token = False, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        busy = self.running is not None and not self.running.done()
        if not state.is_world_process_zero or self.strategy == HubStrategy.END or (busy and not self.always):
            return
        try:
            checkpoint = self.output / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.running = self._upload(checkpoint, f"Training in progress, step {state.global_step}", self._resumable(checkpoint))
            self.running.add_done_callback(self._warn)
        except Exception as error:  # of many kinds: disks, networks
            self._warn_of(error)

    def finish(self) -> None:
        """Uploads the captioner that the run saved in its output folder, behind what is still on its way.

        Raises:
            SettingError: on all processes, if that fails.
        """

        def upload() -> None:
            try:
                self._upload(self.output, "End of training").result()
            except Exception as error:  # of many kinds: disks, networks
                raise SettingError(
                    f"`push_to_hub`: the captioner is saved in {self.output}, but could not be uploaded to {self.repo}: "
                    f"{_said(error)} Try again: `attncap export-hub {self.output} FOLDER`, then `hf upload {self.repo} FOLDER`."
                ) from error

        on_main_process(upload)

    def _resumable(self, checkpoint: Path) -> str | None:
        """Where in the repository the whole checkpoint goes."""
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        return names.get(self.strategy)

    def _upload(self, saved: Path, message: str, resumable: str | None = None) -> Future:
        """Begins the upload, of a copy: checkpoints are removed when newer ones come."""
        scratch = tempfile.TemporaryDirectory(prefix="attncap-hub-")
        try:
            folder = export_to_hub(saved, Path(scratch.name) / "export")
            if (self.output / "README.md").is_file():
                shutil.copyfile(self.output / "README.md", folder / "README.md")
            if resumable:
                shutil.copytree(saved, folder / resumable)
            future: Future = self.api.upload_folder(
                repo_id=self.repo, folder_path=folder, commit_message=message, revision=self.revision, run_as_future=True
            )
        except BaseException:
            scratch.cleanup()
            raise
        future.add_done_callback(lambda _: scratch.cleanup())
        return future

    def _warn(self, future: Future) -> None:
        error = future.exception()
        if error:
            self._warn_of(error)

    def _warn_of(self, error: BaseException) -> None:
        logger.warning("push_to_hub: an upload to %s failed, training goes on: %s", self.repo, _said(error))


def _said(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
