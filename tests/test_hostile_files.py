"""Hostile files are refused or stored, and never executed or shown; ``python -m tests.hostile_files`` sends more."""

from pathlib import Path

import pytest

from flockapi import create_app
from tests.hostile_files import attack, flock_of_files, trap
from tests.support.http import client_of

pytestmark = pytest.mark.anyio


@pytest.mark.slow
async def test_no_hostile_file_is_executed_or_shown(tmp_path: Path) -> None:
    app = create_app(flock_of_files(), store=tmp_path / "runs.db", auth="host")
    with trap() as (port, mark):
        async with app.lifespan(), client_of(app) as client:
            outcomes = await attack(client, 120, port, mark, seed=1)
    assert outcomes["shown as an image"] > 3
    assert outcomes["only downloaded"] > 10
    assert outcomes["422"] > 10
