"""`push_to_hub`: upload checkpoints to the Hugging Face Hub, with the code that loads them."""

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
from ..processes import run_on_main_rank

logger = logging.getLogger(__name__)


class HubSharing(TrainerCallback):
    """Exports checkpoints with `export_to_hub` and uploads them according to `hub_strategy`, and the captioner after training.

    Replaces the Trainer's own uploads, which contain the whole output folder (logs, samples, other files) but not the code of the
    model. The `README.md` of the output folder is uploaded too. The strategies `checkpoint` and `all_checkpoints` also upload the
    files for resuming. Uploads run in the background during training; if one fails, a warning is logged.

    Args:
        args: switches off the Trainer's own uploads in it, and removes the token, which the Trainer would save.

    Raises:
        SettingError: on all processes, if there is no token, or if the repository cannot be found or created.
    """

    def __init__(self, args: CaptionTrainingArguments):
        self.output = Path(str(args.output_dir))
        self.strategy, self.revision, self.always = HubStrategy(args.hub_strategy), args.hub_revision, args.hub_always_push
        self.api = HfApi(token=args.hub_token)
        name = args.hub_model_id or self.output.absolute().name

        def create() -> str:
            if not (args.hub_token or get_token()):
                raise SettingError("`push_to_hub` needs a Hub token with write access: run `hf auth login`, or set HF_TOKEN.")
            try:
                return self.api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
            except Exception as error:  # wrong names, missing rights and networks raise many kinds
                raise SettingError(
                    f"`push_to_hub`: cannot create repository {name} (`--hub_model_id`): {_one_line(error)}"
                ) from error

        self.repo: str = run_on_main_rank(create)
        self.running: Future | None = None
        args.push_to_hub, args.hub_token = False, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        busy = self.running is not None and not self.running.done()
        if not state.is_world_process_zero or self.strategy == HubStrategy.END or (busy and not self.always):
            return
        try:
            checkpoint = self.output / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            folders = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
            message = f"Training in progress, step {state.global_step}"
            self.running = self._upload(checkpoint, message, folders.get(self.strategy))
            self.running.add_done_callback(self._check)
        except Exception as error:  # disks and networks raise many kinds
            self._warn(error)

    def finish(self) -> None:
        """Upload the captioner in the output folder, after the uploads that are still running.

        Raises:
            SettingError: on all processes, if that fails.
        """

        def upload() -> None:
            try:
                self._upload(self.output, "End of training").result()
            except Exception as error:  # disks and networks raise many kinds
                raise SettingError(
                    f"`push_to_hub`: the captioner is saved in {self.output}, but could not be uploaded to {self.repo}: "
                    f"{_one_line(error)} Try again: `attncap export-hub {self.output} FOLDER`, then `hf upload {self.repo} FOLDER`."
                ) from error

        run_on_main_rank(upload)

    def _upload(self, saved: Path, message: str, resumable: str | None = None) -> Future:
        """Start the upload of a copy, because the Trainer may remove the checkpoint meanwhile.

        `resumable` is the folder of the repository for the files to resume from; None: they are not uploaded.
        """
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

    def _check(self, future: Future) -> None:
        if error := future.exception():
            self._warn(error)

    def _warn(self, error: BaseException) -> None:
        logger.warning("push_to_hub: an upload to %s failed; training continues: %s", self.repo, _one_line(error))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
