"""Preference trees and the rows made of them, written out."""

import pytest
from datasets import Dataset

from trl_ift.data import cross_turn_pairs, tree_to_pairs, tree_to_sft


TREE = {
    "prompt": "problem",
    "tree_id": 7,
    "turns": [
        {"chosen": "right 0", "rejected": "wrong 0", "feedback": "no"},
        {"chosen": "right 1", "rejected": "wrong 1", "feedback": [{"role": "tool", "content": "error"}]},
        {"chosen": "right 2", "rejected": "wrong 2"},
    ],
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def deep_tree(turns):
    rows = [{"chosen": f"right {i}", "rejected": f"wrong {i}", "feedback": "no"} for i in range(turns)]
    return {"prompt": [{"role": "system", "content": "s"}, user("problem")], "turns": rows}


def test_pairs():
    rows = tree_to_pairs(TREE)
    history = [
        user("problem"),
        assistant("wrong 0"),
        user("no"),
        assistant("wrong 1"),
        {"role": "tool", "content": "error"},
    ]
    assert rows == [
        {
            "prompt": history[: 2 * turn + 1],
            "chosen": [assistant(f"right {turn}")],
            "rejected": [assistant(f"wrong {turn}")],
            "turn": turn,
            "tree_id": 7,
        }
        for turn in range(3)
    ]
    assert len(tree_to_pairs(deep_tree(7))) == 5
    assert len(tree_to_pairs(deep_tree(7), max_turns=None)) == 7
    assert "tree_id" not in tree_to_pairs(deep_tree(1))[0]
    assert Dataset.from_list(rows).column_names == ["prompt", "chosen", "rejected", "turn", "tree_id"]


def test_sft():
    rows = tree_to_sft(TREE)
    assert [row["prompt"] for row in rows] == [[user("problem")]] * 3
    assert [row["completion"] for row in rows] == [[assistant(f"right {turn}")] for turn in range(3)]
    again = TREE | {"turns": [*TREE["turns"][:2], TREE["turns"][2] | {"chosen": "right 0"}]}
    assert [row["turn"] for row in tree_to_sft(again)] == [0, 1]
    assert len(tree_to_sft(TREE, max_turns=1)) == 1


def actions(rows):
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def test_cross_turn_pairs():
    rows = cross_turn_pairs(TREE)
    expected = {(f"right {i}", f"wrong {j}") for i in range(3) for j in range(3) if i != j}
    assert set(actions(rows)) == expected
    assert len(rows) == 6
    assert all(row["prompt"] == [user("problem")] and row["tree_id"] == 7 for row in rows)
    assert cross_turn_pairs(TREE) == rows
    assert actions(cross_turn_pairs(TREE, seed=1)) != actions(rows)
    assert cross_turn_pairs(deep_tree(1)) == []
    assert cross_turn_pairs(deep_tree(4)) == []  # 16 > 10
    rows = cross_turn_pairs(deep_tree(8), max_product=None, max_pairs=20)
    assert len(rows) == 20
    for side in (0, 1):
        used = [pair[side] for pair in actions(rows)]
        assert max(map(used.count, used)) <= 3
    assert len(cross_turn_pairs(deep_tree(8), max_product=None)) == 9
    assert len(cross_turn_pairs(deep_tree(4), max_product=None, max_pairs=99, max_uses=1)) <= 4


def test_cross_turn_pairs_of_equal_actions():
    """Actions are compared by what they say."""

    def turns(*pairs):
        return TREE | {"turns": [{"chosen": c, "rejected": r, "feedback": "no"} for c, r in pairs]}

    # A wrong action that is the right one of another turn; two turns with the same right action
    assert set(actions(cross_turn_pairs(turns(("a", "x"), ("b", "a"))))) == {("b", "x")}
    assert actions(cross_turn_pairs(turns(("a", "x"), ("a", "x")))) == []
    assert cross_turn_pairs(turns(("a", "x"), ("a", "y"))) == []  # both are pairs of a turn
    rows = cross_turn_pairs(turns(("a", "x"), ("a", "y"), ("b", "z")))
    assert sorted(actions(rows)) == [("a", "z"), ("b", "x"), ("b", "y")]
    # The same action at five turns is one, and is used so often
    many = turns(*[("a", f"x{i}") for i in range(5)], *[(f"b{i}", f"y{i}") for i in range(5)])
    rows = cross_turn_pairs(many, max_product=None, max_pairs=99, max_uses=3)
    assert [pair[0] for pair in actions(rows)].count("a") == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"turns": ["right"]},
            r"The tree 7, turn 0, must be a mapping with 'chosen' and 'rejected', found 'right' \(str\)",
        ),
        ({"turns": [None]}, r"The tree 7, turn 0, must be a mapping"),
        ({"turns": []}, "The tree 7: 'turns' must be a list of one turn or more"),
        ({"turns": [{"chosen": "a", "rejected": ""}]}, "The tree 7, turn 0, has no 'rejected'"),
        ({"turns": [{"chosen": "a", "rejected": "a"}]}, "turn 0: 'chosen' and 'rejected' are the same"),
        ({"turns": [{"chosen": "a", "rejected": "b"}] * 2}, "turn 0, is followed by another and has no 'feedback'"),
        ({"turns": [{"chosen": "a", "rejected": 3}]}, "turn 0: 'rejected' must be a text or a list of"),
        ({"prompt": []}, "The tree 7: 'prompt' must be a text or a list of"),
    ],
)
def test_wrong_trees(changes, message):
    for function in (tree_to_pairs, tree_to_sft, cross_turn_pairs):
        with pytest.raises((ValueError, TypeError), match=message):
            function(TREE | changes)


def test_wrong_options():
    with pytest.raises(ValueError, match="The tree has no 'prompt'"):
        tree_to_pairs({"turns": []})
    with pytest.raises(ValueError, match="`max_turns=0` is out of range"):
        tree_to_pairs(TREE, max_turns=0)
    with pytest.raises(ValueError, match="`max_uses=0` is out of range"):
        cross_turn_pairs(TREE, max_uses=0)
