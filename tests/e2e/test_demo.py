"""What `backpack run` shows: two example tenants, each with what its live release does."""

from __future__ import annotations

from pathlib import Path

from backpack_serving import embedded
from backpack_serving.auth.keys import read_key_file
from backpack_serving.cli import demo
from backpack_serving.cli.client import out
from backpack_serving.client import AsyncSteering
from backpack_serving.settings import Settings

from tests.e2e.conftest import ANYWHERE


async def _shown(serving: embedded.Embedded) -> str:
    with out.capture() as captured:
        await demo.side_by_side(serving)
    return " ".join(captured.get().split())


async def test_the_table_says_what_a_live_release_does_and_not_what_it_did(tmp_path: Path) -> None:
    async with embedded.run(Settings(state=tmp_path, **ANYWHERE)) as serving:
        await demo.provide(serving)
        shown = await _shown(serving)
        assert "harbour: “horse” has" in shown
        assert "clinic: “horse” has" in shown
        key = read_key_file(serving.settings.key_file("harbour"))
        async with AsyncSteering(serving.interventions, key) as steering:
            moved = await steering.rollback()
            await steering.until_held(wait="all")
        assert moved.channel.release == 0
        await demo.provide(serving)
        shown = await _shown(serving)
        assert "harbour: the model unpatched" in shown
        assert "clinic: “horse” has" in shown
