"""The tests of an op that names its SPEC: `from tests.ops.every_op import *`, and del what is not about that op."""

from tests.ops.gradients import (  # noqa: F401 - pytest finds them here
    test_a_backward_op_is_not_differentiated_itself,
    test_gradcheck,
    test_gradients,
    test_gradients_are_bitwise_the_same_again,
    test_gradients_of_strided_tensors,
    test_gradients_share_no_memory,
    test_no_tokens_no_gradient,
    test_only_what_is_needed_is_returned,
    test_opcheck_of_gradients,
    test_opcheck_of_the_backward,
    test_other_sequences_get_no_gradient,
    test_reference_gradients_are_the_formulas,
    test_second_derivatives,
)
from tests.ops.inference_op import *  # noqa: F403 - its tests are this module's
