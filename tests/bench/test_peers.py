"""Tables of the benchmarks."""

from levin.bench.peers import print_table, without_stalls


def test_a_round_that_was_hit_by_a_stall_is_counted_and_left_out(capsys):
    rates = {"peer": [100.0, 110.0, 90.0, 100.0, 30.0], "levin": [200.0, 205.0, 60.0, 210.0, 190.0]}
    assert without_stalls(rates) == {"peer": [100.0, 110.0, 100.0], "levin": [200.0, 205.0, 210.0]}
    print_table(rates, "peer", "env steps/s")
    table = capsys.readouterr().out
    assert "medians of 3 rounds, interleaved; 2 more were hit by a stall" in table
    assert without_stalls({"peer": [100.0, 100.0, 10.0], "levin": [10.0, 100.0, 100.0]})["peer"] == [100.0]
    never = {"a": [10.0, 100.0, 100.0], "b": [100.0, 10.0, 100.0], "c": [100.0, 100.0, 10.0]}
    assert without_stalls(never) == never
    assert "2.00 x peer (1.86 to 2.10)" in table
