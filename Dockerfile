# The worker, small and without root: docker run … aioworker consume
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
# The system's certificates in place of pip's own: a company's proxy is trusted there.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt
RUN python -m venv /opt/aioworker
COPY constraints.txt constraints-build.txt ./
RUN pip install --require-hashes -r constraints-build.txt \
 && /opt/aioworker/bin/pip install --require-hashes -r constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY aioworker ./aioworker
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
 && /opt/aioworker/bin/pip install --no-deps /dist/*.whl \
 && /opt/aioworker/bin/pip uninstall --yes pip

FROM python:${PYTHON}-slim
COPY --from=build /opt/aioworker /opt/aioworker
ENV PATH=/opt/aioworker/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
# Root's: nobody else can put a module or a .env there, which commands would read.
WORKDIR /app
# SIGTERM, Docker's own, lets the running chunk finish: give it longer than the 10 s default,
# docker stop --time 45, as AIOWORKER_SHUTDOWN_TIMEOUT is 40 s.
ENTRYPOINT ["aioworker"]
CMD ["consume"]
