"""How sure a captioner may be of a caption: from the signals of beam search to a calibrated probability."""

from typing import Any

import numpy as np

from .configuration_attncap import SIGNALS


def estimate_confidence(calibration: dict[str, Any], signals: dict[str, Any]) -> Any:
    """The probability that captions are good ones.

    Args:
        calibration: `AttnCapConfig.confidence`.
        signals: a number or an array (I) for each of "score", "lowest" and "entropy".

    Returns:
        A number from 0 to 1, or an array (I) of them.
    """
    weights = calibration["weights"]
    logit = calibration["bias"] + sum(weights[name] * np.asarray(signals[name], np.float64) for name in SIGNALS if name in weights)
    return 0.5 * (1 + np.tanh(0.5 * logit))  # the logistic function, which cannot overflow this way
