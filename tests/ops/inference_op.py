"""The tests of an op that names its SPEC and has no gradient: `from tests.ops.inference_op import *`."""

from tests.ops.common import (  # noqa: F401 - pytest finds them here
    test_dtypes_and_shapes,
    test_inputs_are_not_written,
    test_opcheck,
    test_other_sequences_do_not_matter,
    test_parity,
    test_reference_is_the_formula,
    test_reruns_are_bitwise_equal,
    test_strided_inputs,
)
