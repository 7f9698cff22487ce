"""Early stopping that a resumed run goes on with where it was."""

from typing import Any

from transformers import EarlyStoppingCallback


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, whose count of evaluations in vain is taken from the checkpoint, and its patience from the settings.

    (`restore_callback_states_from_checkpoint` restores both, so that nobody could become more patient.)
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        # A checkpoint of a run that did not stop early knows nothing of this one, and the Trainer could not save it then.
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience
