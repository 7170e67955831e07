# PostgreSQL and Prometheus from Debian, for test_containers.py where the real images can't be pulled.

FROM python:3.11-slim-bookworm AS postgres
RUN apt-get update && apt-get install -y --no-install-recommends postgresql-15=15.* && rm -rf /var/lib/apt/lists/*
ENV PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/var/lib/postgresql/data
RUN mkdir -p "$PGDATA" && chown postgres "$PGDATA"
COPY tests/deploy/standin_postgres.sh /usr/local/bin/entrypoint
USER postgres
ENTRYPOINT ["entrypoint"]

FROM python:3.11-slim-bookworm AS prometheus
RUN apt-get update && apt-get install -y --no-install-recommends prometheus=2.42.* && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /prometheus && chown prometheus /prometheus
USER prometheus
ENTRYPOINT ["prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
