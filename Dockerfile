# syntax=docker/dockerfile:1
# The server's image. It builds on any Debian-like Python >= 3.11 base (deploy/build-image.sh builds it without a
# Docker engine); the same BASE_IMAGE is used in every stage because a venv points at the Python that made it.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# -- build: the project's wheel ------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS wheel
# Debian's compiler, for the engine's kernels: the wheel has them for every x86-64 processor and chooses when it runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY serve serve
COPY finetune finetune
COPY loadtests loadtests
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/build/bin/pip wheel --disable-pip-version-check --no-deps --wheel-dir /dist .

# -- dependencies: what serving needs, in a venv, from pyproject.toml alone ------------------------------------------
FROM ${BASE_IMAGE} AS dependencies
# Where torch comes from. Empty: the package index's own build, with CUDA on x86-64 (several GB). The index of CPU
# builds that PyTorch's installation page names makes an image of about 1.4 GB.
ARG TORCH_INDEX_URL=
# Extras of pyproject.toml to install as well, separated by commas: "telemetry" for OpenTelemetry's traces.
ARG EXTRAS=
RUN python3 -m venv /opt/venv
WORKDIR /build
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c "import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [line for name in sys.argv[1].split(',') if name for line in project['optional-dependencies'][name]]; \
print('\n'.join(project['dependencies'] + extras))" "${EXTRAS}" > requirements.txt \
    && grep '^torch==' requirements.txt > torch.txt \
    && /opt/venv/bin/pip install --disable-pip-version-check ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
      -r torch.txt \
    && /opt/venv/bin/pip install --disable-pip-version-check -r requirements.txt

# -- run -----------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS runtime
# The passwd entry is for libraries that ask who they are; everything else refers to the number.
RUN groupadd --gid 10001 flan \
    && useradd --uid 10001 --gid 10001 --home-dir /home/flan --create-home --shell /usr/sbin/nologin flan
# The large layer changes with pyproject.toml only; a change of source is a small layer, so nodes pull little. The wheel
# is copied, not bind-mounted: buildah 1.28 takes a RUN from its cache although what it mounts has changed.
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=wheel /dist /dist
RUN /opt/venv/bin/pip install --disable-pip-version-check --no-cache-dir --no-deps --no-index /dist/*.whl \
    && /opt/venv/bin/pip check --disable-pip-version-check \
    && rm -r /dist
# Byte code is compiled at install time; at run time nothing is written but to HOME (caches) and /tmp, so both are
# volumes and the root file system can be read-only. Listening on all addresses is right inside a container only.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/flan \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    FLAN_SERVE_HOST=0.0.0.0
WORKDIR /home/flan
USER 10001:10001
VOLUME ["/home/flan", "/tmp"]
EXPOSE 8000 50051
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="flan-serve" \
      org.opencontainers.image.description="Serves instruction-finetuned (Flan) models over REST and gRPC." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Exec form: the server is process 1 and gets SIGTERM itself, which is what starts its drain.
ENTRYPOINT ["flan-serve"]
