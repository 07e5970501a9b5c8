import numpy as np

from runtime.verification.tally import OutputTally


def test_a_scalar_is_that_of_all_examples():
    tally = OutputTally("aux_loss")
    two, three, four = (np.array(value, np.float32) for value in (2, 3, 4))
    tally.add(two, three, np.array([True, True]))
    tally.add(four, two, np.array([True, False]))  # what flipped in one example is in it
    tally.add_forced(four, three)
    report = tally.report()
    assert (report.examples, report.max_abs, report.max_rel, report.forced_max_rel) == (1, 1.0, 0.5, 0.25)
    assert report.kl is report.top1_agreement is None
