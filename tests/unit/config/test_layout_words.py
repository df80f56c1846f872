from megatron_rpp.config.layout_words import by_keys, in_short
from megatron_rpp.config.schema import ParallelConfig


def test_context_parallelism_is_named_where_there_is_any() -> None:
    without, there = ParallelConfig(tensor=2, data=4), ParallelConfig(tensor=2, context=2, data=4)
    assert by_keys(without) == "parallel.tensor=2 x parallel.pipeline=1 x parallel.data=4"
    assert by_keys(there) == "parallel.tensor=2 x parallel.pipeline=1 x parallel.context=2 x parallel.data=4"
    assert by_keys(there, "expert", "context") == "parallel.expert=1 x parallel.context=2"
    assert (in_short(without), in_short(there)) == ("TP 2 x PP 1 x DP 4", "TP 2 x PP 1 x CP 2 x DP 4")
