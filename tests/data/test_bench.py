"""The benchmark's command line; what it times is measured by hand."""

from __future__ import annotations

import pytest

from fbitrain.data.commands.bench import PARTS, parser


def test_the_parts_to_run_are_named() -> None:
    parse = parser().parse_intermixed_args
    assert parse(["c.yaml"]).only == ["text", "tokens", "startup"]
    assert parse(["c.yaml", "--only", ",".join(PARTS)]).only == list(PARTS)


@pytest.mark.parametrize("names", ["nonsense", "text,", ""])
def test_what_is_no_part_is_refused(names: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parser().parse_intermixed_args(["c.yaml", "--only", names])
    assert exit_.value.code == 2
    assert "is no part; the parts are text, tokens, startup, memory" in capsys.readouterr().err
