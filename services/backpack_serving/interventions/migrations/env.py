"""Alembic's entry point; `schema.migrate` gives it a connection."""

from alembic import context

from backpack_serving.interventions.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
