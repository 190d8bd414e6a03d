"""Runnable examples: ``python -m fastsvi.examples.<name>``, each with ``--help``.

``python -m fastsvi.examples`` lists them. The tests run every one.
"""

EXAMPLES = {
    "breast_cancer": "which measurements tell malignant tumours from benign, and how surely",
    "eight_schools": "partial pooling of eight small studies, written centred and non-centred",
    "kidney_stones": "conditioning or intervening: the two answers to which treatment is better",
    "weighing_scale": "a guide written by hand, a loop of svi.step, and the exact answer beside it",
}
