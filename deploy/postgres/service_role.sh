#!/bin/sh
# Run by the postgres image when it makes the database: the role that the intervention service uses. It owns nothing;
# `backpack database migrate --role backpack` gives it what it needs.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
  --set password="$(cat /run/secrets/database_service_password)" <<'SQL'
CREATE ROLE backpack LOGIN PASSWORD :'password';
SQL
