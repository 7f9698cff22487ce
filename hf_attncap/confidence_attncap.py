"""The calibrated confidence of a caption, computed from the signals of its decoding. Needs neither torch nor transformers."""

from typing import Any

import numpy as np

# The inputs of the confidence, as `generate_captions` defines them.
SIGNALS = ("score", "lowest", "entropy")


def estimate_confidence(calibration: dict[str, Any], signals: dict[str, Any]) -> Any:
    """The probability that captions are good.

    Args:
        calibration: `AttnCapConfig.confidence`.
        signals: "score", "lowest" and "entropy", each a number or an array (I).

    Returns:
        A number from 0 to 1, or an array (I).
    """
    weights = calibration["weights"]
    logit = calibration["bias"] + sum(weights[name] * np.asarray(signals[name], np.float64) for name in SIGNALS if name in weights)
    return 0.5 * (1 + np.tanh(0.5 * logit))  # the logistic function in a form that cannot overflow


__all__ = ["SIGNALS", "estimate_confidence"]
