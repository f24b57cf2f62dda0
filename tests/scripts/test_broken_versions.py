"""The issue that the weekly job opens says which versions changed and which tests failed."""

from script_modules import load_script

broken_versions = load_script("broken_versions")
LOCKED = "# comment\ntorch==2.13.0\nPyYAML==6.0.3\nshimmy==2.0.0\nsame_one==1.0\n"
INSTALLED = "torch==2.14.1+cpu\npyyaml==6.0.4\nsame-one==1.0\nnew==1.0\n"


def test_changed_versions_and_failed_tests_are_listed():
    output = (
        "....\nFAILED tests/a.py::test_x - assert 1 == 2\nFAILED tests/a.py::test_x - assert 1 == 2\nERROR tests/b.py\n"
    )
    text = broken_versions.describe(LOCKED, INSTALLED, output)
    assert "| torch | 2.13.0 | 2.14.1 |" in text
    assert "| pyyaml | 6.0.3 | 6.0.4 |" in text
    assert "same" not in text
    assert "shimmy" not in text
    assert text.count("tests/a.py::test_x") == 1
    assert "ERROR tests/b.py" in text


def test_without_a_failed_test_the_end_of_the_output_is_shown():
    text = broken_versions.describe(LOCKED, INSTALLED, "\n".join(f"line {i}" for i in range(100)))
    assert "No test failed" in text
    assert "line 99" in text
    assert "line 59" not in text
