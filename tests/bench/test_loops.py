from bench import loops


def test_lines_of_the_table():
    times = {"floor": [(8.0, 1.0)], "ours": [(10.0, 2.0)], "DataLoader, 0 workers": [(20.0, 5.0)]}
    head, _, *lines, end = loops.rows("model", times)
    assert head == f"| model | {' | '.join(loops.COLUMNS)} |"
    assert end == ""
    assert [line.split("|")[2:-1] for line in lines] == [
        [" 8 (8 to 8) ", *["  "] * 6],
        [" 10 (10 to 10) ", " 0.2 (0.2 to 0.2) ", " 1 (1 to 1) ", " 0.1 (0.1 to 0.1) ", " 1 (1 to 1) ", " 1 ", " 1 "],
        [" 20 (20 to 20) ", " 0.6 (0.6 to 0.6) ", " 4 (4 to 4) ", " 0.2 (0.2 to 0.2) ", " 2 (2 to 2) ", " 6 ", " 4 "],
    ]


def test_the_medians_are_of_rounds():
    times = {"floor": [(8.0, 1.0), (6.0, 1.5)], "ours": [(9.0, 0.5), (8.0, 1.5)], "DataLoader": [(12.0, 3.0)] * 2}
    *_, ours, peer, _ = loops.rows("model", times)
    assert ours.split("|")[4] == " -0.25 (-0.5 to 0) "
    assert peer.split("|")[7:-1] == [" 3.33 ", " ours is not above the floor's "]  # (4 + 6) / (1 + 2)
